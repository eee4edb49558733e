"""Tiny Shakespeare in characters: 1,003,854 for training and 111,540 for validation, as in nanoGPT.

    python data/shakespeare_char/prepare.py
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure, user_errors


@dataclass
class Config:
    pass


def main():
    from data import bins, tokenizer
    from data.download import tiny_shakespeare

    folder = Path(__file__).parent
    text = tiny_shakespeare(folder / 'input.txt')
    tokens = tokenizer.make('char', lambda: [text], None)
    size = len(text.encode('utf-8'))
    bins.write_dataset(folder, bins.split_at_end([(text, False)], size), tokens, 'tiny shakespeare', size)


if __name__ == '__main__':
    with user_errors():
        configure(Config)
        main()
