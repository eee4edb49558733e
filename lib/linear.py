"""Layers: Linear with a fast path for one token on a CPU, norms, int8 weights for sampling."""
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F


def make_embedding(n, dim):
    """nn.Embedding without default init, which on the meta device takes 2 s to import Dynamo."""
    return nn.Embedding.from_pretrained(torch.empty(n, dim), freeze=False)


class Linear(nn.Linear):
    """nn.Linear; a single bf16 token on a CPU uses torch.mv: 1.4 times as fast."""

    def forward(self, x):
        bf16 = x.dtype == torch.bfloat16 == self.weight.dtype
        if bf16 and x.numel() == x.size(-1) and x.device.type == 'cpu':
            y = torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of x: FSDP gathers the gains in 16 bits."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, likewise."""

    def forward(self, x):
        weight = None if self.weight is None else self.weight.type_as(x)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Int8Linear(nn.Module):
    """A Linear with int8 weights, for sampling: half the bytes of bf16 to read per token. On a GPU
    only if it is compiled: then the conversion is part of the product's kernel (gpt-fast).

    weight = int8 * scale, one scale per output. On a CPU the kernels round the inputs to int8 too,
    with one scale per call, so a sequence depends slightly on its batch.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.packed, self.bias = None, linear.bias
        if weight.device.type != 'cpu':
            self.register_buffer('int8', (weight / scale[:, None]).round().to(torch.int8))
            self.register_buffer('scale', scale)  # (out,), fp32
            return
        # without VNNI, sums of products may overflow 16 bits
        self.reduce_range = not torch.cpu.get_capabilities().get('avx512_vnni')
        zero_points = torch.zeros(len(scale)).long()
        with warnings.catch_warnings():  # quantized tensors are deprecated
            warnings.simplefilter('ignore')
            weight = torch.quantize_per_channel(weight, scale.double(), zero_points, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def forward(self, x):
        if self.packed is not None:
            quantized_linear = torch.ops.quantized.linear_dynamic
            y = quantized_linear(x.float(), self.packed, self.reduce_range).type_as(x)
        else:
            y = F.linear(x, self.weight.to(x.dtype))  # scaled before: fp16 would overflow
        return y if self.bias is None else y + self.bias

    @property
    def weight(self):
        """int8 * scale, (out, in), in fp32."""
        if self.packed is not None:
            return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()
        return self.int8 * self.scale[:, None]


@torch.no_grad()
def quantize(model):
    """Replace every Linear by an Int8Linear, in place; embeddings stay as they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model
