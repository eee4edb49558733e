"""What a sweep tries: lists and ranges of values, their combinations, the rungs of halving."""
import hashlib
import math
import random
import re
from typing import NamedTuple

from configurator import TrainConfig, key_types, read_flag
from lib.errors import plural, require

MAX_NAME = 100  # bytes of a folder's name


class Range(NamedTuple):
    """Uniform, also in the logarithm; both ends are included."""
    kind: str  # log or uniform
    low: float  # an int if the key takes whole numbers
    high: float

    def draw(self, source):
        """The number that belongs to the text `source`; of four digits, for a short name."""
        u, whole = random.Random(source).random(), isinstance(self.low, int)
        low, end = self.low, self.high + whole
        x = low * (end / low)**u if self.kind == 'log' else low + (end - low) * u
        return math.floor(x) if whole else min(max(float(f'{x:.4g}'), low), self.high)


def read_values(key, text):
    """A Range, or a list of texts. Raises UserError."""
    kind, *ends = text.split(':')
    def value(text):
        return read_flag(f'--{key}={text}', [], key_types(TrainConfig))[key]

    if kind not in ('log', 'uniform') or len(ends) != 2:
        found = {}
        for part in text.split(','):
            found.setdefault(value(part), part)  # 0.01 and 1e-2 are one
        return list(found.values())
    low, high = map(value, ends)
    require({type(low), type(high)} <= {int, float}, f'{key} is not a number: list its values')
    require(low < high and (low > 0 or kind == 'uniform'),
            f'--{key}={text}: write {kind}:LOW:HIGH' + ', LOW more than 0' * (kind == 'log'))
    return Range(kind, low, high)


def combinations(values, n_trials, seed):
    """Every combination of the listed values, with the draws of each trial, which depend on the
    seed, its number and the key alone: [{key: text}]. None is there twice."""
    found = {}
    for trial in range(n_trials):
        choices = [{}]
        for key, texts in values.items():
            if isinstance(texts, Range):
                texts = [str(texts.draw(f'{seed} {trial} {key}'))]
            choices = [choice | {key: text} for choice in choices for text in texts]
        found |= {tuple(choice.items()): choice for choice in choices}
    return list(found.values())


def without_seed(choice):
    """What runs that differ only in their seed share."""
    return tuple(item for item in choice.items() if item[0] != 'seed')


def rungs(max_iters, eta, n_settings):
    """The steps to which n_settings, n_settings // eta, ... are trained; the last is max_iters."""
    n = 0
    while eta**(n + 1) <= n_settings:
        n += 1
    require(max_iters >= eta**n, f'max_iters = {max_iters}: halving {plural(n_settings, "setting")}'
                                 f' needs at least {eta**n} steps')
    return [max_iters // eta**n * eta**i for i in range(n)] + [max_iters]


def folder_name(choice, varied):
    """The choice if that is short; else the varied keys, cut off, and a hash of the choice."""
    text = ','.join(f'{key}={text}' for key, text in choice.items()) or 'as-it-is'
    name = printable(text)
    if name == text and len(name.encode()) <= MAX_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:8]
    short = printable(','.join(f'{key}={choice[key]}' for key in choice if key in varied))
    return ','.join(filter(None, [short.encode()[:MAX_NAME].decode(errors='ignore'), digest]))


def printable(text):
    return re.sub(r'[^-+.,=\w]', '_', text)
