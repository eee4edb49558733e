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
    if means is None:
        means = (trace.mixed[:, b].mean(dim=2), trace.post[:, b].mean(dim=1))
    T = target.size(0)
    position = torch.arange(T, device=target.device)
    rotary = model.rotary(position)
    mask = trace.mask[b][None, None]  # (1, 1, T, T)

    def measure(logits):
        """logits (T, V) -> (-log p, logit) of the target, each (T,)."""
        logits = logits[:, :vocab_size]
        loss = F.cross_entropy(logits, target, reduction='none')
        return loss, logits.gather(1, target[:, None])[:, 0]

    loss, logit = measure(trace.logits[b])
    losses = []
    logits = []
    for layer, block in enumerate(model.transformer.h):
        swap = Replacement(model, means[0][layer], means[1][layer])
        x = trace.residual[layer, b].expand(swap.rows, -1, -1)
        handles = [block.attn.c_proj.register_forward_pre_hook(swap.heads),
                   block.mlp.c_proj.register_forward_pre_hook(swap.mlp)]
        try:
            x = block(x, rotary, mask)
        finally:
            for handle in handles:
                handle.remove()
        for later in model.transformer.h[layer + 1:]:
            x = later(x, rotary, mask)
        # not all of (rows, T, V) at once
        rows = [measure(model.to_logits(model.transformer.ln_f(row))) for row in x]
        losses.append(torch.stack([row[0] - loss for row in rows]).unflatten(0, (2, -1)))
        logits.append(torch.stack([row[1] - logit for row in rows]).unflatten(0, (2, -1)))
    return torch.stack(losses, dim=1), torch.stack(logits, dim=1)


class Replacement:
    """Hooks on the output projections of a block over a batch with one part replaced in each row:
    head 0, 1, ... and the MLP by zeros, then the same by their means."""

    def __init__(self, model, head_means, mlp_mean):
        """head_means: (nh, hs); mlp_mean: (F,)."""
        self.n_head = model.config.n_head
        self.rows = len(KINDS) * (self.n_head + 1)
        self.by_head = torch.stack((torch.zeros_like(head_means), head_means))  # (2, nh, hs)
        self.by_mlp = torch.stack((torch.zeros_like(mlp_mean), mlp_mean))  # (2, F)

    def heads(self, module, args):
        mixed = args[0].unflatten(0, (2, -1)).unflatten(-1, (self.n_head, -1)).clone()
        for head in range(self.n_head):
            mixed[:, head, :, head] = self.by_head[:, None, head]  # (2, T, hs)
        return mixed.flatten(-2).flatten(0, 1)

    def mlp(self, module, args):
        post = args[0].unflatten(0, (2, -1)).clone()
        post[:, -1] = self.by_mlp[:, None]
        return post.flatten(0, 1)


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
