"""The finished runs of a ladder (tools/scale.py): read, tabulated, drawn with their law."""
from typing import NamedTuple

import numpy as np
import torch

from configurator import TrainConfig
from lib.budget import tokens_per_step
from lib.errors import os_errors
from lib.jobs import read_keys, val_losses
from lib.plot import import_pyplot, save_png
from lib.sizes import config_sizes
from model import GPT

STABLE = '-stable'  # ends the names of runs that others branch off


class Point(NamedTuple):
    """A finished run."""
    name: str
    config: TrainConfig
    n: float  # parameters in matrix products
    d: float  # tokens
    flops: float
    loss: float


def read_point(folder):
    """The Point of a run's folder; None if the run is not finished."""
    keys = read_keys(folder)
    if keys is None:
        return None
    train = TrainConfig(**keys)
    loss = val_losses(folder).get(train.max_iters)
    if loss is None or folder.name.endswith(STABLE):
        return None
    n, flops = measure(train)
    d = train.max_iters * tokens_per_step(train)
    return Point(folder.name, train, n, d, flops * d, loss)


def measure(train):
    """(parameters in matrix products, FLOPs per token) of a run's model."""
    sizes = config_sizes(train, torch.device('cpu'))
    return sizes.of(GPT.num_matmul_params), sizes.of(GPT.flops_per_token)


def describe_evaluation(train):
    """The windows over which a run's losses are taken."""
    n = train.eval_iters * train.batch_size if train.eval_iters > 0 else 'all'
    return f'{n} windows of {train.block_size} tokens of {train.dataset}'


def arrays(points):
    """(parameters, tokens, losses)"""
    return tuple(np.array([getattr(point, name) for point in points], dtype=float)
                 for name in ('n', 'd', 'loss'))


def format_table(points, law, epoch):
    """The runs with the law's loss and their distance from it, if there is a law."""
    rows = [['run', 'N', 'D', 'D / N', 'epochs', 'FLOPs', 'val loss']]
    rows[0] += ['law', 'error'] * (law is not None)
    for point in points:
        row = [point.name, f'{point.n / 1e6:.2f}M', f'{point.d / 1e6:.2f}M',
               f'{point.d / point.n:.2g}', f'{point.d / epoch:.2g}', f'{point.flops:.2e}',
               f'{point.loss:.4f}']
        if law:
            expected = law.loss(point.n, point.d)
            row += [f'{expected:.4f}', f'{point.loss / expected - 1:+.2%}']
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(widths[0]),
                                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
                     for row in rows)


def plot(points, law, target, path):
    """Losses and law against FLOPs, and the residuals. target: (FLOPs, loss, interval) of the
    predicted run, or None. Returns False without matplotlib."""
    pyplot = import_pyplot()
    if pyplot is None:
        return False
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7, 7), height_ratios=(3, 1), sharex=True, layout='constrained')
    depths = sorted({point.config.depth for point in points})
    colors = pyplot.colormaps['viridis'](np.linspace(0, 0.9, len(depths)))
    for depth, color in zip(depths, colors):
        own = [point for point in points if point.config.depth == depth]
        n, d, losses = arrays(own)
        flops = np.array([point.flops for point in own])
        top.plot(flops, losses, 'o', color=color, label=f'depth {depth}, {n[0] / 1e6:.2f}M')
        line = np.geomspace(d.min() / 2, d.max() * 4)
        top.plot(line * flops[0] / d[0], law.loss(n[0], line), color=color, linewidth=1)
        errors = 100 * (losses / law.loss(n, d) - 1)
        bottom.plot(flops, errors, 'o-', color=color, linewidth=0.5)
    if target:
        flops, loss, (low, high) = target
        top.errorbar([flops], [loss], [[max(loss - low, 0)], [max(high - loss, 0)]], fmt='k*',
                     capsize=4, label='predicted')
    top.set(xscale='log', yscale='log', ylabel='val loss (nats per token)')
    ticks = np.unique(np.round(np.geomspace(*top.get_ylim(), 8)[1:-1], 1))
    top.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    top.set_yticks([], minor=True)
    top.set_title(describe(law), fontsize='medium')
    top.legend(fontsize='small')
    top.grid(alpha=0.3)
    bottom.axhline(0, color='gray', linewidth=1)
    bottom.set(xlabel='training FLOPs', ylabel='loss over law (%)')
    bottom.grid(alpha=0.3)
    with os_errors(f'{path}: cannot write', 'choose another --out_dir'):
        save_png(pyplot, figure, path, dpi=120)
    return True


def describe(law):
    return f'L = {law.E:.3f} + {law.A:.4g} / N^{law.a:.3f} + {law.B:.4g} / D^{law.b:.3f}'
