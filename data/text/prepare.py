"""Your own text: a file, or a folder with all its files (and theirs), cut into tokens.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=~/notes --tokenizer=bpe --vocab_size=4096 --dataset=notes
    python train.py config/quickstart.py --dataset=notes --out_dir=out-notes
"""
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure, require, user_errors


@dataclass
class Config:
    input: str = ''  # a UTF-8 text file, or a folder of them
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int = 4096  # of bpe
    init_from: str = ''  # weights to be finetuned (a run's folder, a checkpoint): their tokenizer is taken instead
    dataset: str = 'text'  # the bins go to data/<dataset>
    val_fraction: float = 0.1  # the share of the text, at its end, that is kept for validation


def text_files(root):
    """The files of a folder that hold UTF-8 text, in the order of the hash of their names; what is skipped is said."""
    files, skipped = [], []
    for path in sorted(root.rglob('*')):
        if path.is_file() and not any(part.startswith('.') for part in path.relative_to(root).parts):
            (files if is_text(path) else skipped).append(path)
    if skipped:
        print(f'{len(skipped)} files are not UTF-8 text and are left out, {printable(skipped[0])} among them')
    return sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(root).as_posix())).digest())


def printable(path):
    return os.fsencode(path).decode(errors='replace')  # a file's name need not be UTF-8


def is_text(path):
    from data.bins import read_pieces

    try:
        return all('\0' not in piece for piece in read_pieces(path))
    except (OSError, ValueError):
        return False


def main(config):
    from data import bins, tokenizer

    require(config.input, 'name your text: python data/text/prepare.py --input=PATH, a text file or a folder')
    folder = bins.own_folder(config.dataset)
    require(0 < config.val_fraction < 1, f'val_fraction = {config.val_fraction}: give a share between 0 and 1')
    root = Path(config.input).expanduser()
    require(root.exists(), f'--input={config.input}: there is no such file or folder')
    files = [root] if root.is_file() else text_files(root)
    size = sum(path.stat().st_size for path in files)
    require(size > 0, f'--input={config.input}: there is no text in it')
    everything = lambda: (piece for path in files for piece in bins.read_pieces(path))  # noqa: E731
    if config.init_from:
        from checkpoint import load

        tokens = load(config.init_from, mmap=True).get_tokenizer()
    else:
        tokens = tokenizer.make(config.tokenizer, everything, config.vocab_size)

    def texts():
        for path in files:
            for piece in bins.read_pieces(path):
                yield piece, False
            yield '', len(files) > 1  # documents end; a single file is one long text

    bins.write_dataset(folder, bins.split_at_end(texts(), size, config.val_fraction), tokens, printable(config.input), size)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
