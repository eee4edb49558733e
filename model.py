"""A decoder-only Transformer (GPT): the whole architecture, in the order in which a token meets it.

Sources: Vaswani et al. 2017 (attention, sinusoidal positions), Radford et al. 2019 (GPT-2, the
default architecture) and nanoGPT, whose names and API are kept. GPTConfig (configurator.py) names
the source of every other choice. Generation with a KV cache is in lib/generation.py.

Letters in shapes: B sequences, T tokens, C = n_embd, nh query heads, nkv key/value heads,
hs = head size (C / nh), S keys, V = vocab_size.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from configurator import GPTConfig
from lib import generation, huggingface
from lib.linear import LayerNorm, Linear, RMSNorm, make_embedding
from lib.loss import (
    MAX_LOGITS,
    chunked_cross_entropy,
    embed_with_head,
    needs_chunks,
    softcap,
)
from lib.ngram import NgramEmbedding
from lib.pairs import document_numbers, source_parts
from optimizer import adamw

# Positions ---------------------------------------------------------------------------------------

def position_angles(position, dim, theta=10000.0):
    """position / theta^(2i/dim) (Vaswani et al. 2017, 3.5). (..., T) -> (..., T, dim/2), fp32"""
    i = torch.arange(0, dim, 2, device=position.device, dtype=torch.float32)
    frequency = theta ** (-i / dim)
    return position.float()[..., None] * frequency


def sinusoidal_embedding(position, dim):
    """sin in even, cos in odd dimensions (Vaswani et al. 2017, 3.5). (..., T) -> (..., T, dim)"""
    angles = position_angles(position, dim)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def apply_rotary(x, cos, sin):
    """Rotate each pair (x_i, x_{i + hs/2}) by the i-th angle (Su et al. 2021; GPT-NeoX's pairing).
    x: (B, heads, T, hs); cos, sin: (1 or B, 1, T, hs/2), fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


# Attention ---------------------------------------------------------------------------------------

def sdpa(q, k, v, mask=None, dropout=0.0):
    """softmax(QK^T / sqrt(hs)) V by PyTorch's fused kernels (flash attention on CUDA).

    q: (B, nh, T, hs); k, v: (B, nkv, S, hs) -> (B, nh, T, hs). mask: True where a query sees a key,
    or a BlockMask; None: causal if T > 1, no mask if T = 1 (decoding with a cache).
    """
    gqa = k.size(1) != q.size(1)
    if mask is not None and not isinstance(mask, torch.Tensor):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=mask is None and q.size(2) > 1, enable_gqa=gqa)


def math_attention(q, k, v, mask=None, dropout=0.0):
    """The same as sdpa, written out (Vaswani et al. 2017, equation 1)."""
    B, nh, T, hs = q.shape
    if k.size(1) != nh:  # grouped queries: each key/value head serves nh / nkv query heads
        k = k.repeat_interleave(nh // k.size(1), dim=1)  # (B, nh, S, hs)
        v = v.repeat_interleave(nh // v.size(1), dim=1)  # (B, nh, S, hs)
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, S)
    if mask is None and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float('-inf'))
    weights = F.softmax(scores, dim=-1)  # each row sums to 1
    return F.dropout(weights, dropout).type_as(v) @ v  # (B, nh, T, hs)


class CausalSelfAttention(nn.Module):
    """Masked multi-head self-attention (Vaswani et al. 2017, 3.2). (B, T, C) -> (B, T, C)"""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer  # the KV cache keeps keys and values per layer
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_size = config.head_dim
        self.qk_norm = bool(config.qk_norm)
        self.dropout = config.dropout
        # queries, keys and values of all heads in one matrix product
        n_out = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = Linear(config.n_embd, n_out, bias=config.bias)
        self.c_proj = Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        if self.qk_norm:
            gain = config.qk_norm == 'gain'
            self.q_norm = RMSNorm(self.head_size, config.norm_eps, elementwise_affine=gain)
            self.k_norm = RMSNorm(self.head_size, config.norm_eps, elementwise_affine=gain)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.attend = math_attention if config.attention == 'math' else sdpa
        self.attend_in_training = self.attend  # see GPT.train_with_math_attention

    def project(self, x, rotary=None):
        """x (B, T, C) -> q (B, nh, T, hs), k, v (B, nkv, T, hs), after QK-norm and RoPE."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return q, k, v

    def forward(self, x, rotary=None, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, nkv, S, hs)
        attend = self.attend_in_training if self.training else self.attend
        y = attend(q.type_as(k), k, v, mask, self.dropout if self.training else 0.0)
        if cache is not None:
            y = y.type_as(x)  # the cache may have another dtype
        y = y.transpose(1, 2).reshape(B, T, -1)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


# Blocks ------------------------------------------------------------------------------------------

class MLP(nn.Module):
    """The position-wise feed-forward network (Vaswani et al. 2017, 3.3)."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        n_out = config.mlp_width
        if config.activation == 'swiglu':
            n_out *= 2  # gates, then values
        self.c_fc = Linear(config.n_embd, n_out, bias=config.bias)
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def activate(self, x):
        """(B, T, n_out) -> (B, T, hidden); for swiglu n_out = 2 hidden: gates, then values."""
        if self.activation == 'gelu':
            return F.gelu(x)
        if self.activation == 'gelu_tanh':
            return F.gelu(x, approximate='tanh')
        if self.activation == 'relu':
            return F.relu(x)
        if self.activation == 'relu2':  # So et al. 2021, Primer
            return F.relu(x).square()
        if self.activation == 'swiglu':  # Shazeer 2020
            gate, x = x.chunk(2, dim=-1)
            return F.silu(gate) * x
        raise NotImplementedError(f'activation = {self.activation} has no branch in MLP.activate')

    def forward(self, x):
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))


def make_norm(config):
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream. Pre-norm (GPT-2) normalizes their
    input, post-norm (Vaswani et al. 2017, 3.1) the sum."""

    def __init__(self, config, layer):
        super().__init__()
        self.post_norm = config.norm_position == 'post'
        self.activation_checkpointing = config.activation_checkpointing
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, *args):
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.add_layers, *args, use_reentrant=False)
        return self.add_layers(*args)

    def add_layers(self, x, rotary=None, mask=None, cache=None):
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, rotary, mask, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), rotary, mask, cache)
        return x + self.mlp(self.ln_2(x))


# The model ---------------------------------------------------------------------------------------

class GPT(nn.Module):
    """nanoGPT's API and parameter names.

        model = GPT(GPTConfig(n_layer=2))
        logits, loss = model(idx, targets)  # idx, targets (B, T) -> (B, T, V), scalar
        logits, _ = model(idx)              # last position only: (B, 1, V)
        tokens = model.generate(idx, 100)   # (B, T + 100)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_logits = MAX_LOGITS  # train.py sets it to what fits the GPU
        self.decoders = {}  # compiled decoding steps (lib/generation.py)
        with torch.device('meta'):  # no default init: allocated below, filled by init_weight
            parts = {'wte': make_embedding(config.vocab_size, config.n_embd)}
            if config.ngram > 1:
                parts['ngram'] = NgramEmbedding(config)
            if config.position == 'learned':
                parts['wpe'] = make_embedding(config.block_size, config.n_embd)
            parts['drop'] = nn.Dropout(config.dropout)
            parts['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            parts['ln_f'] = make_norm(config) if config.norm_position == 'pre' else nn.Identity()
            self.transformer = nn.ModuleDict(parts)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        device = torch.get_default_device()
        if device.type != 'meta':
            # to_empty would import SymPy: half a second, 39 MB
            self._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=device))
        for name, _ in self.named_buffers():
            raise NotImplementedError(f'{name}: a buffer has no values here; compute it in forward')
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        if device.type != 'meta':
            for name, p in self.named_parameters():
                self.init_weight(name, p)

    @torch.no_grad()
    def init_weight(self, name, p):
        """Initialize the parameter p of that name as GPT-2 does (Radford et al. 2019, 2.3)."""
        std = 0.02
        if name.endswith('c_proj.weight'):
            # 2 n_layer projections add to the residual stream: its variance stays the same
            std /= math.sqrt(2 * self.config.n_layer)
            if self.config.zero_init:
                std = 0.0
        if p.dim() < 2 and not name.endswith(('.weight', '.bias')):
            raise NotImplementedError(f'{name}: give it its initial value in GPT.init_weight')
        if p.dim() == 1:
            p.fill_(float(name.endswith('weight')))  # gains 1, biases 0
        elif name == 'transformer.ngram.tables.weight':
            p.zero_()
        else:
            p.normal_(std=std)

    def embed(self, idx, position, tokens, token=None):
        """{'token', 'n-grams', 'position': (B, T, C) or (T, C)}, whose sum enters the first block.

        idx: (B, T). position: (B, T) or (T,). tokens: (B, ngram - 1 + T), idx and those before it.
        token: wte(idx), if it is there already.
        """
        parts = {'token': self.transformer.wte(idx) if token is None else token}
        if self.config.ngram > 1:
            parts['n-grams'] = self.transformer.ngram(tokens)
        if self.config.position == 'learned':
            parts['position'] = self.transformer.wpe(position)
        elif self.config.position == 'sinusoidal':
            C = self.config.n_embd
            # embeddings are scaled up to the size of the sinusoids (Vaswani et al. 2017, 3.4)
            parts = {name: part * math.sqrt(C) for name, part in parts.items()}
            parts['position'] = sinusoidal_embedding(position, C).type_as(parts['token'])
        return parts

    def ngram_history(self, tokens, columns):
        """The tokens of columns (T,) and ngram - 1 before them, -1 = none. (B, ngram - 1 + T)"""
        before, T = self.config.ngram - 1, columns.size(0)
        if before == 0:
            return None
        padded = F.pad(tokens, (before, 0), value=-1)
        if tokens.size(1) == T:
            return padded
        return padded[:, columns[0] + torch.arange(before + T, device=tokens.device)]

    def rotary(self, position):
        """cos and sin for apply_rotary at position (T,) or (B, T); None without RoPE."""
        if self.config.position != 'rope':
            return None
        angles = position_angles(position, self.config.head_dim, self.config.rope_theta)
        angles = angles.view(-1, 1, *angles.shape[-2:])  # (1 or B, 1, T, hs/2)
        return angles.cos(), angles.sin()

    def uses_flex_attention(self, tokens):
        """Whether masks of documents are block masks (Dong et al. 2024), which skip what no query
        sees: compiled on CUDA, where SDPA with a mask is slow, in bf16, which GPUs with enough
        shared memory have. There is no dropout for it. FSDP compiles blocks only: not there."""
        c = self.config
        return (tokens.is_cuda and torch.compiler.is_compiling()
                and torch.is_autocast_enabled('cuda')
                and torch.get_autocast_dtype('cuda') == torch.bfloat16
                and c.dropout == 0 and c.attention == 'sdpa' and c.head_dim >= 16)

    def attention_mask(self, tokens, columns, mask=None):
        """True where a query sees a key, (B or 1, 1, T, S) or a BlockMask; None: plain causality.

        tokens: (B, S), -1 = padding or not read yet. columns: (T,), the queries. mask: the cache's.
        Attention stays within a document (eot_token), and is bidirectional
        within a source (prefix_lm; Raffel et al. 2020, 3.2.1).
        """
        eot, turns = self.config.eot_token, self.config.turns
        if eot is None:
            return mask
        document = document_numbers(tokens, eot, turns)  # (B, S)
        if self.config.prefix_lm:
            is_source, part = source_parts(tokens, eot)  # (B, S)
        if mask is None and self.uses_flex_attention(tokens):
            def visible(b, head, query, key):
                sees = query >= key
                if self.config.prefix_lm:
                    sees = sees | (is_source[b, query] & (part[b, query] == part[b, key]))
                return sees & (document[b, query] == document[b, key])

            B, T = tokens.shape
            return create_block_mask(visible, B, None, T, T, device=tokens.device)
        column = torch.arange(tokens.size(1), device=tokens.device)
        if mask is None:
            mask = column <= columns[:, None]  # (T, S)
        if self.config.prefix_lm:
            same_source = is_source[:, columns, None] & (part[:, columns, None] == part[:, None])
            mask = mask | (same_source & (column <= columns[-1]))[:, None]
        return mask & (document[:, columns, None] == document[:, None])[:, None]  # (B, 1, T, S)

    def forward(self, idx, targets=None, cache=None, return_logits=True):
        """Logits, and the mean cross-entropy if there are targets.

        idx: (B, T) token ids, T <= block_size. targets: (B, T), -1 = ignored; without them only
        the last position's logits are computed. cache: a KVCache that idx continues.
        return_logits=False: (None, loss), in less memory. Returns (logits (B, T or 1, V), loss in
        nats or None). Raises ValueError if the text does not fit into block_size.
        """
        V, at_once = self.config.vocab_size, self.max_logits
        chunked = (targets is not None and not return_logits
                   and needs_chunks(targets.numel(), V, idx.device, at_once))
        token, head = embed_with_head(self, idx) if chunked else (None, None)
        tokens, columns, position, mask = generation.context(idx, cache, self.config.block_size)
        mask = self.attention_mask(tokens, columns, mask)
        rotary = self.rotary(position)
        history = self.ngram_history(tokens, columns)
        x, *others = self.embed(idx, position, history, token).values()
        for part in others:
            x = x + part  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, rotary, mask, cache)
        x = self.transformer.ln_f(x)

        if targets is None:
            return self.to_logits(x[:, -1:]), None
        smoothing = self.config.label_smoothing if self.training else 0.0
        if chunked:
            loss = chunked_cross_entropy(x.flatten(0, 1), head, targets.flatten(),
                                         self.config.logit_softcap, smoothing, at_once)
            return None, loss
        logits = self.to_logits(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               label_smoothing=smoothing)
        return (logits if return_logits else None), loss

    def to_logits(self, x):
        """x (..., C) after the final norm -> logits (..., V), fp32: bf16 is too coarse."""
        return softcap(self.lm_head(x).float(), self.config.logit_softcap)

    def train_with_math_attention(self):
        """Train with math_attention and evaluate with sdpa (device.math_attention_is_faster)."""
        for block in self.transformer.h:
            block.attn.attend_in_training = math_attention

    # nanoGPT's API -------------------------------------------------------------------------------

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Continue idx (B, T) -> (B, T + max_new_tokens); options in lib/generation.py."""
        return generation.generate(self, idx, max_new_tokens, temperature, top_k, **options)

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """'gpt2', ..., 'gpt2-xl', 'owner/name' on Hugging Face's hub, or a folder in its layout.
        override_args: {'dropout': ...}, as in nanoGPT. Raises UserError."""
        config, weights, _ = huggingface.load(model_type)
        model = cls(GPTConfig(**config | (override_args or {})))
        model.load_state_dict(weights)
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type=None):
        """AdamW; matrices and embeddings decay, gains and biases do not. device_type is unused."""
        return adamw(self.parameters(), weight_decay, learning_rate, betas)

    def crop_block_size(self, block_size):
        """Shorten the context: drop learned positions from block_size on. Raises ValueError."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size = {block_size} is longer than the model\'s '
                             f'{self.config.block_size}')
        self.config.block_size = block_size
        if 'wpe' in self.transformer:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding, as in nanoGPT: without learned positions."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and 'wpe' in self.transformer:
            n -= self.transformer.wpe.weight.numel()
        return n

    def num_matmul_params(self):
        """Parameters in matrix products, excluding lookup tables."""
        n = self.get_num_params()
        if not self.config.tie_weights:
            n -= self.transformer.wte.weight.numel()
        if self.config.ngram > 1:
            n -= self.transformer.ngram.tables.weight.numel()
        return n

    def flops_per_token(self):
        """FLOPs of forward and backward: 6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B), and
        4 N for frozen weights (LoRA), which need no gradients."""
        c = self.config
        per_param = 4 + 2 * self.lm_head.weight.requires_grad
        attention = 12 * c.n_layer * c.n_head * c.head_dim * c.block_size
        return per_param * self.num_matmul_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization at fwdbwd_per_iter sequences in dt seconds. peak_flops: of the
        device; the default is an A100's in bf16."""
        tokens = self.config.block_size * fwdbwd_per_iter
        return self.flops_per_token() * tokens / dt / peak_flops
