"""SCAN (Lake & Baroni 2018): commands such as `jump around left twice and walk` and the actions that they mean. All 20,910 are
made here from the grammar of the paper's supplement; nothing is downloaded.

    python data/scan/prepare.py
"""
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from configurator import configure, require, user_errors
from data.pairs import prepare as pairs


@dataclass
class Config:
    val_fraction: float = 0.2  # of the commands, chosen by their hash; as in the paper's first experiment


def commands():
    """[(command, actions)]: what a command means is put together from what its parts mean (figures 6 and 7 of the paper)."""
    acts = [(word, [word.upper()]) for word in ('walk', 'look', 'run', 'jump')]
    phrases = list(acts)
    for side in ('left', 'right'):
        turn = side[0].upper() + 'TURN'
        for word, act in [('turn', []), *acts]:
            phrases += [(f'{word} {side}', [turn, *act]), (f'{word} opposite {side}', [turn, turn, *act]),
                        (f'{word} around {side}', [turn, *act] * 4)]
    phrases = [(words + often, act * n) for words, act in phrases for often, n in (('', 1), (' twice', 2), (' thrice', 3))]
    pairs = list(phrases)
    for (a, first), (b, second) in itertools.product(phrases, repeat=2):
        pairs += [(f'{a} and {b}', first + second), (f'{a} after {b}', second + first)]
    return [(command, ' '.join(actions)) for command, actions in pairs]


def main(config):
    require(0 < config.val_fraction < 1, f'val_fraction = {config.val_fraction}: give a share between 0 and 1')
    documents = list(enumerate(map(list, commands()), 1))
    pairs.write(lambda: documents, pairs.Config(input='SCAN', vocab_size=335, dataset='scan', val_fraction=config.val_fraction))


if __name__ == '__main__':
    with user_errors():
        main(configure(Config)[0])
