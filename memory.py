"""What a training step takes of a device's memory, by part, before anything is allocated: for train.py and tools/plan.py."""
from device import total_memory
from model import LOGITS_AT_ONCE
from optimizer import MUON_AT_ONCE, block_matrices, muon_matrices, state_bytes


def parts(model, config, half, how=None, n=1):
    """Bytes at the peak of a step in each of n processes, by part. half: 16 bits under autocast. how: 'ddp', 'fsdp' or None."""
    count, size = model.get_num_params(False), 2 if half else 4
    weights, gradients, state = 4 * count, 4 * count, state_bytes(model, config)
    activations = model.activation_bytes(config.batch_size, half)
    # in backward, the gradients of what is on both sides of an MLP's activation, and of the residual stream
    hidden = model.transformer.h[0].mlp.c_proj.in_features
    backward = config.batch_size * config.block_size * (2 * size * hidden + 2 * 4 * model.config.n_embd)
    # of each logit: log-softmax and its gradient in fp32, and the 16 bits from which it came
    logits = config.batch_size * config.block_size * model.config.vocab_size * (8 + 2 * half)
    if logits > LOGITS_AT_ONCE * (8 + 2 * half):  # in chunks, and the gradient of the head
        logits = LOGITS_AT_ONCE * (8 + 2 * half) + (4 + 2 * half) * model.lm_head.weight.numel()
    accumulating = config.gradient_accumulation_steps > n
    if how == 'ddp' and accumulating:
        gradients *= 2  # those summed here, and the buckets in which they are exchanged
    if how == 'fsdp':  # shards, and whole for a time: embeddings and head, the block at work and the next one
        in_blocks = sum(p.numel() for p in block_matrices(model))
        block, rest = in_blocks // len(model.transformer.h), count - in_blocks
        weights, state = weights // n + 4 * rest + 2 * size * block, state // n
        if not accumulating:  # else they are summed whole, and exchanged at the end
            gradients = gradients // n + 4 * rest + 4 * block
        if half:
            activations -= 2 * in_blocks  # the copies in 16 bits are what was gathered
    # Muon's update: of the matrices of one shape that it takes at a time about five copies, when activations have gone
    shapes = [p.shape for p in muon_matrices(model, config)]
    muon = max((5.5 * 4 * min(shapes.count(s) * s.numel(), max(MUON_AT_ONCE, s.numel())) for s in set(shapes)), default=0)
    if muon > activations + backward + logits:
        return {'weights': weights, 'optimizer': state, 'gradients': gradients, "Muon's update": int(muon)}
    both = ({'gradients': gradients, 'activations': activations} if accumulating or how == 'ddp' else
            {'activations, then gradients': max(activations, gradients)})
    return {'weights': weights, 'optimizer': state, **both, 'backward': backward, 'logits': logits}


def estimate(by_part, device):
    """One line: what `parts` says, and the memory of the device."""
    there = f' of {total_memory(device) / 1e6:,.0f}' if total_memory(device) else ''
    return (f'memory: about {sum(by_part.values()) / 1e6:,.0f}{there} MB ('
            + ', '.join(f'{name} {size / 1e6:,.0f}' for name, size in by_part.items()) + ')')
