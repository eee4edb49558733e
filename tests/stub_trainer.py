"""train.py's Trainer with the models of architectures.py, on random tokens."""

import train
from architectures import SIZES
from configurator import TrainConfig
from lib.device import dtype_name
from lib.synthetic import RandomRows
from lib.synthetic import make_trainer as make


class Rows(RandomRows):
    """Rows for these models."""

    block_size = SIZES['block_size']

    def __init__(self):
        super().__init__(self.block_size, SIZES['vocab_size'])


def make_trainer(architecture, device, dtype, compiled=False, **keys):
    """A Trainer, as main of train.py makes it. keys: of TrainConfig."""
    options = SIZES | architecture
    vocab_size = options.pop('vocab_size')
    document = {'eot_token': options.pop('eot_token', None), 'turns': options.pop('turns', 0)}
    defaults = {'batch_size': 2, 'gradient_accumulation_steps': 1, 'compile': False}
    config = TrainConfig(**options | defaults | keys, dtype=dtype_name(dtype))
    rows = RandomRows(config.block_size, vocab_size)
    return make(train, config, rows, vocab_size, device, dtype, compiled, **document)
