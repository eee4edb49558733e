"""Cross-entropy of a large vocabulary, in chunks: the full logits are never materialized."""
import math

import torch
from torch.nn import functional as F

MAX_LOGITS = 2**24  # logits that exist at once: 32 MB in bf16
MAX_FP32 = 2**21  # on a CPU in fp32 at once: 8 MB, which a cache holds
PAD_VOCAB_TO = {'cuda': 128}  # tensor cores want full tiles: nanoGPT pads 50257 to 50304 for that


def softcap(logits, cap):
    """cap * tanh(logits / cap) (Gemma 2, 2024); cap = 0: off."""
    return cap * torch.tanh(logits / cap) if cap else logits


def max_logits(gpu_memory):
    """How many logits exist at once, at 10 bytes each: in a sixteenth of a GPU's memory. None: not
    a GPU."""
    return MAX_LOGITS if gpu_memory is None else gpu_memory // 160


def needs_chunks(n_tokens, vocab_size, device, at_once):
    """Whether the logits of so many tokens are too many to exist at once, or need padding."""
    return n_tokens * vocab_size > at_once or vocab_size % PAD_VOCAB_TO.get(device.type, 1) > 0


def mm_fp32(a, b):
    """a @ b. On CUDA in fp32 from products in 16 bits: fp16 sums over many tokens overflow."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def cross_entropy(logits, targets, cap, smoothing, needs_grad):
    """(sum of the losses, gradients (n, V) or None) of logits (n, V) before the softcap, in fp32.
    targets: (n,), -1 = ignored."""
    target = targets.clamp(min=0)[:, None]  # (n, 1)
    counts = (targets >= 0)[:, None]  # (n, 1)
    logits = logits.to(torch.float32, copy=True)
    slope = 1.0  # d softcap / d logits
    if cap:
        logits = logits.div_(cap).tanh_()
        slope = 1 - logits.square()
        logits *= cap
    logp = logits.sub_(logits.logsumexp(dim=-1, keepdim=True))  # in place
    loss = -(1 - smoothing) * (logp.gather(1, target) * counts).sum()
    if smoothing:
        loss -= smoothing * (logp.mean(dim=1, keepdim=True) * counts).sum()
    if not needs_grad:
        return loss, None
    # the gradient of cross-entropy w.r.t. its logits is p - target distribution
    gradient = logp.exp_()
    if smoothing:
        gradient -= smoothing / logits.size(1)
    ones = torch.full_like(target, smoothing - 1, dtype=gradient.dtype)
    return loss, gradient.scatter_add_(1, target, ones).mul_(counts * slope)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcap(x W^T), one chunk of logits at a time.

    Forward computes the gradients too, while it has the logits (Liger Kernel, Hsu et al. 2024).
    x: (N, C); weight: (V, C); targets: (N,), -1 = ignored. Matrix products are in dtype, the rest
    in fp32. needs_grad: False during evaluation.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, smoothing, at_once, dtype, needs_grad):
        V = len(weight)
        n_chunks = math.ceil(len(x) * V / at_once)
        is_cpu = x.device.type == 'cpu'
        n_rows = max(1, MAX_FP32 // V) if is_cpu else len(x)
        # a CPU adds bf16 to fp32 through a temporary copy: keep that small
        dw_rows = 2**12 if is_cpu else V
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight) if needs_grad and weight.requires_grad else None
        w = weight.to(dtype)
        padding = -V % PAD_VOCAB_TO.get(x.device.type, 1)
        if padding:  # pad this copy, not the parameter: checkpoints keep the vocabulary as it is
            w = F.pad(w, (0, 0, 0, padding))  # (V + padding, C)
        chunks = (t.tensor_split(n_chunks) for t in (x.to(dtype), targets, dx))
        for x_i, targets_i, dx_i in zip(*chunks):
            # logits, replaced by their gradients; 0 in the padding, where w is 0
            dlogits = F.linear(x_i, w)  # (n, V + padding)
            for rows, targets_j in zip(dlogits.split(n_rows), targets_i.split(n_rows)):
                loss_j, gradient = cross_entropy(rows[:, :V], targets_j, cap, smoothing, needs_grad)
                loss += loss_j
                if needs_grad:
                    rows[:, :V] = gradient
            if not needs_grad:
                continue
            if dw is not None:  # None: a frozen head
                for dw_j, dlogits_j in zip(dw.split(dw_rows), dlogits[:, :V].T.split(dw_rows)):
                    dw_j += mm_fp32(dlogits_j, x_i)
            dx_i.copy_(dlogits @ w)
        n = (targets >= 0).sum()
        ctx.save_for_backward(dx, dw, n)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        dx, dw, n = ctx.saved_tensors
        dw = None if dw is None else dw.mul_(grad / n)
        return dx * (grad / n), dw, None, None, None, None, None, None


def chunked_cross_entropy(x, weight, targets, cap=0.0, smoothing=0.0, at_once=MAX_LOGITS):
    """Mean loss in nats of hidden states x (N, C) through the head weight (V, C). targets: (N,), -1
    = ignored. cap: softcap. smoothing: label smoothing. at_once: logits of a chunk."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return ChunkedCrossEntropy.apply(x, weight, targets, cap, smoothing, at_once, dtype,
                                     torch.is_grad_enabled())


def embed_with_head(model, idx):
    """(wte(idx), weight of the head) for a step that ends in chunked_cross_entropy."""
    wte, head = model.transformer.wte, model.lm_head.weight
    if head is wte.weight and not torch.compiler.is_compiling():
        return TiedEmbedding.apply(idx, head)
    return wte(idx), head


class TiedEmbedding(torch.autograd.Function):
    """(embeddings of idx, weight (V, C)) of tied weights. Backward adds the gradient of the
    embeddings to the head's, where autograd would make a second (V, C) tensor."""

    @staticmethod
    def forward(ctx, idx, weight):
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, dx, dweight):
        idx, = ctx.saved_tensors
        return None, dweight.index_add_(0, idx.flatten(), dx.flatten(0, 1).type_as(dweight))
