"""The Python standard library's own source and documentation, found on this machine: about 10 MB, no download.

    python data/python_stdlib/prepare.py --vocab_size=2048
"""
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure, require, user_errors


@dataclass
class Config:
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int = 2048  # of bpe


# tests, tables of code points and what is installed by users would teach little
LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'encodings', 'topics.py', '__pycache__'}


def documents():
    """[(name, text)] in the order of the hash of their names, so that the last tenth is a fair sample."""
    root = Path(sysconfig.get_path('stdlib'))
    found = {}
    for path in root.rglob('*.py'):
        name = path.relative_to(root).as_posix()
        if not LEFT_OUT & set(name.split('/')):
            try:
                found[name] = path.read_text(encoding='utf-8')
            except (OSError, UnicodeDecodeError):
                continue
    try:
        from pydoc_data.topics import topics  # the language reference, as help() shows it
        found |= {f'topics/{name}': text for name, text in topics.items()}
    except ImportError:
        pass
    require(found, f'{root}: no source of the standard library here; use data/text/prepare.py with text of your own')
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def main(config):
    from data import bins, tokenizer

    texts = [text for _, text in documents()]
    tokens = tokenizer.make(config.tokenizer, lambda: texts, config.vocab_size)
    size = sum(len(text.encode('utf-8')) for text in texts)
    pieces = bins.split_at_end(((text, True) for text in texts), size)
    bins.write_dataset(Path(__file__).parent, pieces, tokens, f'the standard library of Python {sys.version.split()[0]}', size)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
