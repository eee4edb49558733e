"""The optimizers, their parameter groups and the learning-rate schedules."""
import math

import torch

from device import has_bfloat16
from parallel import gather_like, is_shard, local, shard_like

MUON_AT_ONCE = 2**25  # numbers in the matrices that Muon works on together


def make_optimizer(model, config):
    """The optimizer that train.py's keys ask for. Each of its groups has its peak rate in group['peak_lr']."""
    betas = config.beta1, config.beta2
    params = list(model.parameters())
    muon, sparse = muon_matrices(model, config), []
    if config.embedding_learning_rate is not None:
        sparse = [] if model.config.tie_weights else [model.transformer.wte.weight]
        if model.config.ngram > 1:
            sparse.append(model.transformer.ngram.tables.weight)
    taken = {id(p) for p in muon + sparse}
    optimizer = adamw([p for p in params if id(p) not in taken], config.weight_decay, config.learning_rate, betas, sparse,
                      config.embedding_learning_rate, config.adam_eps)
    if muon:
        group = {'params': muon, 'peak_lr': config.muon_learning_rate}
        return MuonWithAdamW(Muon([group], config.muon_learning_rate, config.weight_decay, config.muon_momentum), optimizer)
    return optimizer


def block_matrices(model):
    return [p for p in model.transformer.h.parameters() if p.dim() == 2]


def muon_matrices(model, config):
    """The parameters that Muon takes."""
    return block_matrices(model) if config.optimizer == 'muon' else []


def adamw(params, weight_decay, learning_rate, betas, sparse=(), sparse_learning_rate=None, eps=1e-8):
    """AdamW (Loshchilov & Hutter 2019), in one kernel for all tensors and two groups: what decays and what does not.

    The groups keep nanoGPT's order, so that the optimizer state of its checkpoints loads. sparse: tables whose rows are rarely
    used; their steps are larger, and decay would wear them off between two uses.
    """
    params = [p for p in params if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2]  # weights of Linear and Embedding
    no_decay = [p for p in params if p.dim() < 2]  # biases, gains of the norms
    groups = [{'params': decay, 'weight_decay': weight_decay, 'peak_lr': learning_rate},
              {'params': no_decay, 'weight_decay': 0.0, 'peak_lr': learning_rate}]
    if sparse:
        groups.append({'params': list(sparse), 'weight_decay': 0.0, 'peak_lr': sparse_learning_rate})
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    # the state from the start: whether it fits into memory is seen before the first step, and gradients do not lie in between
    for p in [*params, *sparse]:
        optimizer.state[p] = {'step': torch.zeros((), device=p.device), 'exp_avg': torch.zeros_like(p),
                              'exp_avg_sq': torch.zeros_like(p)}
    return optimizer


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal, so that a step has the same length in all of a matrix's directions.

    As torch.optim.Muon with adjust_lr_fn='original', but matrices of one shape are worked on together, as a batch: a small
    model's step takes a third of the time. found_inf: as for AdamW, a tensor that is 1 where the step is to be left out.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum})
        self.fill_state()

    def fill_state(self):
        for group in self.param_groups:
            for p in group['params']:
                if 'momentum_buffer' not in self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                at_once = max(1, MUON_AT_ONCE // shape.numel())
                for first in range(0, len(params), at_once):
                    self.step_together(params[first:first + at_once], group)

    def step_together(self, params, group):
        """A step of matrices of one shape."""
        buffers = [local(self.state[p]['momentum_buffer']) for p in params]
        gradient, momentum = torch.stack([local(p.grad) for p in params]), torch.stack(buffers)  # (n, rows, columns)
        lr, found_inf = group['lr'], getattr(self, 'found_inf', None)
        if found_inf is not None:  # where it is 1, momentum and weights stay as they are
            gradient = gradient.where(found_inf == 0, momentum)
            lr = lr * (1 - found_inf)
        momentum.lerp_(gradient, 1 - group['momentum'])
        torch._foreach_copy_(buffers, list(momentum.unbind()))
        update = gradient.lerp_(momentum, group['momentum'])  # Nesterov's
        if is_shard(params[0]):  # a matrix is made orthogonal as a whole
            update = torch.stack([gather_like(u, p) for p, u in zip(params, update)])
        rows, columns = params[0].shape
        update = orthogonalize(update) * (lr * max(1, rows / columns)**0.5)
        for p, u in zip(params, update.unbind()):
            local(p).mul_(1 - lr * group['weight_decay']).sub_(local(shard_like(u, p)))


def orthogonalize(x):
    """About U V^T for each x = U S V^T, (n, rows, columns): 5 Newton-Schulz iterations, whose polynomial brings singular values
    to between 0.7 and 1.2 (Jordan et al. 2024). In bfloat16, which is enough, where the hardware has it.
    """
    wide = x.size(1) <= x.size(2)
    y = (x if wide else x.mT).to(torch.bfloat16 if has_bfloat16(x.device.type) else torch.float32)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = y @ y.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, b, y, beta=3.4445)
    return (y if wide else y.mT).type_as(x)


class MuonWithAdamW:
    """Muon for the matrices inside the blocks, AdamW for all else: used like one optimizer."""

    def __init__(self, muon, adamw):
        self.parts = {'muon': muon, 'adamw': adamw}

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


def parts_of(optimizer):
    return list(optimizer.parts.values()) if isinstance(optimizer, MuonWithAdamW) else [optimizer]


def step_if(wanted, optimizer):
    """optimizer.step(), which changes nothing where wanted, a tensor on its device, is False: nobody waits to know."""
    if wanted.device.type == 'mps' and not wanted.item():  # its AdamW may not look at found_inf (pytorch pull request 186360)
        return
    for part in parts_of(optimizer):
        part.found_inf = (~wanted).float()  # the name by which torch.amp.GradScaler tells an optimizer the same
        part.step()


def state_bytes(model, config):
    """What the optimizer is going to keep: two numbers of 4 bytes for each parameter of AdamW's, one for each of Muon's."""
    return 8 * model.get_num_params(False) - 4 * sum(p.numel() for p in muon_matrices(model, config))


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
    params = [p for group in optimizer.param_groups for p in group['params']]
    values = {i: dict(of_one) for i, of_one in state['state'].items()}
    for i, p in enumerate(params):
        for name, value in values.get(i, {}).items():
            if torch.is_tensor(value) and value.dim() > 0:
                if value.shape != p.shape:
                    raise ValueError(f'{name} has shape {tuple(value.shape)} for a parameter of {tuple(p.shape)}')
                values[i][name] = shard_like(value, p)  # a checkpoint has it whole
    optimizer.load_state_dict({'state': values, 'param_groups': groups})
    if isinstance(optimizer, Muon):
        optimizer.fill_state()  # a state saved before the first step may be empty


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
