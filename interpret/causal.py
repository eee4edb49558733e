"""What each head and each MLP is worth: a forward pass for each of them, with its part replaced.

Direct logit attribution (interpret.attribute) leaves out what later layers make of a part. An
ablation does not: everything after the part is computed again (Michel et al. 2019, Are Sixteen
Heads Really Better than One?; Wang et al. 2022, Interpretability in the Wild, for means).
"""
import torch
from torch.nn import functional as F

from lib.page import to_half

KINDS = ('zero', 'mean')
MAX_FLOPS = 2e12  # of all ablations of a text: about 20 s on a few CPU cores


def ablation_flops(model, T):
    """The cost of `ablate` for a text of T tokens: a layer's ablations start at that layer."""
    config = model.config
    passes = len(KINDS) * config.n_layer * (config.n_head + 1)
    head = model.lm_head.weight.numel()
    return 2 * T * passes * (head + (model.num_matmul_params() - head) / 2)


@torch.no_grad()
def ablate(model, trace, target, means=None, b=0, vocab_size=None):
    """What changes if one head or one MLP no longer depends on the text, for one batch element.

    A part is replaced at all positions at once, in the input of its output projection (biases
    stay): by zeros, or by its mean, over the positions of this text or as given. means: (mixed
    (L, nh, hs), post (L, F)). target: (T,), the token whose loss and logit are taken at each
    position.

    Returns (losses, logits), each (2, L, nh + 1, T): kind in the order of KINDS, layer, then the
    heads and the MLP. losses is the increase of -log p(target) in nats, logits the change of its
    logit.
    """
    n_parts = model.config.n_head + 1
    parts = [(kind, part) for kind in KINDS for part in range(n_parts)]
    found = [ablate_parts(model, trace, target, layer, parts, means, b, vocab_size)
             for layer in range(model.config.n_layer)]
    losses, logits = (torch.stack(x).unflatten(1, (2, n_parts)) for x in zip(*found))
    return losses.transpose(0, 1), logits.transpose(0, 1)


@torch.no_grad()
def ablate_parts(model, trace, target, layer, parts, means=None, b=0, vocab_size=None):
    """The same for some parts of one layer, [(one of KINDS, head, or nh for the MLP)]. Returns
    (losses, logits), each (parts, T)."""
    if means is None:
        means = (trace.mixed[:, b].mean(dim=2), trace.post[:, b].mean(dim=1))
    rotary = model.rotary(torch.arange(target.size(0), device=target.device))
    mask = trace.mask[b][None, None]  # (1, 1, T, T)

    def measure(logits):
        """logits (T, V) -> (-log p, logit) of the target, each (T,)."""
        logits = logits[:, :vocab_size]
        loss = F.cross_entropy(logits, target, reduction='none')
        return loss, logits.gather(1, target[:, None])[:, 0]

    loss, logit = measure(trace.logits[b])
    swap = Replacement(model, parts, means[0][layer], means[1][layer])
    x = trace.residual[layer, b].expand(len(parts), -1, -1)
    block, *later_blocks = model.transformer.h[layer:]
    handles = [block.attn.c_proj.register_forward_pre_hook(swap.heads),
               block.mlp.c_proj.register_forward_pre_hook(swap.mlp)]
    try:
        x = block(x, rotary, mask)
    finally:
        for handle in handles:
            handle.remove()
    for later in later_blocks:
        x = later(x, rotary, mask)
    # not all of (parts, T, V) at once
    rows = [measure(model.to_logits(model.transformer.ln_f(row))) for row in x]
    return (torch.stack([row[0] - loss for row in rows]),
            torch.stack([row[1] - logit for row in rows]))


class Replacement:
    """Hooks on the output projections of a block over a batch with one part replaced in each row:
    parts as in `ablate_parts`."""

    def __init__(self, model, parts, head_means, mlp_mean):
        """head_means: (nh, hs); mlp_mean: (F,)."""
        self.n_head = model.config.n_head
        self.parts = parts
        self.head_means, self.mlp_mean = head_means, mlp_mean

    def heads(self, module, args):
        mixed = args[0].unflatten(-1, (self.n_head, -1)).clone()
        for row, (kind, part) in enumerate(self.parts):
            if part < self.n_head:
                mixed[row, :, part] = 0 if kind == 'zero' else self.head_means[part]
        return mixed.flatten(-2)

    def mlp(self, module, args):
        post = args[0].clone()
        for row, (kind, part) in enumerate(self.parts):
            if part == self.n_head:
                post[row] = 0 if kind == 'zero' else self.mlp_mean
        return post


def collect_ablations(model, trace, target, vocab_size, means=None):
    """(facts, arrays) for web/ablation.js; `ablate` says what they mean.

    facts: ablation_mean, 'text' or 'validation': where the means are taken. arrays:
    ablation_loss, ablation_logit (2, L, nh + 1, T); none of them if MAX_FLOPS does not allow it.
    """
    if ablation_flops(model, len(target)) > MAX_FLOPS:
        return {}, {}
    losses, logits = ablate(model, trace, target, means, vocab_size=vocab_size)
    facts = {'ablation_mean': 'validation' if means else 'text'}
    return facts, {'ablation_loss': to_half(losses), 'ablation_logit': to_half(logits)}
