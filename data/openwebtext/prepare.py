"""OpenWebText, an open copy of the text GPT-2 was trained on: 8 million documents, 9 billion tokens of GPT-2 (18 GB).

    pip install datasets
    python data/openwebtext/prepare.py --max_tokens=1e9
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure, user_errors


@dataclass
class Config:
    source: str = 'Skylion007/openwebtext'  # on the hub, or a local folder of parquet or JSON lines with a column text
    name: str | None = None  # the configuration on the hub
    max_tokens: int | None = None  # stop after about so many; None: all


def main(config):
    from data import bins, tokenizer

    documents, source = bins.hub_documents(config.source, config.name, val_every=2000)
    expected = 9_000_000_000 if config.source == Config.source else None
    bins.write_dataset(Path(__file__).parent, documents, tokenizer.gpt2(), source, None, config.max_tokens, expected)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
