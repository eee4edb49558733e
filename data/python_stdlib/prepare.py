"""The Python standard library's source and documentation, found on this machine: about 10 MB.

    python data/python_stdlib/prepare.py --vocab_size=2048
"""
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure
from lib.bpe import make_tokenizer
from lib.errors import require, user_errors
from lib.text import split_at_end
from lib.write import write_dataset


@dataclass
class Config:
    tokenizer: Literal['bpe', 'char', 'byte', 'gpt2'] = 'bpe'  # bpe is trained on this text
    vocab_size: int = 2048  # of bpe


# tests, tables of code points and installed packages would teach little
SKIPPED = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'encodings', 'topics.py',
           '__pycache__'}


def read_documents():
    """[(name, text)] in the order of the hash of their names: the last tenth is a fair sample."""
    root = Path(sysconfig.get_path('stdlib'))
    documents = {}
    for path in root.rglob('*.py'):
        name = path.relative_to(root).as_posix()
        if SKIPPED & set(name.split('/')):
            continue
        try:
            documents[name] = path.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError):
            continue
    try:
        from pydoc_data.topics import topics  # the language reference; not in every installation
        documents |= {f'topics/{name}': text for name, text in topics.items()}
    except ImportError:
        pass
    require(documents, f'{root}: no source of the standard library here; use '
                       f'data/text/prepare.py with text of your own')
    return sorted(documents.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def main(config):
    texts = [text for _, text in read_documents()]
    tokenizer = make_tokenizer(config.tokenizer, lambda: texts, config.vocab_size)
    size = sum(len(text.encode('utf-8')) for text in texts)
    pieces = split_at_end(((text, True) for text in texts), size)
    source = f'the standard library of Python {sys.version.split()[0]}'
    write_dataset(Path(__file__).parent, pieces, tokenizer, source, size)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
