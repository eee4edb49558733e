"""A decoder-only Transformer (GPT), all of it in this file, which imports nothing of this repo.

Sources: Vaswani et al. 2017 (attention, sinusoidal positions), Radford et al. 2019 (GPT-2, the default architecture) and
nanoGPT, whose names and API are kept. Each choice of GPTConfig names its own source.

Letters in shapes: B sequences, T tokens, C = n_embd, nh heads, nkv key/value heads, hs = C / nh, S keys, V = vocab_size.
"""
import copy
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The architecture; the defaults are GPT-2 124M's. Raises ValueError if the values do not fit together."""
    block_size: int = 1024  # the longest context
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, as in nanoGPT
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    ngram: int = 1  # the longest n-grams with embeddings of their own (Huang 2025, Over-Tokenized Transformer); 1: only tokens
    ngram_rows: int = 16384  # of the table to which the n-grams of one length are hashed
    position: Literal['learned', 'sinusoidal', 'rope', 'none'] = 'learned'  # Radford 2019 | Vaswani 2017, 3.5 | Su 2021 | -
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # Ba 2016 | Zhang & Sennrich 2019
    norm_position: Literal['pre', 'post'] = 'pre'  # before each part: Radford 2019 | behind each sum: Vaswani 2017, 3.1
    activation: Literal['gelu', 'gelu_tanh', 'relu', 'relu2', 'swiglu'] = 'gelu_tanh'  # relu2: So 2021; swiglu: Shazeer 2020
    n_kv_head: int | None = None  # key/value heads, shared by groups of query heads (Ainslie 2023); None: n_head
    qk_norm: bool = False  # RMS-normalise queries and keys (Henry 2020)
    tie_weights: bool = True  # the output head is the token embedding (Press & Wolf 2017)
    logit_softcap: float = 0.0  # c > 0: logits become c * tanh(logits / c) (Gemma 2, 2024)
    zero_init: bool = False  # output projections start at 0, so that each block starts as the identity (Zhang 2019, Fixup)
    document_token: int | None = None  # a document begins with it: what follows does not look back beyond it
    turns: int = 0  # the most turns of a document, each a source and a target; a document_token stands before each of these and
    # at the end, so that two begin a document; 0: plain text
    prefix_lm: bool = False  # the tokens of a source see one another both ways (Raffel 2020, T5, 3.2.1)
    label_smoothing: float = 0.0  # in training, the share of a target that all tokens have alike (Szegedy 2016, section 7)
    attention: Literal['sdpa', 'math'] = 'sdpa'  # fused kernels where they are the fastest, or the same written out
    activation_checkpointing: bool = False  # backward computes each block again instead of keeping it (Chen 2016)

    def __post_init__(self):
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'ngram', 'ngram_rows'):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f'{key} = {value} must be at least 1')
        if self.prefix_lm and (not self.turns or self.document_token is None):
            raise ValueError('prefix_lm = True needs sources and targets: turns and document_token')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: '
                             f'try n_embd = {math.ceil(self.n_embd / self.n_head) * self.n_head}')
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ValueError(f'n_head = {self.n_head} is not divisible by n_kv_head = {self.n_kv_head}: '
                             f'n_kv_head must be one of the divisors of n_head')
        if self.position == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(f'position = rope turns pairs of dimensions: n_embd / n_head = {self.n_embd // self.n_head} must '
                             f'be even')
        if self.position == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f'position = sinusoidal needs an even n_embd, not {self.n_embd}')
        for key in ('dropout', 'label_smoothing'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key} = {getattr(self, key)} must be at least 0 and below 1')
        if self.document_token is not None and not 0 <= self.document_token < self.vocab_size:
            raise ValueError(f'document_token = {self.document_token} must be below vocab_size = {self.vocab_size}')
        if self.logit_softcap < 0:
            raise ValueError(f'logit_softcap = {self.logit_softcap} must be 0 (off) or above')


def position_angles(position, dim):
    """Angles of Vaswani et al. 2017, section 3.5: position / 10000^(2i/dim). (..., T) -> (..., T, dim/2), in fp32."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim)
    return position.float()[..., None] * frequency


def sinusoidal_embedding(position, dim):
    """sin in the even dimensions, cos in the odd (Vaswani et al. 2017, section 3.5). (..., T) -> (..., T, dim)"""
    angles = position_angles(position, dim)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def apply_rotary(x, cos, sin):
    """Turn the pair (x_i, x_{i + hs/2}) by its position's i-th angle (Su et al. 2021; the halves are paired as in GPT-NeoX).

    x: (B, heads, T, hs); cos, sin: (1 or B, 1, T, hs/2), in fp32.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


def documents(tokens, config):
    """In which document each token is, counted from the left. tokens (B, T), -1 = nothing -> (B, T)"""
    begins = tokens == config.document_token
    if config.turns:
        before = F.pad(tokens[:, :-1], (1, 0), value=-1)
        begins = begins & ((before == config.document_token) | (before < 0))
    return begins.cumsum(1)


class NgramEmbedding(nn.Module):
    """For each position the sum of the embeddings of the 2, 3, ..., ngram tokens that end there. (B, T) -> (B, T, C)

    Each length has a table of ngram_rows rows, and its n-grams are hashed to them (Huang et al. 2025, Over-Tokenized
    Transformer): what a model otherwise spends its first layers on, to know the last few tokens, is looked up.
    """
    PRIME = 2**31 - 1  # ids stay below it: no product overflows 64 bits

    def __init__(self, config):
        super().__init__()
        self.config, self.lengths = config, range(2, config.ngram + 1)
        self.base, self.rows = config.vocab_size + 1, config.ngram_rows
        self.tables = nn.Embedding(len(self.lengths) * self.rows, config.n_embd)  # one above the other

    def row_numbers(self, tokens):
        """tokens (B, T + ngram - 1): the text and what stands before it, -1 = nothing. -> rows of the tables (B, T, ngram - 1)"""
        T = tokens.size(1) - len(self.lengths)
        last = tokens.size(1) - T
        number, rows = tokens[:, last:].clamp(min=0), []  # an n-gram read as a number, its last token the lowest digit
        document = documents(tokens, self.config) if self.config.document_token is not None else None
        for i, n in enumerate(self.lengths):
            older = tokens[:, last - n + 1:last - n + 1 + T]
            if document is not None:  # of another document: as if nothing stood there
                older = older.where(document[:, last - n + 1:last - n + 1 + T] == document[:, last:], -1)
            number = (number + (older + 1) * pow(self.base, n - 1, self.PRIME)) % self.PRIME
            # multiplied and taken modulo a prime, then modulo rows: Carter & Wegman 1979; few enough have a row each
            row = number if self.base**n <= self.rows else number * 1181783497 % self.PRIME % self.rows
            rows.append(row + i * self.rows)
        return torch.stack(rows, dim=-1)

    def forward(self, tokens):
        rows = self.row_numbers(tokens)  # (B, T, ngram - 1)
        return F.embedding_bag(rows.flatten(0, 1), self.tables.weight, mode='sum').view(*rows.shape[:2], -1)


class KVCache:
    """Keys and values of every layer for the tokens read so far, in buffers of a fixed size.

    Rows of unequal length are padded on the left: the first padding[b] columns of row b are not part of the text.
    static: every step has tensors of the same shapes, as a compiled step needs: a query looks at the whole buffer through a mask.
    """

    def __init__(self, config, batch_size, size, device=None, dtype=None, padding=None, static=False):
        n_kv_head = config.n_kv_head or config.n_head
        shape = (config.n_layer, batch_size, n_kv_head, size, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # zeros: a masked nan would still be one
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.full((batch_size, size), -1, device=device)  # n-grams and documents depend on what they are
        self.padding = padding  # (B,) or None
        self.size, self.static = size, static
        self.length = 0  # columns filled
        self.filled = torch.zeros(1, dtype=torch.long, device=device)  # the same, for a static cache

    def rows(self, which, spare=None):
        """A cache of these rows, which (B',), each perhaps several times. spare: one of as many rows, whose memory it gets."""
        new, which = copy.copy(self), torch.as_tensor(which, device=self.k.device)
        if spare is None:
            new.k, new.v = self.k[:, which], self.v[:, which]
        else:
            new.k, new.v = spare.k, spare.v
            for old, copied in ((self.k, new.k), (self.v, new.v)):
                copied[..., :self.length, :] = old[:, which, :, :self.length]
        new.tokens = self.tokens[which]
        new.padding = None if self.padding is None else self.padding[which]
        return new

    def keep_in_place(self):
        """A CUDA graph may write only into buffers of which it is told that they stay where they are."""
        for buffer in (self.k, self.v, self.tokens, self.filled):
            torch._dynamo.mark_static_address(buffer)

    def columns(self, T):
        """Where the next T tokens go (T,)."""
        if self.static:
            return self.filled + torch.arange(T, device=self.k.device)
        return torch.arange(self.length, self.length + T, device=self.k.device)

    def append(self, layer, k, v):
        """Store k, v (B, nkv, T, hs) behind what is there; returns all keys and values to look at (B, nkv, S, hs)."""
        T = k.size(2)
        if self.static:
            self.k[layer].index_copy_(2, self.columns(T), k)
            self.v[layer].index_copy_(2, self.columns(T), v)
            return self.k[layer], self.v[layer]
        end = self.length + T
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def append_tokens(self, tokens):
        """Store the ids (B, T) of what is read next, -1 for padding; returns all ids to look at (B, S)."""
        self.tokens.index_copy_(1, self.columns(tokens.size(1)), tokens)
        return self.tokens if self.static else self.tokens[:, :self.length + tokens.size(1)]

    def advance(self, T):
        if self.static:
            self.filled += T
        else:
            self.length += T

    def mask(self, T):
        """Which columns each of the next T tokens may look at: (B or 1, 1, T, S), or None where plain causality says it."""
        if self.padding is None and not self.static and (T == 1 or self.length == 0):
            return None
        column = torch.arange(self.size if self.static else self.length + T, device=self.k.device)
        query = self.columns(T)[:, None]
        visible = column <= query  # (T, S)
        if self.padding is not None:
            visible = visible & (column >= self.padding[:, None, None])  # (B, T, S)
            visible = visible | (column == query)  # a padding token sees itself: a row of softmax over nothing would be NaN
        return visible.view(-1, 1, *visible.shape[-2:])


class Linear(nn.Linear):
    """nn.Linear; for one token on a CPU by the matrix-vector kernel, which reads bfloat16 weights 1.4 times as fast."""

    def forward(self, x):
        if x.dtype == torch.bfloat16 == self.weight.dtype and x.numel() == x.size(-1) and x.device.type == 'cpu':
            y = torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Int8Linear(nn.Module):
    """A Linear whose weights are kept in 8 bits, for sampling: half the bytes of bfloat16 to read for a token.

    weight = int8 * scale with a scale for each output, so that its largest weight becomes 127. On a CPU the inputs are rounded to
    8 bits too, by PyTorch's quantized kernels, with one scale for each call: a row depends a little on the rows beside it.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.packed, self.bias = None, linear.bias
        if weight.device.type == 'cpu':
            self.reduce_range = not torch.cpu.get_capabilities().get('avx512_vnni')  # without it sums may overflow 16 bits
            with warnings.catch_warnings():  # that such tensors will go in some later version
                warnings.simplefilter('ignore')
                weight = torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(scale)).long(), 0, torch.qint8)
                self.packed = torch.ops.quantized.linear_prepack(weight, None)
        else:
            self.register_buffer('weight', (weight / scale[:, None]).round().to(torch.int8))  # (out, in)
            self.register_buffer('scale', scale)  # (out,), in fp32

    def forward(self, x):
        if self.packed is not None:
            y = torch.ops.quantized.linear_dynamic(x.float(), self.packed, self.reduce_range).type_as(x)
        else:
            y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).type_as(x)
        return y if self.bias is None else y + self.bias


class CausalSelfAttention(nn.Module):
    """Masked multi-head self-attention (Vaswani et al. 2017, section 3.2). (B, T, C) -> (B, T, C)"""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        # queries, keys and values of all heads in one matrix product
        self.c_attn = Linear(config.n_embd, config.n_embd + 2 * self.n_kv_head * self.head_size, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def project(self, x, rotary=None):
        """Queries (B, nh, T, hs), keys and values (B, nkv, T, hs) of x (B, T, C), as they meet in attention."""
        B, T, C = x.shape
        n_head, n_kv_head, hs = self.config.n_head, self.n_kv_head, self.head_size
        q, k, v = self.c_attn(x).split((C, n_kv_head * hs, n_kv_head * hs), dim=2)
        q = q.view(B, T, n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, n_kv_head, hs).transpose(1, 2)  # (B, nkv, T, hs)
        v = v.view(B, T, n_kv_head, hs).transpose(1, 2)  # (B, nkv, T, hs)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if self.config.qk_norm:
            q, k = F.rms_norm(q, (hs,)), F.rms_norm(k, (hs,))
        return q, k, v

    def forward(self, x, rotary=None, cache=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k.type_as(cache.k), v.type_as(cache.v))  # (B, nkv, S, hs)
            q = q.type_as(cache.k)
        attend = attend_written_out if writes_out(self.config, T, q.dtype, q.device) else attend_fused
        y = attend(q, k, v, mask, self.config.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def writes_out(config, T, dtype, device):
    """Whether T tokens attend by attend_written_out: where it is asked for, and in training in bfloat16 on a CPU, where up to 256
    tokens it takes two thirds of the time of the fused kernel (measured with PyTorch 2.13; in float32 it takes 1.3 times). It
    rounds the scores to bfloat16 too, which the losses do not show.
    """
    faster = device.type == 'cpu' and dtype == torch.bfloat16 and T <= 256 and torch.is_grad_enabled()
    return config.attention == 'math' or faster


def attend_fused(q, k, v, mask=None, dropout=0.0):
    """softmax(QK^T / sqrt(hs)) V by PyTorch's fused kernels (flash attention on CUDA). q: (B, nh, T, hs); k, v: (B, nkv, S, hs).

    mask: True where a query may look, or None: plain causal attention if T > 1, everything if T = 1.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=mask is None and q.size(2) > 1, enable_gqa=k.size(1) != q.size(1))


def attend_written_out(q, k, v, mask=None, dropout=0.0):
    """The same as attend_fused, step by step (Vaswani et al. 2017, equation 1)."""
    B, nh, T, hs = q.shape
    if k.size(1) != nh:  # each group of query heads shares one key head
        k, v = (x.repeat_interleave(nh // x.size(1), dim=1) for x in (k, v))  # (B, nh, S, hs)
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, S)
    if mask is None and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float('-inf'))
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # each row sums to 1
    return weights.type_as(v) @ v  # (B, nh, T, hs)


class MLP(nn.Module):
    """The position-wise feed-forward network, 4 C wide (Vaswani et al. 2017, section 3.3). (B, T, C) -> (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        gated = config.activation == 'swiglu'
        # a gated unit has three matrices: 2/3 of the width keeps the parameters equal (Shazeer 2020, section 3)
        hidden = 8 * math.ceil(config.n_embd / 3) if gated else 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, (2 if gated else 1) * hidden, bias=config.bias)
        self.c_proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def activate(self, x):
        """What c_fc gives (B, T, hidden; twice that for swiglu: gates, then values) -> (B, T, hidden)"""
        if self.activation == 'gelu':
            x = F.gelu(x)
        elif self.activation == 'gelu_tanh':
            x = F.gelu(x, approximate='tanh')
        elif self.activation == 'relu':
            x = F.relu(x)
        elif self.activation == 'relu2':
            x = F.relu(x).square()
        elif self.activation == 'swiglu':
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return x

    def forward(self, x):
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))


def make_norm(config):
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


class Block(nn.Module):
    """Attention, then MLP, each adding to the residual stream what it makes of a normalised copy of it (pre-norm, as in GPT-2);
    with post-norm they read it as it is, and each sum is normalised (Vaswani et al. 2017, section 3.1).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.post = config.norm_position == 'post'
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary=None, cache=None, mask=None):
        if self.post:
            x = self.ln_1(x + self.attn(x, rotary, cache, mask))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), rotary, cache, mask)
        return x + self.mlp(self.ln_2(x))


LOGITS_AT_ONCE = 2**24  # 64 MB in fp32
VOCABULARY_MULTIPLE = {'cuda': 64}  # tensor cores want whole tiles: nanoGPT pads 50257 to 50304 for that


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcap(x W^T) over chunks of tokens, so that never more than one chunk's logits exist.

    Forward computes the gradients too, while it has what they need (as Liger Kernel, Hsu et al. 2024). x: (N, C); weight:
    (V, C); targets: (N,), -1 = no loss. Matrix products are in dtype, all else in fp32. smoothing: GPTConfig.label_smoothing.
    needs_grad: False in an evaluation.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, smoothing, dtype, needs_grad):
        n_chunks = math.ceil(len(x) * len(weight) / LOGITS_AT_ONCE)
        rows = 2**12 if x.device.type == 'cpu' else len(weight)  # a CPU adds bfloat16 to fp32 by way of a copy: a small one
        # the copy of the weights is padded, never the parameters: a checkpoint has the vocabulary as it is
        padding = -len(weight) % VOCABULARY_MULTIPLE.get(x.device.type, 1)
        w, loss = weight.to(dtype), torch.zeros((), device=x.device)
        if padding:
            w = F.pad(w, (0, 0, 0, padding))  # (V + padding, C)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight) if needs_grad else None
        for xi, ti, dxi in zip(*(t.tensor_split(n_chunks) for t in (x.to(dtype), targets, dx))):
            target, counts = ti.clamp(min=0)[:, None], (ti >= 0)[:, None]  # (n, 1)
            logits = F.linear(xi, w)[:, :len(weight)].float()  # (n, V)
            slope = 1.0
            if softcap:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square()
                logits *= softcap
            logp = logits.sub_(logits.logsumexp(dim=-1, keepdim=True))  # in place: this is the largest tensor of a step
            loss -= (1 - smoothing) * (logp.gather(1, target) * counts).sum()
            if smoothing:
                loss -= smoothing * (logp.mean(dim=1, keepdim=True) * counts).sum()
            if not needs_grad:
                continue
            # with respect to its logits, the gradient of a token's loss is p minus what p should be
            dlogits = logp.exp_()
            if smoothing:
                dlogits -= smoothing / len(weight)
            dlogits.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=logp.dtype)).mul_(counts * slope)
            dlogits = dlogits.to(dtype)
            del logits, logp
            if padding:
                dlogits = F.pad(dlogits, (0, padding))  # (n, V + padding)
            for dwi, dlogits_i in zip(dw.split(rows), dlogits[:, :len(weight)].T.split(rows)):
                dwi += dlogits_i @ xi
            dxi.copy_(dlogits @ w)
        n = (targets >= 0).sum()
        ctx.save_for_backward(dx, dw, n)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        dx, dw, n = ctx.saved_tensors
        return dx * (grad / n), dw.mul_(grad / n), None, None, None, None, None


class SkipInit(TorchFunctionMode):
    """Leaves torch.nn.init's functions out: what a module would draw by itself would be drawn in vain, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') != 'torch.nn.init':
            return function(*args, **kwargs or {})


class GPT(nn.Module):
    """nanoGPT's API and parameter names.

        model = GPT(GPTConfig(n_layer=2))
        logits, loss = model(idx, targets)  # idx, targets (B, T) -> (B, T, V), scalar
        logits, _ = model(idx)              # the last position only: (B, 1, V)
        tokens = model.generate(idx, 100)   # (B, T + 100)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        with SkipInit():
            parts = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
            if config.ngram > 1:
                parts['ngram'] = NgramEmbedding(config)
            if config.position == 'learned':
                parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
            parts['drop'] = nn.Dropout(config.dropout)
            parts['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            parts['ln_f'] = make_norm(config) if config.norm_position == 'pre' else nn.Identity()
            self.transformer = nn.ModuleDict(parts)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        if not self.lm_head.weight.is_meta:
            for name, p in self.named_parameters():
                self.init_weight(name, p)

    @torch.no_grad()
    def init_weight(self, name, p):
        """Fill p, the parameter of that name, as GPT-2 does (Radford et al. 2019, section 2.3)."""
        std = 0.02
        if name.endswith('c_proj.weight'):
            # 2 n_layer projections add to the residual stream: scaled down so that its variance does not grow with depth
            std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
        if p.dim() == 1:
            p.fill_(float(name.endswith('weight')))  # gains are 1, biases 0
        elif name == 'transformer.ngram.tables.weight':
            p.zero_()
        else:
            p.normal_(std=std)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding, as in nanoGPT: without the learned positions."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and 'wpe' in self.transformer:
            n -= self.transformer.wpe.weight.numel()
        return n

    def embeddings(self, idx, position, tokens=None):
        """What the residual stream begins with: {'token', 'n-grams', 'position': (B, T, C) or (T, C)}, of which it is the sum.

        idx: (B, T). position: (B, T) or (T,). tokens: (B, ngram - 1 + T), idx with what stands before it, if there are n-grams.
        """
        parts = {'token': self.transformer.wte(idx)}
        if self.config.ngram > 1:
            parts['n-grams'] = self.transformer.ngram(tokens)
        if self.config.position == 'learned':
            parts['position'] = self.transformer.wpe(position)
        elif self.config.position == 'sinusoidal':
            # the paper scales the embeddings up to the size of the sines (section 3.4)
            parts = {name: part * math.sqrt(self.config.n_embd) for name, part in parts.items()}
            parts['position'] = sinusoidal_embedding(position, self.config.n_embd).type_as(parts['token'])
        return parts

    def rotary(self, position):
        """cos and sin for apply_rotary, (1 or B, 1, T, hs/2) each, at position (T,) or (B, T); None without rotary positions."""
        if self.config.position != 'rope':
            return None
        angles = position_angles(position, self.config.n_embd // self.config.n_head)
        angles = angles.view(-1, 1, *angles.shape[-2:])  # (1 or B, 1, T, hs/2)
        return angles.cos(), angles.sin()

    def attention_mask(self, tokens, columns, cache=None):
        """Which of tokens (B, S) each of those in columns (T,) may look at: (B or 1, 1, T, S), or None where plain causality
        says it. tokens: all ids up to the last of columns, -1 for padding.
        """
        T, token = len(columns), self.config.document_token
        mask = None if cache is None else cache.mask(T)
        if token is None:
            return mask
        column = torch.arange(tokens.size(1), device=tokens.device)
        if mask is None:
            mask = column <= columns[:, None]  # (T, S)
        document = documents(tokens, self.config)  # (B, S)
        if self.config.prefix_lm:
            part = (tokens == token).cumsum(1)  # sources and targets, counted
            source = (part + document) % 2 == 0  # a document's first part is a source: both counts have grown by 1
            both_ways = (source & (document > 0))[:, None, columns, None] & (part[:, None, columns, None] == part[:, None, None])
            mask = mask | both_ways & (column <= columns[-1])
        return mask & (document[:, None, columns, None] == document[:, None, None])  # (B, 1, T, S)

    def forward(self, idx, targets=None, cache=None, return_logits=True):
        """Logits, and the mean cross-entropy if there are targets.

        idx: (B, T) token ids, T <= block_size. targets: (B, T), -1 = no loss here; without them only the last position's
        logits are computed. cache: KVCache that idx continues. return_logits=False: (None, loss), in less memory.
        Returns (logits (B, T or 1, V), loss in nats or None).
        """
        B, T = idx.shape
        past = cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} tokens do not fit into block_size = {self.config.block_size}')
        columns = torch.arange(T, device=idx.device) if cache is None else cache.columns(T)  # (T,)
        position, tokens = columns, idx
        if cache is not None:
            if cache.padding is not None:
                tokens = idx.where(columns >= cache.padding[:, None], -1)
                position = (columns - cache.padding[:, None]).clamp(min=0)  # (B, T): a row starts at 0 behind its padding
            tokens = cache.append_tokens(tokens)  # (B, S)
        mask = self.attention_mask(tokens, columns, cache)
        if self.config.ngram > 1:
            tokens = F.pad(tokens, (self.config.ngram - 1, 0), value=-1)  # nothing stands before the text
            if cache is not None:
                tokens = tokens[:, columns[0] + torch.arange(self.config.ngram - 1 + T, device=idx.device)]
        x, *others = self.embeddings(idx, position, tokens).values()
        for part in others:
            x = x + part  # (B, T, C)
        rotary = self.rotary(position)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, cache, mask, use_reentrant=False)
            else:
                x = block(x, rotary, cache, mask)
        if cache is not None:
            cache.advance(T)
        x = self.transformer.ln_f(x)

        if targets is None:
            return self.to_logits(x[:, [-1]]), None
        if not return_logits:
            return None, self._loss(x.flatten(0, 1), targets.flatten())
        logits = self.to_logits(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=self.smoothing())

    def smoothing(self):
        return self.config.label_smoothing if self.training else 0.0

    def _loss(self, x, targets):
        """Mean cross-entropy of x (N, C) for targets (N,); where all logits would be large, they never exist together."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if targets.numel() * self.config.vocab_size <= LOGITS_AT_ONCE:
            return F.cross_entropy(self.to_logits(x), targets, ignore_index=-1, label_smoothing=self.smoothing())
        return ChunkedCrossEntropy.apply(x, self.lm_head.weight, targets, self.config.logit_softcap, self.smoothing(), dtype,
                                         torch.is_grad_enabled())

    def to_logits(self, x):
        """x (..., C) behind the final norm -> logits (..., V) in fp32, softcapped if the model is."""
        logits = self.lm_head(x).float()  # softmax over a large vocabulary in bf16 loses digits
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    @torch.no_grad()
    def quantize(self):
        """Weights of matrix products in int8, for sampling; embeddings, of which few rows are read, stay as they are."""
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
        return self

    def crop_block_size(self, block_size):
        """Shorten the context: learned positions beyond block_size are dropped."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size = {block_size} is longer than the model\'s {self.config.block_size}')
        self.config.block_size = block_size
        if 'wpe' in self.transformer:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """GPT-2's weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or a local folder in Hugging Face's layout.

        override_args: only dropout, as in nanoGPT.
        """
        from checkpoint import load  # kept for nanoGPT's users; with configure_optimizers the only arrows upwards

        return load(model_type).build_model(**(override_args or {}))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """As in nanoGPT: AdamW; matrices and embeddings decay, gains and biases do not. device_type is not needed here."""
        from optimizer import adamw

        return adamw(self.parameters(), weight_decay, learning_rate, betas)

    def flops_per_token(self):
        """Floating-point operations of forward and backward: 6 N + 12 L H Q T (Chowdhery et al. 2022, PaLM, appendix B)."""
        c = self.config
        return 6 * self.num_multiplied() + 12 * c.n_layer * c.n_embd * c.block_size

    def num_multiplied(self):
        """N of that formula: the parameters but for those that are only looked up."""
        n = self.get_num_params()
        if not self.config.tie_weights:
            n -= self.transformer.wte.weight.numel()
        if self.config.ngram > 1:
            n -= self.transformer.ngram.tables.weight.numel()
        return n

    def activation_bytes(self, batch_size, half=False):
        """Bytes that a forward pass over batch_size full contexts keeps for backward, without the logits: an estimate.

        half: under autocast to 16 bits. For GPT-2's architecture it is the count of Korthikanti et al. 2022, section 4, without
        the scores, which fused attention does not keep, and with an fp32 residual stream.
        """
        c, n = self.config, 2 if half else 4
        C, kv = c.n_embd, (c.n_kv_head or c.n_head) * c.n_embd // c.n_head
        hidden = self.transformer.h[0].mlp.c_proj.in_features
        device = self.lm_head.weight.device
        written_out = writes_out(c, c.block_size, torch.bfloat16 if half else torch.float32, device)
        attention = n * (C + (3 * C if written_out else C + 2 * kv) + C)  # its input, q k v, its output
        attention += (4 + n) * (C + kv) * c.qk_norm
        if written_out:  # the softmax, and where autocast takes it in fp32, not on a CPU, a copy for the product
            attention += c.n_head * c.block_size * (n if device.type == 'cpu' else 4 + n * half)
        else:
            attention += n * (C + kv) * (c.position == 'rope')  # q and k again
        if c.document_token is not None:
            attention += c.block_size * n  # the mask as numbers
        mlp = n * (C + {'relu': 1, 'swiglu': 4}.get(c.activation, 2) * hidden)  # its input, before and after the activation
        block = attention + mlp + 2 * 4 * C + 2 * C * (c.dropout > 0)  # the inputs of both norms, the masks of both dropouts
        kept = c.n_layer * 4 * C + block if c.activation_checkpointing else c.n_layer * block
        products = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        weights = 2 * sum(p.numel() for p in products) if half else 0  # their copies in 16 bits
        return batch_size * c.block_size * (kept + (4 + n) * C) + weights

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilisation: the share of peak_flops (default: an A100's bf16) at fwdbwd_per_iter sequences in dt s."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def left_padded(self, idx, room):
        """Prompts idx -> (B lists, their ids (B, longest + room), the columns in which they begin (B,)). Raises ValueError."""
        device = self.transformer.wte.weight.device
        rows = [row.tolist() if isinstance(row, torch.Tensor) else row for row in idx]
        lengths = [len(row) for row in rows]
        if not lengths or min(lengths) == 0:
            raise ValueError('generate needs at least one token to continue')
        if max(max(row) for row in rows) >= self.config.vocab_size:
            raise ValueError(f'a token id is not below vocab_size = {self.config.vocab_size}')
        longest = max(lengths)
        tokens = torch.zeros(len(lengths), longest + room, dtype=torch.long, device=device)
        for b, row in enumerate(rows):
            tokens[b, longest - lengths[b]:longest] = torch.tensor(row, device=device)
        return rows, tokens, torch.tensor([longest - n for n in lengths], device=device)

    def cache_dtype(self):
        weight = self.transformer.wte.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, *, stop_tokens=(), **options):
        """Continue idx by max_new_tokens tokens; options as in `stream`.

        idx: (B, T) ids -> (B, T + new); or a list of B lists of unequal length -> a list of B lists.
        stop_tokens: a row ends with the first of these it draws (in a tensor the rest of that row repeats it); all rows
        ended: generation ends.
        """
        steps, stops = [], torch.tensor(list(stop_tokens), dtype=torch.long, device=self.transformer.wte.weight.device)
        ended = torch.zeros(len(idx), dtype=torch.bool, device=stops.device)
        for tokens in self.stream(idx, max_new_tokens, temperature, top_k, **options):
            steps.append(tokens)
            if stop_tokens:
                ended |= torch.isin(tokens, stops)
            if stop_tokens and (ended.device.type != 'cuda' or len(steps) % 16 == 0) and ended.all():  # a look at a GPU waits
                break
        rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in idx]  # B lists of new tokens
        for b, row in enumerate(rows):
            rows[b] = row[:next((i + 1 for i, token in enumerate(row) if token in stop_tokens), None)]
        if not isinstance(idx, torch.Tensor):
            return [list(prompt) + row for prompt, row in zip(idx, rows)]
        longest = max((len(row) for row in rows), default=0)
        new = [row + row[-1:] * (longest - len(row)) for row in rows]
        return torch.cat((idx, torch.tensor(new, dtype=idx.dtype, device=idx.device).view(len(rows), longest)), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, *, top_p=None, min_p=None, repetition_penalty=1.0,
               seed=None, slide=1, use_cache=True, vocab_size=None, compile=False):
        """Yield the next token of every row, (B,), max_new_tokens times: read the prompt once, then one token a step.

        Rows with the same prompt share its reading. compile: the step of one token is compiled, on CUDA into a graph. In fp32 a
        row's greedy tokens do not depend on the cache nor on other rows; in 16 or 8 bits rounding may tip a close choice.

        temperature 0 is greedy; top_k, top_p, min_p and repetition_penalty as in `sample_next`. seed: draws from a
        generator of its own; None: the global one. vocab_size: ids from here on (padding) are never drawn.

        Past block_size the window slides: the tokens that stay are read anew at positions 0, 1, ..., which is right for
        learned and for rotary positions alike, since the keys of deeper layers have seen tokens that left the window.
        slide=1 moves it by one token a step: each token is drawn given the last block_size ones, exactly as nanoGPT does.
        slide=n moves it by n tokens every n steps, n times faster; the context is then never below block_size - n + 1. The
        rows of a batch move together, when the longest of them fills the window.
        """
        device = self.transformer.wte.weight.device
        block_size = self.config.block_size
        if not 1 <= slide <= block_size:
            raise ValueError(f'slide = {slide} must be from 1 to block_size = {block_size}')
        rows, tokens, start = self.left_padded(idx, max_new_tokens)
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        seen = None
        if repetition_penalty != 1.0:
            seen = torch.zeros(len(lengths), self.config.vocab_size, dtype=torch.bool, device=device)  # (B, V)
            for b, row in enumerate(rows):
                seen[b, torch.tensor(row, device=device)] = True

        dtype = self.cache_dtype()
        prompts = {}  # each different one: its number
        which = [prompts.setdefault(tuple(row), len(prompts)) for row in rows]  # B numbers
        readers = [which.index(number) for number in prompts.values()]  # the rows that read a prompt for all that share it
        step = torch.compile(self, dynamic=False, mode='reduce-overhead') if compile else self
        was_training = self.training
        self.eval()
        cache, first = None, max(0, longest - block_size)  # the window is tokens[:, first:end]
        try:
            for end in range(longest, longest + max_new_tokens):
                if end - first > block_size:
                    cache, first = None, end - (block_size - slide + 1)
                if cache is None or not use_cache:
                    shared = end == longest and len(readers) < len(rows)
                    part = readers if shared else slice(None)
                    padding = (start[part] - first).clamp(min=0) if first < longest - min(lengths) else None
                    size = block_size if compile else min(block_size, longest + max_new_tokens - first)
                    cache = KVCache(self.config, len(tokens[part]), size, device, dtype, padding, static=compile)
                    logits, _ = self(tokens[part, first:end], cache=cache)
                    if shared:
                        logits, cache = logits[which], cache.rows(which)
                    if compile:
                        cache.keep_in_place()
                else:
                    logits, _ = step(tokens[:, end - 1:end], cache=cache)
                logits = logits[:, -1, :vocab_size]
                following = sample_next(logits, temperature, top_k, top_p, min_p, repetition_penalty,
                                        None if seen is None else seen[:, :vocab_size], generator)  # (B,)
                tokens[:, end] = following
                if seen is not None:
                    seen.scatter_(1, following[:, None], True)
                yield following
        finally:
            self.train(was_training)

    @torch.no_grad()
    def beam_search(self, idx, max_new_tokens, num_beams=4, length_penalty=0.6, *, stop_tokens=(), vocab_size=None):
        """Likely continuations of B prompts: of all one token longer, the num_beams likeliest are kept, step by step.

        idx: B prompts, which may differ in length; they and max_new_tokens must fit into block_size. A continuation that ends,
        with one of stop_tokens, leaves the search for the results, and its place stays empty (Sutskever et al. 2014, section
        3.2): one beam is greedy. -> for each prompt num_beams times (new tokens, score), or fewer if there are no more, best
        first: score = log p / ((5 + length) / 6)^length_penalty (Wu et al. 2016, equation 14).
        """
        rows, tokens, start = self.left_padded(idx, 0)
        B, longest, K = len(rows), tokens.size(1), num_beams
        V = vocab_size or self.config.vocab_size
        if longest + max_new_tokens > self.config.block_size:
            raise ValueError(f'{longest} tokens and max_new_tokens = {max_new_tokens} do not fit into block_size = '
                             f'{self.config.block_size}')
        stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=tokens.device)
        padding = start if start.any() else None
        was_training = self.training
        self.eval()
        try:
            cache = KVCache(self.config, B, longest + max_new_tokens, tokens.device, self.cache_dtype(), padding)
            logits = self(tokens, cache=cache)[0][:, -1, :V].repeat_interleave(K, 0)  # (B K, V)
            cache, spare = cache.rows(torch.arange(B, device=tokens.device).repeat_interleave(K)), None
            scores = logits.new_full((B, K), -math.inf)  # log p of what each beam has written
            scores[:, 0] = 0.0  # all beams are the prompt as yet: one of them counts
            written = tokens.new_zeros(B, K, 0)
            results = [[] for _ in rows]
            for length in range(1, max_new_tokens + 1):
                scores, which = (scores[..., None] + logits.log_softmax(-1).view(B, K, V)).flatten(1).topk(K)  # (B, K)
                beam, token = which // V, which % V
                written = torch.cat((written.gather(1, beam[..., None].expand_as(written)), token[..., None]), dim=2)
                ended = torch.isin(token, stops) if length < max_new_tokens else torch.ones_like(token, dtype=torch.bool)
                places = torch.tensor([K - len(result) for result in results], device=tokens.device)[:, None]
                scores = scores.masked_fill(torch.arange(K, device=tokens.device) >= places, -math.inf)
                found = (ended & scores.isfinite()).nonzero(as_tuple=True)  # one look at the device for all prompts
                for b, ids, score in zip(found[0].tolist(), written[found].tolist(), scores[found].tolist()):
                    results[b].append((ids, score / ((5 + length) / 6) ** length_penalty))
                scores = scores.masked_fill(ended, -math.inf)
                if length == max_new_tokens or not scores.isfinite().any():
                    break
                places = (torch.arange(B, device=beam.device)[:, None] * K + beam).flatten()
                cache, spare = cache.rows(places, spare), cache  # two that take turns: a new one each time costs page faults
                logits = self(token.view(-1, 1), cache=cache)[0][:, -1, :V]
        finally:
            self.train(was_training)
        return [sorted(result, key=lambda found: -found[1]) for result in results]


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, seen=None):
    """Logits (B, V) after, in this order:

    repetition_penalty r: logits of tokens seen (B, V bool) are divided by r if positive, else multiplied (Keskar 2019, CTRL);
    temperature: logits / temperature; top_k: only the k most likely tokens (ties with the k-th stay, as in nanoGPT);
    top_p: the fewest most likely tokens that hold at least top_p of the mass (Holtzman 2019, nucleus);
    min_p: tokens at least min_p times as likely as the likeliest (Nguyen 2024).
    """
    if seen is not None:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    # the largest becomes 0, so that nothing overflows, and no temperature rounds to 0
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.size(-1):
        kth = torch.topk(logits, top_k).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # the mass before this token is enough; never true of the first
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), float('-inf'))
    if min_p is not None and min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), float('-inf'))  # the likeliest has logit 0
    return logits


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, seen=None, generator=None):
    """Draw one token for each row of logits (B, V) -> (B,); temperature 0 takes the likeliest. Options as in filter_logits."""
    if temperature == 0:
        return filter_logits(logits, 1.0, repetition_penalty=repetition_penalty, seen=seen).argmax(dim=-1)
    logits = filter_logits(logits, temperature, top_k, top_p, min_p, repetition_penalty, seen)
    if logits.device.type != 'cpu':
        return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)
    # multinomial draws a number for each token of the vocabulary, which on a CPU takes as long as a layer: here one is drawn for
    # each row, and the token is the first at which the probabilities so far exceed it
    below = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # (B, V)
    if not below[:, -1].isfinite().all():
        raise ValueError('the logits are not finite: nothing can be drawn from them')
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, drawn, right=True).squeeze(1)
