"""Tiny Shakespeare in characters: 1,003,854 for training, 111,540 for validation, as in nanoGPT.

    python data/shakespeare_char/prepare.py
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure
from lib.errors import user_errors
from lib.text import prepare_shakespeare


@dataclass
class Config:
    """It has no keys."""


if __name__ == '__main__':
    with user_errors():
        configure(Config)
        prepare_shakespeare(Path(__file__).parent, 'char')
