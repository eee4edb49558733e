"""OpenWebText, an open copy of GPT-2's training text: 9 billion tokens of its BPE (18 GB).

    pip install datasets
    python data/openwebtext/prepare.py --max_tokens=1e9
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import FilePath, configure
from lib.errors import user_errors
from lib.text import prepare_hub


@dataclass
class Config:
    source: FilePath = 'Skylion007/openwebtext'  # on the hub, or a folder of parquet or JSON lines
    name: str | None = None  # the configuration on the hub
    max_tokens: int | None = None  # stop after about so many; None: all


if __name__ == '__main__':
    with user_errors():
        config, _ = configure(Config)
        expected = 9_000_000_000 if config.source == Config.source else None
        prepare_hub(Path(__file__).parent, config.source, config.name, config.max_tokens, expected)
