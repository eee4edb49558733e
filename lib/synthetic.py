"""train.py's Trainer on random tokens: its steps without a run's folder, data and log.

For tests and tools/gpu_report.py, which measures the step that trains.
"""
import contextlib
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np

from configurator import ModelConfig


class RandomRows:
    """Random tokens in place of a lib.bins.TokenBin; each row is a function of its number."""

    def __init__(self, block_size, vocab_size):
        self.block_size, self.vocab_size = block_size, vocab_size

    def windows(self, numbers):
        """x and the next tokens y of these rows: (n, block_size), int64."""
        size = self.block_size + 1
        rows = np.stack([np.random.default_rng(int(number)).integers(self.vocab_size, size=size)
                         for number in numbers])
        return rows[:, :-1], rows[:, 1:]

    def batch(self, first_sample, count, seed):
        return self.windows(range(first_sample, first_sample + count))

    def count_targets(self, first_sample, count, seed):
        return count * self.block_size


def make_trainer(train, config, rows, vocab_size, device, dtype, compiled=False, **document):
    """A Trainer as main of train.py makes it, ready for train_step.

    train: the module, which lib does not import. config: a TrainConfig. rows: RandomRows.
    document: eot_token and turns, which a run takes from its data.
    """
    model_config = {f.name: getattr(config, f.name) for f in fields(ModelConfig)} | document
    tokenizer = SimpleNamespace(vocab_size=vocab_size, to_dict=lambda: None)
    data = SimpleNamespace(train=rows, tokenizer=tokenizer, fingerprint=lambda: '')
    with contextlib.redirect_stdout(sys.stderr):
        model, parallel = train.build_model(config, None, data, model_config, device, dtype,
                                            compiled)
        trainer = train.Trainer(config, None, data, model, device, dtype)
        trainer.wrap(parallel, compiled)
    trainer.log = SimpleNamespace(add=lambda *values: None)
    return trainer
