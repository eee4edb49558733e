"""Your own text: a file, or all files of a folder and its subfolders, as token bins.

    python data/text/prepare.py --input=book.txt
    python data/text/prepare.py --input=~/notes --tokenizer=bpe --vocab_size=4096 --dataset=notes
    python train.py config/quickstart.py --dataset=notes --out_dir=out-notes

Files may be compressed (.gz). `<|endoftext|>` in a text ends a document.
"""
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import FilePath, ValFraction, configure
from lib.errors import UserError, first_line, plural, require, user_errors
from lib.files import command, find, printable


@dataclass
class Config:
    input: FilePath = ''  # a UTF-8 text file, a folder of them, or a pipe; -: standard input
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int | None = None  # of bpe; None: 4096, or what a short text has pairs for
    init_from: FilePath = ''  # weights to finetune (a run's folder, a checkpoint): their tokenizer
    dataset: str = 'text'  # the bins go to data/<dataset>
    val_fraction: ValFraction = 0.1  # the fraction of the text, at its end, kept for validation
    special_tokens: bool = True  # <|endoftext|> in the text ends a document; False: plain text


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, given = configure(Config)
        own = {'tokenizer', 'vocab_size'} & given.keys() if config.init_from else ()
        require(not own, f'init_from = {config.init_from!r} brings its tokenizer: leave out '
                         f'{", ".join(sorted(own))}')

from lib.bpe import make_tokenizer
from lib.text import read_pieces, regular_file, split_at_end
from lib.tokenizer import END_OF_TEXT
from lib.write import dataset_folder, write_dataset


def text_files(root):
    """{path: (bytes, number of `<|endoftext|>`)} of the text files of a folder, in the order of the
    hash of their names; links are followed, and each file counts once. Prints what it skips."""
    files, skipped, visited = {}, [], {os.path.realpath(root)}

    def is_new(path):
        real = os.path.realpath(path)
        if path.name.startswith('.') or real in visited:
            return False
        visited.add(real)
        return True

    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in sorted(subfolders) if is_new(Path(folder, name))]
        for path in (Path(folder, name) for name in sorted(names)):
            if not (path.is_file() and is_new(path)):
                continue
            try:
                files[path] = measure(path)
            except UserError as error:
                skipped.append(first_line(error))
    if skipped:
        print(f'left out: {plural(len(skipped), "file")}, the first one: '
              f'{printable(min(skipped))}')

    def name_hash(path):
        return hashlib.sha256(os.fsencode(path.relative_to(root).as_posix())).digest()

    return {path: files[path] for path in sorted(files, key=name_hash)}


def measure(path, binary_too=False):
    """(bytes of the text, number of `<|endoftext|>`) of a file. Raises UserError."""
    size = n_separators = 0
    for piece in read_pieces(path, cuts_anywhere=True):
        require(binary_too or '\0' not in piece, f'{path}: it has null bytes')
        size += len(piece.encode('utf-8'))
        n_separators += piece.count(END_OF_TEXT)
    return size, n_separators


def pick_tokenizer(config, texts, n_separators):
    if config.init_from:
        from checkpoint import load  # imports torch

        return load(config.init_from, mmap=True).get_tokenizer()
    return make_tokenizer(config.tokenizer, texts, config.vocab_size, end_of_text=n_separators > 0)


def main(config):
    require(config.input, 'name your text: python data/text/prepare.py --input=PATH, '
                          'a text file or a folder')
    dataset_folder(config.dataset)
    root = find(config.input)
    if root.is_dir():
        prepare(config, text_files(root))
    else:
        with regular_file(config.input) as path:
            prepare(config, {path: measure(path, binary_too=True)})


def prepare(config, files):
    """files: {path: (bytes, number of `<|endoftext|>`)}."""
    size = sum(n_bytes for n_bytes, _ in files.values())
    require(size > 0, f'--input={config.input}: there is no text in it')
    n_separators = config.special_tokens * sum(n for _, n in files.values())

    def training_texts():
        for path in files:
            for piece in read_pieces(path):
                yield from piece.split(END_OF_TEXT) if n_separators else [piece]

    tokenizer = pick_tokenizer(config, training_texts, n_separators)
    separates = n_separators > 0 and tokenizer.eot is not None
    if n_separators:
        how = 'separate documents' if separates else 'are plain text: the tokenizer lacks it'
        print(f'{n_separators:,} {END_OF_TEXT} in the text {how}')

    def texts():
        for path in files:
            piece = ''
            for piece in read_pieces(path, cuts_anywhere=tokenizer.cuts_anywhere):
                yield piece, False
            ended = separates and piece.endswith(END_OF_TEXT)
            yield '', len(files) > 1 and not ended  # a single file is one long text

    pieces = split_at_end(texts(), size, config.val_fraction, not config.special_tokens,
                          tokenizer.cuts_anywhere)
    folder = dataset_folder(config.dataset)
    write_dataset(folder, pieces, tokenizer, printable(config.input), size,
                  ordinary=not config.special_tokens)
    if not config.init_from:
        print('next:', command('train.py', 'config/quickstart.py', dataset=config.dataset,
                               out_dir=f'out-{config.dataset}'))


if __name__ == '__main__':
    with user_errors():
        main(config)
