"""FineWeb-Edu, educational web pages (Penedo et al. 2024): a sample of 10 billion tokens (20 GB).

    pip install datasets
    python data/fineweb_edu/prepare.py --max_tokens=1e9
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
    source: FilePath = 'HuggingFaceFW/fineweb-edu'  # on the hub, or a folder of parquet, JSON lines
    name: str | None = None  # the configuration on the hub; None: sample-10BT of FineWeb-Edu
    max_tokens: int | None = None  # stop after about so many; None: all


if __name__ == '__main__':
    with user_errors():
        config, _ = configure(Config)
        name, expected = config.name, None
        if config.source == Config.source:
            name, expected = name or 'sample-10BT', 10_000_000_000
        prepare_hub(Path(__file__).parent, config.source, name, config.max_tokens, expected)
