"""One training step on a text, by a copy of the model: gradients, and predictions before and after.

The loss is that of training: label smoothing as in the config, no loss on sources of pairs. With
the optimizer state of a run the step is what train.py would do if this text were the whole batch,
in fp32 and without dropout; else it is one of plain gradient descent.
"""
import copy

import torch
from torch.nn import functional as F

from configurator import TrainConfig, key_types
from interpret.compare import likely_tokens
from lib import resume
from lib.budget import schedule_step
from lib.errors import UserError
from lib.pairs import source_parts
from optimizer import lr_multiplier, make_optimizer

MAX_PARAMETERS = 200_000_000  # a step takes about 16 bytes of memory for each
SGD_RATE = 0.01
PARTS = {  # of the model, by the names of their parameters
    'wte': 'embedding', 'ngram': 'n-gram tables', 'wpe': 'positions',
    'attn': 'attention', 'mlp': 'MLP', 'ln_1': 'norms', 'ln_2': 'norms', 'ln_f': 'norms',
    'lm_head': 'output head',
}


def collect_step(model, ids, target, vocab_size, checkpoint=None):
    """(facts, arrays) of one step on the token ids (T of them); model stays as it is.

    target: (T,), the tokens to explain. checkpoint: where the model is from, for the state of its
    optimizer.
    """
    x, y = targets_of(model.config, torch.tensor([ids]))
    n_parameters = model.get_num_params(False)
    if not (y >= 0).any():
        return {'step': {'skipped': 'This text has no token to learn.'}}, {}
    if n_parameters > MAX_PARAMETERS:
        return {'step': {'skipped': f'Left out: a step of {n_parameters / 1e6:,.0f} million '
                                    f'parameters takes too much memory.'}}, {}
    trained = copy.deepcopy(model).requires_grad_(True)
    optimizer, facts = own_optimizer(trained, checkpoint)
    before = logits_of(trained, ids, vocab_size)
    loss = training_loss(trained, x, y)
    loss.backward()
    names, norms = gradient_norms(trained)
    arrays = {'gradients': norms, 'head_gradients': head_gradient_norms(trained)}
    clip = facts['clip'] or float('inf')
    norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), clip)
    optimizer.step()
    after = logits_of(trained, ids, vocab_size)
    facts |= {
        'losses': [loss.item(), training_loss(trained, x, y).item()],
        'n_targets': int((y >= 0).sum()), 'smoothing': model.config.label_smoothing,
        'gradient': norm.item(), 'parts': names,
    }
    probs = torch.stack((before, after)).softmax(dim=-1)
    arrays['step_ids'], arrays['step_probs'] = likely_tokens(probs, target)
    arrays['step_losses'] = torch.stack(
        [F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction='none')
         for logits in (before, after)])  # (2, T - 1)
    arrays['is_target'] = (y[0] >= 0).byte()  # (T - 1,)
    return {'step': facts}, arrays


def targets_of(config, idx):
    """x and y (1, T - 1) of a text (1, T), as in training; y = -1: no loss."""
    x, y = idx[:, :-1], idx[:, 1:]
    if config.turns:
        y = y.masked_fill(source_parts(x, config.eot_token)[0], -1)
    return x, y


def training_loss(model, x, y):
    """The mean loss of a micro-batch in training."""
    loss = model.train()(x, y, return_logits=False)[1]
    model.eval()
    return loss


@torch.no_grad()
def logits_of(model, ids, vocab_size):
    """(T, V)"""
    idx = torch.tensor([ids])
    return model(idx, idx)[0][0, :, :vocab_size]


def own_optimizer(model, checkpoint):
    """(optimizer, facts): the run's own, with its state and learning rates; else SGD."""
    plain = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
    facts = {'optimizer': 'sgd', 'rates': {'all': SGD_RATE}, 'clip': 0.0, 'reason': 'none'}
    if checkpoint is None or checkpoint.optimizer is None:
        return plain, facts
    types = key_types(TrainConfig)
    config = TrainConfig(**{key: v for key, v in checkpoint.config.items() if key in types})
    if config.lora_rank:
        return plain, facts | {'reason': 'lora'}
    optimizer = make_optimizer(model, config)
    try:
        resume.load_optimizer(optimizer, torch.amp.GradScaler('cpu', enabled=False), checkpoint)
    except UserError:
        return plain, facts | {'reason': 'misfit'}
    step = schedule_step(config, checkpoint.step, checkpoint.seconds)
    is_over = step >= config.max_iters  # then the schedule, often at 0, has no next rate
    optimizer.set_lr(1.0 if is_over else lr_multiplier(step, config))
    return optimizer, {
        'optimizer': config.optimizer, 'clip': config.grad_clip, 'is_over': is_over,
        'dropout': config.dropout,
        'rates': {g['name']: g['lr'] for g in optimizer.param_groups if g['params']},
    }


def gradient_norms(model):
    """([part of the model], their gradient norms (parts,)), whose squares sum to that of all."""
    squares = {}
    for name, p in model.named_parameters():
        _, *path = name.removesuffix('.weight').split('.')
        part = PARTS[path[2] if path[:1] == ['h'] else (path or ['lm_head'])[0]]
        if path[:1] == ['h'] and part != 'norms':
            part = f'L{path[1]} {part}'
        elif part == 'embedding' and model.config.tie_weights:
            part = 'embedding, head'
        squares[part] = squares.get(part, 0) + p.grad.square().sum()
    return list(squares), torch.stack(list(squares.values())).sqrt()


def head_gradient_norms(model):
    """Gradient norm of the weights of each head: W_Q, W_K, W_V, with biases, and W_O. (L, nh)

    Heads that share keys and values share their gradients too.
    """
    squares = []
    for block in model.transformer.h:
        attn = block.attn
        rows = attn.c_attn.weight.grad.square().sum(dim=1)
        if attn.c_attn.bias is not None:
            rows = rows + attn.c_attn.bias.grad.square()
        n_kv = attn.n_kv_head
        q, k, v = rows.view(-1, attn.head_size).sum(dim=1).split((attn.n_head, n_kv, n_kv))
        columns = attn.c_proj.weight.grad.square().sum(dim=0)
        shared = (k + v).repeat_interleave(attn.n_head // n_kv)
        squares.append(q + shared + columns.view(-1, attn.head_size).sum(dim=1))
    return torch.stack(squares).sqrt()
