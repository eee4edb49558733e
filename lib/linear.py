"""Layers: norms, and the forms of Linear that sampling uses: packed for a CPU, int8."""
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F

from lib.device import cpu_capabilities


def make_embedding(n, dim):
    """nn.Embedding without default init, which on the meta device takes 2 s to import Dynamo."""
    return nn.Embedding.from_pretrained(torch.empty(n, dim), freeze=False)


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


class Linear(nn.Linear):
    """nn.Linear. In training on a CPU, autocast would keep a 16-bit copy of each weight for
    backward: a third of the activations of GPT-2 at 1,024 tokens. Here backward makes it again."""

    def forward(self, x):
        if (x.device.type == 'cpu' and torch.is_grad_enabled() and torch.is_autocast_enabled('cpu')
                and x.dim() > 1 and x.dtype != torch.float64
                and not torch._C._are_functorch_transforms_active()):
            return CastLinear.apply(x, self.weight, self.bias, torch.get_autocast_dtype('cpu'))
        return super().forward(x)


class CastLinear(torch.autograd.Function):
    """F.linear in dtype, whose backward gives bit for bit what autocast's does."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = dy.flatten(0, -2).T @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0)
        return dx, dw, db, None


class PackedLinear(nn.Module):
    """A bf16 Linear for sampling on a CPU: the weight in the layout of oneDNN's kernel, into which
    F.linear brings it in every call. The products are the same."""

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')

    @property
    def weight(self):
        """(out, in)"""
        return self.packed.to_dense()


class Int8Linear(nn.Module):
    """A Linear with int8 weights, for sampling: half the bytes of bf16 to read per token. On a GPU
    only if it is compiled: then the conversion is part of the product's kernel (gpt-fast).

    weight = int8 * scale, one scale per output. On a CPU the kernels round the inputs to int8 too,
    with one scale per call, so a sequence depends slightly on its batch.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        low, high = weight.aminmax(dim=1)
        scale = torch.maximum(-low, high).clamp(min=1e-12) / 127  # (out,), fp32
        int8 = (weight / scale[:, None]).round().to(torch.int8)
        self.packed, self.bias = None, linear.bias
        if weight.device.type != 'cpu':
            self.register_buffer('int8', int8)
            self.register_buffer('scale', scale)
            return
        # without VNNI, sums of products may overflow 16 bits
        self.reduce_range = not cpu_capabilities().get('avx512_vnni')
        zero_points = torch.zeros(len(scale)).long()
        with warnings.catch_warnings():  # quantized tensors are deprecated
            warnings.simplefilter('ignore')
            weight = torch._make_per_channel_quantized_tensor(int8, scale.double(), zero_points, 0)
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
def replace_linears(model, kind):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


def quantize(model):
    """Replace every Linear by an Int8Linear, in place; embeddings stay as they are."""
    return replace_linears(model, Int8Linear)


def pack(model):
    """Replace every Linear by a PackedLinear, in place, if that can multiply by the weights."""
    weight = model.lm_head.weight
    if ((weight.device.type, weight.dtype) == ('cpu', torch.bfloat16)
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        replace_linears(model, PackedLinear)
    return model
