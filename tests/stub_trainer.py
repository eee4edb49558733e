"""train.py's Trainer on rows of zeros: a step of it without a run, data and log."""

import contextlib
import dataclasses
import sys
from types import SimpleNamespace

import numpy as np

import train
from architectures import SIZES
from configurator import ModelConfig, TrainConfig
from lib.device import dtype_name


class Rows:
    """Rows of zeros in place of a lib.bins.TokenBin."""

    block_size = SIZES['block_size']

    def windows(self, numbers):
        rows = np.zeros((len(numbers), self.block_size), dtype=np.int64)
        return rows, rows

    def batch(self, first_sample, count, seed):
        return self.windows(range(count))

    def count_targets(self, first_sample, count, seed):
        return count * self.block_size


def make_trainer(architecture, device, dtype, **keys):
    """A Trainer, as main of train.py makes it. keys: of TrainConfig."""
    options = {'eot_token': None, 'turns': 0} | SIZES | architecture
    model_config = {key: options.pop(key) for key in ('eot_token', 'turns')}
    tokenizer = SimpleNamespace(vocab_size=options.pop('vocab_size'))
    defaults = {'batch_size': 2, 'gradient_accumulation_steps': 1, 'compile': False}
    config = TrainConfig(**options, dtype=dtype_name(dtype), **defaults | keys)
    model_config |= {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
    data = SimpleNamespace(train=Rows(), tokenizer=tokenizer, fingerprint=lambda: '')
    with contextlib.redirect_stdout(sys.stderr):
        model, parallel = train.build_model(config, None, data, model_config, device, dtype, False)
        trainer = train.Trainer(config, None, data, model, device, dtype)
        trainer.wrap(parallel, False)
    trainer.log = SimpleNamespace(add=lambda *values: None)
    return trainer
