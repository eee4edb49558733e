"""Estimate memory, and refuse what cannot fit, before anything is allocated."""
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lib.device import math_attention_is_faster, total_memory
from lib.errors import plural, require
from lib.generation import cache_dtype
from lib.lora import add_lora
from lib.loss import max_logits
from model import GPT
from optimizer import MUON_MAX_NUMEL, block_matrices, muon_matrices, n_trained, state_bytes

CGROUP_LIMIT = Path('/sys/fs/cgroup/memory.max')  # of a container
BLOCK_OBJECTS = 30_000  # bytes of Python objects per block
LOSS_OBJECTS = 500  # of a micro-batch's loss


class Sizes:
    """Numbers about GPT(config) on a device, from models of one and two layers without memory: in
    milliseconds for any n_layer."""

    def __init__(self, config, device, lora_rank=0, lora_dropout=0.0):
        self.config, self.device = config, device
        self.lora_rank, self.lora_dropout = lora_rank, lora_dropout
        with torch.device('meta'):
            self.one, self.two = (GPT(replace(config, n_layer=n)) for n in (1, 2))
            if lora_rank:
                for model in (self.one, self.two):
                    add_lora(model, lora_rank, 1.0, lora_dropout)

    def of(self, number):
        """number(model), which is linear in n_layer, of the whole model."""
        first = number(self.one)
        return first + (self.config.n_layer - 1) * (number(self.two) - first)

    def n_params(self):
        return self.of(lambda model: model.get_num_params(False))

    def muon_shapes(self, config):
        """{shape: number} of the matrices that Muon trains."""
        shapes = Counter(p.shape for p in muon_matrices(self.one, config))
        return {shape: n * self.config.n_layer for shape, n in shapes.items()}


def device_memory(device):
    """Bytes of a GPU, or of main memory; None if unknown."""
    if device.type == 'cuda':
        return total_memory(device)
    try:
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    try:
        return min(memory, int(CGROUP_LIMIT.read_text('utf-8')))
    except (OSError, ValueError):  # no container, or 'max'
        return memory


def require_memory(n_bytes, device, what, remedy):
    """Raise UserError if n_bytes for `what` are more than the device has."""
    there = device_memory(device)
    require(there is None or n_bytes <= there,
            f'{what} needs about {n_bytes / 1e9:,.1f} GB, {device} has {(there or 0) / 1e9:,.1f} '
            f'GB: {remedy}')


def require_model_fits(config, device, world_size, training=True):
    """Raise UserError if weights, gradients and optimizer state of GPT(config) cannot fit."""
    n = Sizes(config, device).n_params()
    per_param = 12 / world_size if training else 4  # Muon: weight, gradient and momentum, in fp32
    require_memory(per_param * n + BLOCK_OBJECTS * config.n_layer, device,
                   f'a model of {n:,} parameters (n_layer = {config.n_layer}, n_embd = '
                   f'{config.n_embd})', 'lower --n_layer, --n_embd or --ngram_rows')


def require_batch_fits(config):
    """Raise UserError if the ids and losses of a step cannot fit into main memory."""
    ids = 4 * 8 * config.batch_size * (config.block_size + 1)  # x and y, twice
    require_memory(ids + LOSS_OBJECTS * config.gradient_accumulation_steps, torch.device('cpu'),
                   f'a step with batch_size = {config.batch_size}, block_size = '
                   f'{config.block_size} and gradient_accumulation_steps = '
                   f'{config.gradient_accumulation_steps}', 'lower them')


def require_sampling_fits(model, n_sequences, longest, max_new_tokens, n_beams=1):
    """The bytes of the KV cache and the tokens of so many sequences. Raises UserError if they do
    not fit."""
    c, weight = model.config, model.transformer.wte.weight
    size = min(c.block_size, longest + max_new_tokens)
    per_token = 2 * c.n_layer * c.kv_heads * c.head_dim * cache_dtype(model).itemsize
    caches = 1 if n_beams == 1 else 2 * n_beams
    per_sequence = caches * (size * per_token + 8 * c.vocab_size) + 8 * (longest + max_new_tokens)
    n_bytes = n_sequences * per_sequence
    require_memory(n_bytes, weight.device,
                   f'writing {plural(n_sequences, "text")} of {max_new_tokens:,} tokens at a time',
                   'lower --num_samples, --num_beams or --max_new_tokens')
    return n_bytes


def autocast_keeps_copies(device, half):
    """Whether autocast keeps copies of the weights in 16 bits for backward: see linear.Linear."""
    return half and device.type != 'cpu'


def activation_bytes(sizes, batch_size, half=False):
    """Bytes that a forward pass over batch_size full contexts keeps for backward, without logits.

    half: under autocast to 16 bits. For GPT-2: Korthikanti et al. 2022, section 4, without scores,
    which fused attention does not keep, and with an fp32 residual stream.
    """
    c, n = sizes.config, 2 if half else 4
    C, q, kv = c.n_embd, c.n_head * c.head_dim, c.kv_heads * c.head_dim
    device = sizes.device
    dtype = torch.bfloat16 if half else torch.float32
    math = c.attention == 'math' or math_attention_is_faster(device, dtype, c.block_size)
    attention = n * (C + (3 * q if math else q + 2 * kv) + q)  # its input; q, k, v; its output
    if c.qk_norm:
        attention += (4 + n + n * (c.qk_norm == 'gain')) * (q + kv)
    if math:
        # the softmax; where autocast computes it in fp32 (not on a CPU), also a copy in 16 bits
        attention += c.n_head * c.block_size * (n if device.type == 'cpu' else 4 + n * half)
    else:
        attention += n * (q + kv) * (c.position == 'rope' and not c.qk_norm)  # q and k again
    if c.eot_token is not None:
        attention += c.block_size * n  # the mask, converted to numbers
    hidden = c.mlp_width
    # the MLP's input, before and after its activation
    mlp = n * (C + {'relu': 1, 'swiglu': 4}.get(c.activation, 2) * hidden)
    # the inputs of both norms, the masks of both dropouts
    block = attention + mlp + 2 * 4 * C + 2 * C * (c.dropout > 0)
    block += 4 * n * sizes.lora_rank  # A x of its four matrices, and the masks of x
    if sizes.lora_rank and sizes.lora_dropout:
        block += (n if device.type == 'cpu' else 1) * (2 * C + q + hidden)
    blocks = c.n_layer * 4 * C + block if c.activation_checkpointing else c.n_layer * block
    weights = 0
    if autocast_keeps_copies(device, half):
        weights = 2 * sizes.of(lambda model: sum(module.weight.numel() for module in model.modules()
                                                 if isinstance(module, torch.nn.Linear)))
    return batch_size * c.block_size * (blocks + (4 + n) * C) + weights


def step_bytes(sizes, config, half, parallel=None, world_size=1, gpu_memory=None):
    """{part: bytes} at the peak of a step in each process. parallel: 'ddp', 'fsdp' or None."""
    n, trained, size = sizes.n_params(), sizes.of(n_trained), 2 if half else 4
    weights, gradients = 4 * n, 4 * trained
    state = sizes.of(lambda model: state_bytes(model, config))
    activations = activation_bytes(sizes, config.batch_size, half)
    tokens = config.batch_size * config.block_size
    # gradients before and after an MLP's activation, and of the residual stream
    hidden = sizes.config.mlp_width
    backward = tokens * (2 * size * hidden + 2 * 4 * sizes.config.n_embd)
    # per logit: log-softmax and its gradient in fp32, and the 16 bits from which it came
    per_logit = 8 + 2 * half
    logits = tokens * sizes.config.vocab_size * per_logit
    at_once = max_logits(gpu_memory)
    if logits > at_once * per_logit:  # in chunks, and the gradient of the head
        head = sizes.one.lm_head.weight
        logits = at_once * per_logit + (4 * head.requires_grad + 2 * half) * head.numel()
    accumulating = config.gradient_accumulation_steps > world_size
    if parallel == 'ddp' and accumulating:
        gradients *= 2  # the sums, and the buckets in which they are reduced
    if parallel == 'fsdp':
        # shards, and for a time whole: embeddings and head, the running block and the next one
        block = sum(p.numel() for p in block_matrices(sizes.one))
        in_blocks = block * sizes.config.n_layer
        rest = n - in_blocks
        weights = weights // world_size + 4 * rest + 2 * size * block
        state = state // world_size
        gradients = gradients // world_size + 4 * (rest + block) * trained // n
        if autocast_keeps_copies(sizes.device, half):
            activations -= 2 * in_blocks  # the copies in 16 bits are the gathered weights
    # Muon holds about five copies of the matrices it orthogonalizes together, after backward
    muon = 0
    for shape, count in sizes.muon_shapes(config).items():
        at_once = max(MUON_MAX_NUMEL, shape.numel()) * world_size  # each has its share
        together = min(count * shape.numel(), at_once)
        muon = max(muon, int(5.5 * 4 * together))
    parts = {'weights': weights, 'optimizer': state}
    if muon > activations + backward + logits:
        return parts | {'gradients': gradients, "Muon's update": muon}
    if accumulating or parallel == 'ddp':
        parts |= {'gradients': gradients, 'activations': activations}
    else:
        parts['activations, then gradients'] = max(activations, gradients)
    return parts | {'backward': backward, 'logits': logits}


def describe_memory(parts, device):
    """One line: step_bytes, and the memory of the device."""
    there = f' of {total_memory(device) / 1e6:,.0f}' if total_memory(device) else ''
    listed = ', '.join(f'{name} {size / 1e6:,.0f}' for name, size in parts.items())
    return f'memory: about {sum(parts.values()) / 1e6:,.0f}{there} MB ({listed})'
