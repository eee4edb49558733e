"""FineWeb-Edu, educational web pages (Penedo et al. 2024): the sample of 10 billion tokens of GPT-2 (20 GB).

    pip install datasets
    python data/fineweb_edu/prepare.py --max_tokens=1e9
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure, user_errors


@dataclass
class Config:
    source: str = 'HuggingFaceFW/fineweb-edu'  # on the hub, or a local folder of parquet or JSON lines with a column text
    name: str | None = None  # the configuration on the hub; None: sample-10BT of FineWeb-Edu
    max_tokens: int | None = None  # stop after about so many; None: all


def main(config):
    from data import bins, tokenizer

    name = config.name or ('sample-10BT' if config.source == Config.source else None)
    documents, source = bins.hub_documents(config.source, name, val_every=2000)
    expected = 10_000_000_000 if config.source == Config.source else None
    bins.write_dataset(Path(__file__).parent, documents, tokenizer.gpt2(), source, None, config.max_tokens, expected)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
