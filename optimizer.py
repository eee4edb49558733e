"""The optimizers, their parameter groups and the learning-rate schedules."""
import math

import torch


def make_optimizer(model, config):
    """The optimizer that train.py's keys ask for. Each of its groups has its peak rate in group['peak_lr']."""
    betas = config.beta1, config.beta2
    if config.optimizer == 'muon':
        return MuonWithAdamW(model, config.weight_decay, config.learning_rate, betas, config.muon_learning_rate)
    return adamw(model.parameters(), config.weight_decay, config.learning_rate, betas)


def adamw(params, weight_decay, learning_rate, betas):
    """AdamW (Loshchilov & Hutter 2019), in one kernel for all tensors and two groups: what decays and what does not.

    The groups keep nanoGPT's order, so that the optimizer state of its checkpoints loads.
    """
    params = [p for p in params if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]  # weights of Linear and Embedding
    no_decay = [p for p in params if p.dim() < 2]  # biases, gains of the norms
    groups = [{'params': decay, 'weight_decay': weight_decay, 'peak_lr': learning_rate},
              {'params': no_decay, 'weight_decay': 0.0, 'peak_lr': learning_rate}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class MuonWithAdamW:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all else: used like one optimizer.

    Muon's update is momentum made orthogonal by Newton-Schulz iterations: it wants a rate of its own, the same for all widths.
    """

    def __init__(self, model, weight_decay, learning_rate, betas, muon_learning_rate):
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        inside = {id(p) for p in matrices}
        group = {'params': matrices, 'peak_lr': muon_learning_rate}
        self.parts = {
            'muon': torch.optim.Muon([group], lr=muon_learning_rate, weight_decay=weight_decay, momentum=0.95),
            'adamw': adamw((p for p in model.parameters() if id(p) not in inside), weight_decay, learning_rate, betas)}

    @property
    def param_groups(self):
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


def state_bytes(optimizer):
    """What the optimizer is going to keep: two numbers of 4 bytes for each of AdamW's, one for each of Muon's."""
    if isinstance(optimizer, MuonWithAdamW):
        return sum(state_bytes(part) for part in optimizer.parts.values())
    numbers = 1 if isinstance(optimizer, torch.optim.Muon) else 2
    return 4 * numbers * sum(p.numel() for group in optimizer.param_groups for p in group['params'])


def load_state(optimizer, state):
    """Restore state_dict's state; rates, decay and betas stay the optimizer's own. Raises ValueError if it does not fit."""
    if isinstance(optimizer, MuonWithAdamW):
        if state.keys() != optimizer.parts.keys():
            raise ValueError('it is not the state of optimizer = muon')
        for name, part in optimizer.parts.items():
            load_state(part, state[name])
        return
    if 'param_groups' not in state:
        raise ValueError('it is not the state of optimizer = adamw')
    groups = [saved | {k: v for k, v in group.items() if k != 'params'}
              for saved, group in zip(state['param_groups'], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({'state': state['state'], 'param_groups': groups})
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.dim() > 0 and value.shape != p.shape:
                raise ValueError(f'{name} has shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}')


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
