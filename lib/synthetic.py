"""train.py's Trainer on random tokens: its steps without a run's folder, data and log; and GPT-2 in
nanoGPT's plain way. For tests and tools/gpu_report.py, which measures both."""
import contextlib
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import ModelConfig


class RandomRows:
    """Random tokens in place of a lib.bins.TokenBin; each row is a function of its number."""

    n_samples = 2**63  # no two are alike

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
    trainer.log = SimpleNamespace(add=lambda *values: None, measures=lambda step: {})
    return trainer


class PlainBlock(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(n_embd, bias=False) for _ in range(2))
        self.qkv, self.proj = (nn.Linear(n_embd, n * n_embd, bias=False) for n in (3, 1))
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd, bias=False), nn.GELU(),
                                 nn.Linear(4 * n_embd, n_embd, bias=False))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)
                   for part in self.qkv(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2 as nanoGPT builds it, of plain torch.nn: idx, targets (B, T) -> loss."""

    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(n_embd, n_head) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd, bias=False)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
