"""Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation, as in nanoGPT.

    python data/shakespeare/prepare.py
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
    tokens = tokenizer.make('gpt2', lambda: [text], None)
    size = len(text.encode('utf-8'))
    bins.write_dataset(folder, bins.split_at_end([(text, False)], size), tokens, 'tiny shakespeare', size)


if __name__ == '__main__':
    with user_errors():
        configure(Config)
        main()
