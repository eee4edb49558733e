"""Estimate the memory of a training step before anything is allocated."""
import torch

from lib.device import math_attention_is_faster, total_memory
from lib.loss import MAX_LOGITS
from optimizer import MUON_MAX_NUMEL, block_matrices, muon_matrices, state_bytes


def activation_bytes(model, batch_size, half=False):
    """Bytes that a forward pass over batch_size full contexts keeps for backward, without logits.

    half: under autocast to 16 bits. For GPT-2: Korthikanti et al. 2022, section 4, without scores,
    which fused attention does not keep, and with an fp32 residual stream.
    """
    c, n = model.config, 2 if half else 4
    C, kv = c.n_embd, (c.n_kv_head or c.n_head) * c.n_embd // c.n_head
    device = model.lm_head.weight.device
    dtype = torch.bfloat16 if half else torch.float32
    math = c.attention == 'math' or math_attention_is_faster(device, dtype, c.block_size)
    attention = n * (C + (3 * C if math else C + 2 * kv) + C)  # its input; q, k, v; its output
    attention += (4 + n) * (C + kv) * c.qk_norm
    if math:
        # the softmax; where autocast computes it in fp32 (not on a CPU), also a copy in 16 bits
        attention += c.n_head * c.block_size * (n if device.type == 'cpu' else 4 + n * half)
    else:
        attention += n * (C + kv) * (c.position == 'rope')  # q and k again
    if c.eot_token is not None:
        attention += c.block_size * n  # the mask, converted to numbers
    hidden = model.transformer.h[0].mlp.c_proj.in_features
    # the MLP's input, before and after its activation
    mlp = n * (C + {'relu': 1, 'swiglu': 4}.get(c.activation, 2) * hidden)
    # the inputs of both norms, the masks of both dropouts
    block = attention + mlp + 2 * 4 * C + 2 * C * (c.dropout > 0)
    blocks = c.n_layer * 4 * C + block if c.activation_checkpointing else c.n_layer * block
    weights = 0  # their copies in 16 bits
    if half:
        weights = 2 * sum(module.weight.numel() for module in model.modules()
                          if isinstance(module, torch.nn.Linear))
    return batch_size * c.block_size * (blocks + (4 + n) * C) + weights


def step_bytes(model, config, half, parallel=None, world_size=1):
    """{part: bytes} at the peak of a step in each process. parallel: 'ddp', 'fsdp' or None."""
    n, size = model.get_num_params(False), 2 if half else 4
    weights, gradients, state = 4 * n, 4 * n, state_bytes(model, config)
    activations = activation_bytes(model, config.batch_size, half)
    tokens = config.batch_size * config.block_size
    # gradients before and after an MLP's activation, and of the residual stream
    hidden = model.transformer.h[0].mlp.c_proj.in_features
    backward = tokens * (2 * size * hidden + 2 * 4 * model.config.n_embd)
    # per logit: log-softmax and its gradient in fp32, and the 16 bits from which it came
    per_logit = 8 + 2 * half
    logits = tokens * model.config.vocab_size * per_logit
    if logits > MAX_LOGITS * per_logit:  # in chunks, and the gradient of the head
        logits = MAX_LOGITS * per_logit + (4 + 2 * half) * model.lm_head.weight.numel()
    accumulating = config.gradient_accumulation_steps > world_size
    if parallel == 'ddp' and accumulating:
        gradients *= 2  # the sums, and the buckets in which they are reduced
    if parallel == 'fsdp':
        # shards, and for a time whole: embeddings and head, the running block and the next one
        in_blocks = sum(p.numel() for p in block_matrices(model))
        block, rest = in_blocks // len(model.transformer.h), n - in_blocks
        weights = weights // world_size + 4 * rest + 2 * size * block
        state = state // world_size
        if not accumulating:  # else they are summed whole, and reduced at the end
            gradients = gradients // world_size + 4 * rest + 4 * block
        if half:
            activations -= 2 * in_blocks  # the copies in 16 bits are the gathered weights
    # Muon holds about five copies of the matrices it orthogonalizes together, after backward
    muon = 0
    shapes = [p.shape for p in muon_matrices(model, config)]
    for shape in set(shapes):
        together = min(shapes.count(shape) * shape.numel(), max(MUON_MAX_NUMEL, shape.numel()))
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
