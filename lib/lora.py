"""LoRA: finetuning trains low-rank updates of frozen matrices (Hu et al. 2021)."""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from lib.distributed import shard_like
from lib.errors import require
from lib.linear import Linear
from optimizer import block_matrices

TRAINED = ('lora_A', 'lora_B')


class LoRALinear(Linear):
    """W x + b + alpha / rank * B A x, of which A and B are trained (Hu et al. 2021, 4.1). B starts
    at 0, so at first this is the frozen Linear; A as in microsoft/LoRA and PEFT."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, device='meta')
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., rank)
        return super().forward(x) + F.linear(down, self.lora_B) * self.scale


def add_lora(model, rank, alpha, dropout):
    """Freeze a GPT and add an update to each matrix in its blocks, in place. Raises UserError."""
    most = min(min(p.shape) for p in block_matrices(model))
    require(rank <= most, f'lora_rank = {rank}: give at most {most}, the smaller side of the '
                          f'smallest matrix in a block')
    model.requires_grad_(False)
    for module in list(model.transformer.h.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, rank, alpha, dropout))


def lora_layers(model):
    """{name: LoRALinear} of a GPT; {} without LoRA."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge_lora(weights, alpha):
    """Merge the updates of a state_dict into its matrices: the GPT's usual names. On the CPU: a GPU
    would round to TF32. Returns (merged weights, {name: tensor} to go on from, None without LoRA).
    """
    merged = {name: w for name, w in weights.items() if not name.endswith(TRAINED)}
    unmerged = {}
    for name in [name for name in weights if name.endswith('.lora_A')]:
        layer = name.removesuffix('.lora_A')
        names = [f'{layer}.{kind}' for kind in ('weight', *TRAINED)]
        W, A, B = (weights[name].cpu() for name in names)
        merged[f'{layer}.weight'] = W + alpha / len(A) * (B @ A)
        unmerged |= {name: weights[name] for name in names}
    return merged, unmerged or None


@torch.no_grad()
def load_lora(model, checkpoint):
    """Go on with the frozen matrices and the updates of a Checkpoint, whose model is merged. Raises
    UserError if they do not fit."""
    saved, params = checkpoint.lora or {}, {}
    for layer, module in lora_layers(model).items():
        params |= {f'{layer}.{kind}': getattr(module, kind) for kind in ('weight', *TRAINED)}
    fits = saved.keys() == params.keys() and all(
        saved[name].shape == p.shape for name, p in params.items())
    require(fits,
            f'{checkpoint.path}: its LoRA weights do not fit its lora_rank: start another run '
            f'from the merged weights with --init_from={checkpoint.path}')
    for name, p in params.items():
        p.copy_(shard_like(saved[name], p))
