"""AdamW and Muon in one optimizer, its parameter groups, and the learning-rate schedules."""
import math

import torch
from torch.optim.adamw import adamw as adamw_step

from lib.device import has_bfloat16
from lib.distributed import (
    all_reduce,
    gather_like,
    is_shard,
    local,
    map_shared,
    shard_like,
    world_size,
)

MUON_MAX_NUMEL = 2**25  # most elements orthogonalized in one batch
N_SAMPLED = 2**16  # weights of a group from which its update ratio is estimated
EXTENDED_PEAK = 0.5  # of the schedule, in the steps by which a run was extended


def make_optimizer(model, config):
    """Build the Optimizer from train.py's keys."""
    muon, tables = muon_matrices(model, config), []
    if config.embedding_learning_rate is not None and not model.config.tie_weights:
        tables.append(model.transformer.wte.weight)
    if config.embedding_learning_rate is not None and model.config.ngram > 1:
        tables.append(model.transformer.ngram.tables.weight)
    tables = [p for p in tables if p.requires_grad]
    taken = {id(p) for p in muon + tables}
    params = [p for p in model.parameters() if id(p) not in taken]
    groups = adamw_groups(params, config.weight_decay, config.learning_rate)
    if tables:  # each row is updated rarely: larger steps, and no decay between two updates
        groups.append({'params': tables, 'lr': config.embedding_learning_rate, 'weight_decay': 0.0,
                       'name': 'embeddings'})
    if muon:
        groups.append({'params': muon, 'lr': config.muon_learning_rate, 'kind': 'muon',
                       'weight_decay': config.weight_decay, 'momentum': config.muon_momentum,
                       'name': 'muon'})
    return Optimizer(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps)


def block_matrices(model):
    return [p for p in model.transformer.h.parameters() if p.dim() == 2]


def muon_matrices(model, config):
    """The parameters that Muon trains."""
    return block_matrices(model) if config.optimizer == 'muon' else []


def adamw_groups(params, weight_decay, learning_rate):
    """Matrices and embeddings decay, gains and biases do not: nanoGPT's groups, in its order."""
    params = [p for p in params if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]
    no_decay = [p for p in params if p.dim() < 2]
    return [{'params': decay, 'lr': learning_rate, 'weight_decay': weight_decay, 'name': 'adamw'},
            {'params': no_decay, 'lr': learning_rate, 'weight_decay': 0.0, 'name': 'gains'}]


def adamw(params, weight_decay, learning_rate, betas, eps=1e-8):
    """AdamW alone (Loshchilov & Hutter 2019), as nanoGPT configures it."""
    return Optimizer(adamw_groups(params, weight_decay, learning_rate), betas=betas, eps=eps)


def undecorated(function):
    return getattr(function, '__wrapped__', function)


class Optimizer(torch.optim.Optimizer):
    """One optimizer for all groups: kind 'adamw' (fused), or 'muon' for matrices.

    State is allocated up front, so out-of-memory shows before the first step. Each
    group keeps its peak rate in group['initial_lr'].
    """

    # as they are: torch._disable_dynamo around them would import Dynamo, a second of CPU time
    add_param_group = undecorated(torch.optim.Optimizer.add_param_group)
    state_dict = undecorated(torch.optim.Optimizer.state_dict)
    zero_grad = undecorated(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups, betas=(0.9, 0.95), eps=1e-8):
        defaults = {'kind': 'adamw', 'betas': betas, 'eps': eps, 'momentum': 0.95}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            group['initial_lr'] = group['lr']
        self.found_inf = None  # a tensor, 1 where the step must change nothing
        self.shares_muon = True  # each process orthogonalizes its share of the matrices
        self.orthogonalize = orthogonalize
        for group in self.param_groups:
            for p in group['params']:
                state = self.state[p]
                if group['kind'] == 'muon':
                    state['momentum_buffer'] = torch.zeros_like(p)
                else:
                    state['step'] = torch.zeros((), device=p.device)
                    state['exp_avg'] = torch.zeros_like(p)
                    state['exp_avg_sq'] = torch.zeros_like(p)

    def set_lr(self, multiplier):
        for group in self.param_groups:
            group['lr'] = group['initial_lr'] * multiplier

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if group['kind'] == 'muon':
                self.step_muon(params, group)
            elif params:
                self.step_adamw(params, group)

    def step_if_finite(self, finite, measures=None):
        """step(), which is a no-op if the tensor finite is False; no host sync. Puts the update
        ratio of each group into the dict measures: norm of its step / norm of its weights."""
        # MPS's fused AdamW ignores found_inf (pytorch pull request 186360)
        if finite.device.type == 'mps' and not finite.item():
            return
        before = {} if measures is None else self.sample_weights()
        self.found_inf = (~finite).float()
        self.step()
        self.found_inf = None
        after = before and self.sample_weights()
        for name, weights in before.items():
            squares = torch.stack((after[name] - weights, weights)).square().sum(1)
            if any(map(is_shard, self.state)):
                squares = all_reduce(squares)
            measures[f'update_ratio_{name}'] = (squares[0] / squares[1]).sqrt()

    @torch.no_grad()
    def sample_weights(self):
        """{name of a group: about N_SAMPLED of its weights}, always the same ones."""
        samples = {}
        for group in filter(lambda group: group['params'], self.param_groups):
            params = [local(p) for p in group['params']]
            stride = sum(p.numel() for p in params) // N_SAMPLED | 1  # odd: in all columns
            samples[group['name']] = torch.cat([p.view(-1)[::stride] for p in params])
        return samples

    def step_adamw(self, params, group):
        states = [self.state[p] for p in params]
        beta1, beta2 = group['betas']
        adamw_step(params, [p.grad for p in params], [state['exp_avg'] for state in states],
                   [state['exp_avg_sq'] for state in states], [], [s['step'] for s in states],
                   fused=True, found_inf=self.found_inf, amsgrad=False, maximize=False,
                   beta1=beta1, beta2=beta2, lr=group['lr'], eps=group['eps'],
                   weight_decay=group['weight_decay'])

    def step_muon(self, params, group):
        """Matrices of one shape are updated together: a third of the time for small models."""
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        for shape, params in shapes.items():
            batch_size = max(1, MUON_MAX_NUMEL // shape.numel())
            if self.shares_muon:
                batch_size *= world_size()
            for first in range(0, len(params), batch_size):
                self.step_muon_batch(params[first:first + batch_size], group)

    def step_muon_batch(self, params, group):
        """Muon (Jordan et al. 2024): orthogonalized momentum, so that a step has the same length in
        every direction of a matrix. As torch.optim.Muon with adjust_lr_fn='original'."""
        buffers = [local(self.state[p]['momentum_buffer']) for p in params]
        gradient = torch.stack([local(p.grad) for p in params])  # (n, rows, columns)
        momentum = torch.stack(buffers)  # (n, rows, columns)
        lr = group['lr']
        if self.found_inf is not None:  # then momentum and weights stay as they are
            gradient = gradient.where(self.found_inf == 0, momentum)
            lr = lr * (1 - self.found_inf)
        momentum.lerp_(gradient, 1 - group['momentum'])
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        update = gradient.lerp_(momentum, group['momentum'])  # Nesterov
        if is_shard(params[0]):  # FSDP: orthogonalize whole matrices
            update = torch.stack([gather_like(u, p) for p, u in zip(params, update)])
        rows, columns = params[0].shape
        if self.shares_muon:
            update = map_shared(self.orthogonalize, update)
        else:
            update = self.orthogonalize(update)
        update = update.type_as(momentum) * (lr * max(1, rows / columns)**0.5)
        for p, u in zip(params, update.unbind()):
            local(p).mul_(1 - lr * group['weight_decay']).sub_(local(shard_like(u, p)))

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Restore the state; rates, decay and betas stay this optimizer's own. Reads nanoGPT's
        AdamW and earlier versions. Raises ValueError if it does not fit."""
        state, group_sizes = merge_old_format(state_dict)
        expected = [len(group['params']) for group in self.param_groups]
        if group_sizes != expected:
            raise ValueError(f'it is not the state of this optimizer: groups of {group_sizes} '
                             f'parameters, not {expected}')
        params = [(p, group) for group in self.param_groups for p in group['params']]
        for i, (p, group) in enumerate(params):
            saved = state.get(i) or {}  # empty if it was saved before the first step
            if saved and saved.keys() != self.state[p].keys():
                raise ValueError(f'it has {", ".join(saved)} for a parameter of {group["kind"]}')
            for name, value in saved.items():
                value = torch.as_tensor(value)
                if value.shape != (() if name == 'step' else p.shape):
                    raise ValueError(f'{name} has shape {tuple(value.shape)} for a parameter of '
                                     f'{tuple(p.shape)}')
                if value.dim() > 0:
                    value = shard_like(value, p)  # checkpoints have it whole
                self.state[p][name].copy_(value)


def merge_old_format(state_dict):
    """({parameter index: state}, tensors per group) of a state_dict. AdamW and Muon used to be two
    optimizers: {'muon': ..., 'adamw': ...}."""
    old = 'adamw' in state_dict
    parts = [state_dict['adamw'], state_dict['muon']] if old else [state_dict]
    state, group_sizes = {}, []
    for part in parts:
        if not {'state', 'param_groups'} <= part.keys():
            raise ValueError('it is not the state of AdamW or Muon')
        offset = sum(group_sizes)
        state |= {i + offset: values for i, values in part['state'].items()}
        group_sizes += [len(group['params']) for group in part['param_groups']]
    return state, group_sizes


def orthogonalize(x):
    """Approximately U V^T for each x = U S V^T, (n, rows, columns), in 5 Newton-Schulz iterations.

    Their polynomial brings singular values to between 0.7 and 1.2 (Jordan et al. 2024). In bf16,
    which is precise enough, if the hardware has it; so is the result.
    """
    wide = x.size(1) <= x.size(2)
    dtype = torch.bfloat16 if has_bfloat16(x.device.type) else torch.float32
    y = (x if wide else x.mT).to(dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = y @ y.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, b, y, beta=3.4445)
    return y if wide else y.mT


def n_trained(model):
    """Number of parameters that are not frozen."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_bytes(model, config):
    """Bytes of optimizer state: two fp32 numbers per AdamW parameter, one per Muon parameter."""
    n_muon = sum(p.numel() for p in muon_matrices(model, config))
    return 8 * n_trained(model) - 4 * n_muon


def lr_multiplier(step, config):
    """The factor on each group's initial_lr at a step, counted from 0.

    With decay_lr=False it is always 1. Warmup is linear over warmup_iters and ends at 1. Then, by
    schedule, with low = min_lr / learning_rate (min_lr None: 1/10) from lr_decay_iters (None:
    max_iters) on:

    cosine        half a cosine down to low (Loshchilov & Hutter 2017, without restarts)
    linear        a straight line down to low
    wsd           warmup, stable, decay: constant, then linear over the last decay_fraction of the
                  steps after warmup (Hu et al. 2024, MiniCPM; linear: Hägele et al. 2024)
    constant      1
    inverse_sqrt  min(t / warmup_iters, sqrt(warmup_iters / t)), t = step + 1: Vaswani et al. 2017,
                  5.3, whose peak is 1 / sqrt(n_embd * warmup_iters); here it is learning_rate

    From extended_at on, where a run was resumed with more steps after its rate had decayed, the
    rate warms up once more, to EXTENDED_PEAK of the schedule.
    """
    multiplier = schedule_multiplier(step, config)
    if not config.decay_lr or step < config.extended_at or config.extended_at == 0:
        return multiplier
    n_warmup = max(config.warmup_iters, (config.max_iters - config.extended_at) // 20)
    return multiplier * EXTENDED_PEAK * min(1.0, (step - config.extended_at + 1) / (n_warmup + 1))


def schedule_multiplier(step, config):
    """The multiplier of a run that was not extended."""
    warmup = config.warmup_iters
    low = 0.1 if config.min_lr is None else config.min_lr / config.learning_rate
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if not config.decay_lr:
        return 1.0
    if config.schedule == 'inverse_sqrt':
        return min((step + 1) / max(warmup, 1), math.sqrt(max(warmup, 1) / (step + 1)))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == 'constant':
        return 1.0
    if step >= end:
        return low
    progress = (step - warmup) / (end - warmup)  # 0 .. 1
    if config.schedule == 'cosine':
        return low + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - low)
    if config.schedule == 'linear':
        return 1 + progress * (low - 1)
    decay_start = end - config.decay_fraction * (end - warmup)
    if step < decay_start:
        return 1.0
    return 1 + (step - decay_start) / (end - decay_start) * (low - 1)
