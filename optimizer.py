"""The optimizer's parameter groups and the learning-rate schedules."""
import math

import torch


def adamw(model, weight_decay, learning_rate, betas, device_type):
    """AdamW (Loshchilov & Hutter 2019) in two groups: what decays and what does not.

    The groups keep nanoGPT's order, so that the optimizer state of its checkpoints loads.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]  # weights of Linear and Embedding
    no_decay = [p for p in params if p.dim() < 2]  # biases, gains of the norms
    groups = [{'params': decay, 'weight_decay': weight_decay}, {'params': no_decay, 'weight_decay': 0.0}]
    fused = device_type in ('cuda', 'cpu', 'mps')  # one kernel for all tensors
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def learning_rate_at(step, config):
    """The learning rate of a step, counted from 0, by train.py's keys; without decay_lr it is learning_rate all the time.

    Warm-up is linear over warmup_iters and ends at learning_rate. Then, by schedule, with min_lr (None: learning_rate / 10)
    from lr_decay_iters (None: max_iters) on:

    cosine        half a cosine down to min_lr (Loshchilov & Hutter 2017, without restarts)
    linear        a straight line down to min_lr
    wsd           warm-up, stable, decay: constant, then a line over the last decay_fraction of the steps
                  after warm-up (Hu et al. 2024, MiniCPM; the line is Hägele et al. 2024's)
    constant      learning_rate
    inverse_sqrt  learning_rate * sqrt(warmup_iters / step): Vaswani et al. 2017, section 5.3, where the peak is
                  1 / sqrt(n_embd * warmup_iters); here the peak is learning_rate
    """
    peak, warmup = config.learning_rate, config.warmup_iters
    low = peak / 10 if config.min_lr is None else config.min_lr
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if not config.decay_lr:
        return peak
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == 'constant':
        return peak
    if config.schedule == 'inverse_sqrt':
        return peak * math.sqrt(max(warmup, 1) / max(step, 1))
    if step >= end:
        return low
    progress = (step - warmup) / (end - warmup)  # 0 .. 1
    if config.schedule == 'cosine':
        return low + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - low)
    if config.schedule == 'linear':
        return peak + progress * (low - peak)
    decay_start = end - config.decay_fraction * (end - warmup)  # wsd
    return peak if step < decay_start else peak + (step - decay_start) / (end - decay_start) * (low - peak)
