"""Your own text: a file, or all files of a folder and its subfolders, as token bins.

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

from configurator import configure
from lib.errors import require, user_errors


@dataclass
class Config:
    input: str = ''  # a UTF-8 text file, or a folder of them
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int = 4096  # of bpe
    init_from: str = ''  # weights to finetune (a run's folder, a checkpoint): use their tokenizer
    dataset: str = 'text'  # the bins go to data/<dataset>
    val_fraction: float = 0.1  # the fraction of the text, at its end, kept for validation


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)

from lib.bpe import make_tokenizer
from lib.text import read_pieces, split_at_end
from lib.write import dataset_folder, write_dataset


def text_files(root):
    """The UTF-8 text files of a folder, in the order of the hash of their names; says what it
    skips."""
    files, skipped = [], []
    for path in sorted(root.rglob('*')):
        hidden = any(part.startswith('.') for part in path.relative_to(root).parts)
        if path.is_file() and not hidden:
            (files if is_text(path) else skipped).append(path)
    if skipped:
        print(f'{len(skipped)} files are not UTF-8 text and are left out, among them '
              f'{printable(skipped[0])}')

    def name_hash(path):
        return hashlib.sha256(os.fsencode(path.relative_to(root).as_posix())).digest()

    return sorted(files, key=name_hash)


def printable(path):
    return os.fsencode(path).decode(errors='replace')  # a file's name need not be UTF-8


def is_text(path):
    try:
        return all('\0' not in piece for piece in read_pieces(path))
    except (OSError, ValueError):
        return False


def pick_tokenizer(config, texts):
    if config.init_from:
        from checkpoint import load  # imports torch

        return load(config.init_from, mmap=True).get_tokenizer()
    return make_tokenizer(config.tokenizer, texts, config.vocab_size)


def main(config):
    require(config.input, 'name your text: python data/text/prepare.py --input=PATH, '
                          'a text file or a folder')
    folder = dataset_folder(config.dataset)
    require(0 < config.val_fraction < 1,
            f'val_fraction = {config.val_fraction}: give a share between 0 and 1')
    root = Path(config.input).expanduser()
    require(root.exists(), f'--input={config.input}: there is no such file or folder')
    files = [root] if root.is_file() else text_files(root)
    size = sum(path.stat().st_size for path in files)
    require(size > 0, f'--input={config.input}: there is no text in it')
    tokenizer = pick_tokenizer(config, lambda: (text for f in files for text in read_pieces(f)))

    def texts():
        for path in files:
            for piece in read_pieces(path):
                yield piece, False
            yield '', len(files) > 1  # documents end; a single file is one long text

    pieces = split_at_end(texts(), size, config.val_fraction)
    write_dataset(folder, pieces, tokenizer, printable(config.input), size)


if __name__ == '__main__':
    with user_errors():
        main(config)
