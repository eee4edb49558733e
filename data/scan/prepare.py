"""SCAN (Lake & Baroni 2018): commands such as `jump around left twice and walk` and their actions.

All 20,910 are generated from the grammar in the paper's supplement; nothing is downloaded.

    python data/scan/prepare.py
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import ValFraction, configure
from lib.bpe import train_bpe
from lib.errors import user_errors
from lib.write_pairs import write_pairs


@dataclass
class Config:
    val_fraction: ValFraction = 0.2  # of the commands, by hash; as in the paper's first experiment


def commands():
    """[(command, actions)]: meanings compose (figures 6 and 7 of the paper)."""
    acts = [(word, [word.upper()]) for word in ('walk', 'look', 'run', 'jump')]
    phrases = list(acts)
    for side in ('left', 'right'):
        turn = side[0].upper() + 'TURN'
        for word, act in [('turn', []), *acts]:
            phrases += [(f'{word} {side}', [turn, *act]),
                        (f'{word} opposite {side}', [turn, turn, *act]),
                        (f'{word} around {side}', [turn, *act] * 4)]
    repeats = (('', 1), (' twice', 2), (' thrice', 3))
    phrases = [(words + often, act * n) for words, act in phrases for often, n in repeats]
    pairs = list(phrases)
    for (a, first), (b, second) in itertools.product(phrases, repeat=2):
        pairs += [(f'{a} and {b}', first + second), (f'{a} after {b}', second + first)]
    return [(command, ' '.join(actions)) for command, actions in pairs]


def main(config):
    documents = [(f'line {n}', parts) for n, parts in enumerate(commands(), 1)]
    tokenizer = train_bpe((part for _, parts in documents for part in parts), vocab_size=335)
    write_pairs(documents, tokenizer, 'SCAN', 'scan', val_fraction=config.val_fraction)


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
