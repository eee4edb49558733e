"""Predict a large run from small ones: train a ladder of models and fit a scaling law to it.

    python tools/scale.py config/quickstart.py --depths=1,2,3,4 --tokens=2.9e6 --predict_depth=6
    python tools/scale.py config/train_gpt2.py --depths=2,3,4,6,8 --predict_depth=12 --gpu=h100
    python tools/scale.py config/x.py --depths=2,3,4,6 --compare=scale-other

Each depth is one stable run at a constant rate. Where the decay of a horizon begins, a copy
branches off and decays: bit by bit what a run of that length gives, in fewer steps (wsd: Hu et al.
2024). Batch and rates are those of --depth, the same for all horizons of a depth. The law is L = E
+ A / N^a + B / D^b; N: parameters in matrix products (blocks and head), D: tokens; lib/scaling.py
says how it is fitted. The same command continues where it stopped.
"""
import io
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import (
    Count,
    Depth,
    FilePath,
    Positive,
    TrainConfig,
    configure,
    help_text,
    key_types,
    read_config_file,
)
from lib.errors import os_errors, plural, require, user_errors
from lib.files import create, find
from lib.recipe import read_train_config, set_batch

USAGE = """
keys of train.py, which hold for all runs
{}
keys of tools/plan.py, for hours and cost: {}"""
# of tools/plan.py
PLAN_KEYS = ('gpu', 'gpus', 'gpus_per_machine', 'network', 'mfu', 'price')
# of train.py, which this tool sets
OWN_KEYS = ('depth', 'max_iters', 'lr_decay_iters', 'schedule', 'decay_lr', 'init_from', 'eval_only',
            'eval_interval', 'eval_iters', 'save_interval', 'sample_every_eval', 'extended_at')
EVAL_WINDOWS = 1024  # of the final evaluation


@dataclass
class Config:
    # ladder
    depths: list[int] = field(default_factory=lambda: [2, 3, 4, 6])  # settings of --depth to train
    horizons: list[int | float] = field(
        default_factory=lambda: [0.125, 0.25, 0.5, 1])  # lengths of runs, as shares of the tokens
    tokens: Count | None = None  # of a full run at every depth; None: what --depth implies
    out_dir: FilePath = ''  # folder of the runs; empty: scale-<config>
    # questions
    predict_depth: Depth | None = None  # predict this depth at its tokens
    flops: Positive | None = None  # find the best size for a budget; None: the predicted run's
    compare: str = ''  # folders of runs with other settings, separated by commas


class Rung(NamedTuple):
    """A run of the ladder."""
    depth: int
    folder: Path
    words: list  # train.py's arguments, from scratch
    config: TrainConfig
    branch: int  # the step at which its decay begins


def read_command(argv):
    """(Config, [Rung], arguments of plan.py for the predicted run or None, files and flags)."""
    files = [str(find(word)) for word in argv if not word.startswith('-')]
    require(files, 'name a config file: python tools/scale.py config/quickstart.py --depths=1,2,3')
    words = {'own': [], 'plan': [], 'train': []}
    keys = []
    for word in argv:
        if word.startswith('-'):
            key, equals, _ = word.removeprefix('--').partition('=')
            require(equals, f'{word}: write --key=value')
            require(key not in OWN_KEYS, f'{key}: the ladder sets it itself: leave it out')
            own = 'own' if key in key_types(Config) else 'train'
            words['plan' if key in PLAN_KEYS else own].append(word)
            keys.append(key)
    config, _ = configure(Config, words['own'])
    config.out_dir = config.out_dir or f'scale-{Path(files[-1]).stem}'
    config.depths, config.horizons = sorted(set(config.depths)), sorted(set(config.horizons))
    require(config.depths and min(config.depths) >= 1, 'depths: give numbers of 1 or more')
    require(config.horizons and min(config.horizons) > 0, 'horizons: give numbers above 0')
    settings = [(depth, *settle(files, words['train'], depth, config, keys))
                for depth in config.depths]
    n_windows = math.lcm(*(train.batch_size for *_, train in settings))
    n_windows *= math.ceil(EVAL_WINDOWS / n_windows)
    rungs = [rung for depth, arguments, train in settings
             for rung in make_rungs(depth, arguments, train, config, n_windows)]
    return config, rungs, files, words


def settle(files, flags, depth, config, keys=()):
    """(train.py's arguments, their TrainConfig) of a full run at a depth."""
    arguments = [*files, f'--depth={depth}', *flags]
    train, _ = read_train_config(arguments)
    require(not train.auto_batch_size, 'batch_size = auto: all runs of a depth need one batch: '
                                       'give a number')
    tokens = config.tokens or train.max_iters * tokens_per_step(train)
    set_batch(train, tokens * max(config.horizons), keys)
    train.max_iters = max(1, round(tokens / tokens_per_step(train)))
    arguments += [f'--{key}={getattr(train, key)}'
                  for key in ('batch_size', 'gradient_accumulation_steps', 'max_iters')]
    return arguments, train


def tokens_per_step(train):
    return train.batch_size * train.gradient_accumulation_steps * train.block_size


def make_rungs(depth, arguments, train, config, n_windows):
    """The Rungs of a depth, the shortest first."""
    rungs = []
    all_steps = {max(2, round(share * train.max_iters)) for share in config.horizons}
    for steps in sorted(all_steps):
        words = [*arguments, f'--max_iters={steps}', '--schedule=wsd', '--decay_lr=True',
                 f'--eval_iters={n_windows // train.batch_size}', f'--eval_interval={steps}',
                 f'--save_interval={max(100, steps // 10)}', '--keep_last=1',
                 '--sample_every_eval=False']
        train, _ = read_train_config(words)
        # the last step at which the rate has not begun to fall
        stable = (1 - train.decay_fraction) * (steps - train.warmup_iters)
        branch = math.floor(train.warmup_iters + stable) if stable > 0 else 0
        folder = Path(config.out_dir) / f'depth{depth}-steps{steps}'
        rungs.append(Rung(depth, folder, words, train, branch))
    return rungs


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        if '--help' in sys.argv or '-h' in sys.argv:
            _, _, of_train = help_text(TrainConfig).partition('[--switch ...]\n')
            print(help_text(Config) + '\n' + USAGE.format(of_train, ', '.join(PLAN_KEYS)))
            sys.exit(0)
        config, rungs, files, words = read_command(sys.argv[1:])

import numpy as np
import torch

from checkpoint import manifests
from configurator import GPTConfig
from lib import bins, scaling
from lib.memory import Sizes
from lib.plot import import_pyplot
from lib.resume import choose_model_config
from lib.run import read_log
from model import GPT

# Training ----------------------------------------------------------------------------------------


def check_folders(rungs):
    """Raises UserError if a folder of the ladder holds a run with other keys."""
    varying = {*OWN_KEYS, 'out_dir', 'wandb_run_name', 'doc_mask', 'prefix_lm'} - {'depth'}
    for rung in rungs:
        for folder in (rung.folder, stable_folder(rung)):
            saved = read_keys(folder) or {}
            # None: derived from other keys
            changed = [key for key, value in asdict(rung.config).items()
                       if value is not None and key not in varying
                       and saved.get(key, value) != value]
            require(not changed, f'{folder} holds a run with other values of '
                                 f'{", ".join(changed)}: choose another --out_dir, or move the '
                                 f'folder away')


def read_keys(folder):
    """{key: value} of a run's config.py; None if there is none that can be read."""
    try:
        return read_config_file(str(folder / 'config.py'), TrainConfig)
    except ValueError:  # not a run, or one of another version
        return None


def stable_folder(rung):
    return rung.folder.with_name(f'depth{rung.depth}-stable')


def last_step(folder):
    """The step of a run's last checkpoint, 0 if there is none."""
    return max((manifest['step'] for manifest in manifests(folder)), default=0)


def train(folder, words, *changes):
    """Run train.py in folder, or resume it with the changes alone; returns its exit code."""
    keys = [*words, *changes]
    if last_step(folder):
        keys = ['--init_from=resume', *changes]  # the rest is in the checkpoint
    command = [sys.executable, ROOT / 'train.py', *keys, f'--out_dir={folder}']
    return subprocess.run(command).returncode


def train_rung(rung):
    """Train or go on with a run of the ladder; returns train.py's exit code."""
    stable = stable_folder(rung)
    if not last_step(rung.folder) and 0 < rung.branch:
        if last_step(stable) < rung.branch:
            code = train(stable, rung.words, '--schedule=constant', f'--max_iters={rung.branch}',
                         '--eval_iters=1', '--eval_interval=1000000000')
            if code:
                return code
        if last_step(stable) == rung.branch:
            branch_off(stable, rung.folder)
        # else it is beyond: a horizon was added; this run then starts from scratch
    evaluations = [word for word in rung.words if word.startswith('--eval_')]
    return train(rung.folder, rung.words, '--schedule=wsd', f'--max_iters={rung.config.max_iters}',
                 *evaluations)


def branch_off(stable, folder):
    """Copy a run's checkpoint and log. A copy that was cut off is made again."""
    incomplete = folder.with_name(folder.name + '.tmp')
    with os_errors(f'{folder}: cannot write', 'choose another --out_dir'):
        shutil.rmtree(incomplete, ignore_errors=True)
        unwanted = shutil.ignore_patterns('status', '.lock', 'wandb*', 'earlier-*', '*.tmp')
        shutil.copytree(stable, incomplete, ignore=unwanted)
        if folder.exists():  # of a run that has not saved anything
            shutil.rmtree(folder)
        incomplete.rename(folder)


# Reading -----------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A finished run."""
    name: str
    config: TrainConfig
    n: float  # parameters in matrix products
    d: float  # tokens
    flops: float
    loss: float

    @property
    def windows(self):
        """What its evaluation depends on."""
        return self.config.dataset, self.config.block_size, self.n_windows

    @property
    def n_windows(self):
        return self.config.eval_iters * self.config.batch_size


def read_point(folder):
    """The Point of a run's folder; None if the run is not finished."""
    keys = read_keys(folder)
    if keys is None:
        return None
    train = TrainConfig(**keys)
    losses = [line['val_loss'] for line in read_log(folder)
              if line.get('val_loss') is not None and line['step'] == train.max_iters]
    if not losses or folder.name.endswith('-stable'):
        return None
    n, flops = measure(train)
    d = train.max_iters * tokens_per_step(train)
    return Point(folder.name, train, n, d, flops * d, losses[-1])


def measure(train):
    """(parameters in matrix products, FLOPs per token) of a run's model."""
    shape = choose_model_config(train, given=set(), checkpoint=None)
    tokenizer = bins.open_dataset(bins.find_dataset(train.dataset), train.block_size).tokenizer
    sizes = Sizes(GPTConfig(**shape, vocab_size=tokenizer.vocab_size), torch.device('cpu'))
    return sizes.of(GPT.num_matmul_params), sizes.of(GPT.flops_per_token)


def arrays(points):
    """(parameters, tokens, losses)"""
    return tuple(np.array([getattr(point, name) for point in points], dtype=float)
                 for name in ('n', 'd', 'loss'))


# Reporting ---------------------------------------------------------------------------------------


def print_ladder(rungs):
    """What is to be trained; notes on repeated data and on ladders that will not do."""
    folder = bins.find_or_prepare(rungs[0].config.dataset)
    epoch = bins.open_dataset(folder, rungs[0].config.block_size).train.n_tokens
    sizes = {rung.depth: measure(rung.config) for rung in rungs}
    work, steps_done = [], {}
    for rung in rungs:
        steps = rung.config.max_iters - min(rung.branch, steps_done.get(rung.depth, 0))
        steps_done[rung.depth] = rung.branch
        work.append(steps * tokens_per_step(rung.config) * sizes[rung.depth][1])
    print(f'{plural(len(rungs), "run")} below {config.out_dir}, {sum(work):.3g} FLOPs; val loss over '
          f'the same {rungs[0].config.eval_iters * rungs[0].config.batch_size:,} windows of '
          f'{rungs[0].config.block_size:,} tokens for all (or the whole split if it has fewer)')
    d = [rung.config.max_iters * tokens_per_step(rung.config) for rung in rungs]
    longest = max(d) / epoch
    if longest > 1.005:
        print(f'note: the longest run has {longest:.1f} epochs of {epoch:,} tokens: repeated tokens '
              f'are worth less than new ones (Muennighoff et al. 2023), which the law ignores; '
              f'--tokens={epoch} stays within one')
    reason = scaling.why_not([sizes[rung.depth][0] for rung in rungs], d)
    if reason:
        print(f'note: {reason}: there will be no prediction; give more --depths or --horizons')
    return work, epoch


def format_table(points, law, epoch):
    """The runs with the law's loss and their distance from it, if there is a law."""
    rows = [['run', 'params', 'tokens', 'per param', 'epochs', 'FLOPs', 'val loss']]
    rows[0] += ['law', 'error'] * (law is not None)
    for point in points:
        row = [point.name, f'{point.n / 1e6:.2f}M', f'{point.d / 1e6:.2f}M',
               f'{point.d / point.n:.1f}', f'{point.d / epoch:.2f}', f'{point.flops:.2e}',
               f'{point.loss:.4f}']
        if law:
            expected = law.loss(point.n, point.d)
            row += [f'{expected:.4f}', f'{point.loss / expected - 1:+.2%}']
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(widths[0]),
                                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
                     for row in rows)


def print_hold_out(points):
    """The error of the law of the others for the largest size."""
    n, d, losses = arrays(points)
    smaller = n < n.max()
    reason = scaling.why_not(n[smaller], d[smaller], held_out=True)
    if reason:
        print(f'largest size left out: of the others, {reason}')
        return
    law = scaling.fit(n[smaller], d[smaller], losses[smaller])
    errors = law.loss(n[~smaller], d[~smaller]) / losses[~smaller] - 1
    ratio = n.max() / n[smaller].max()
    print(f'largest size left out, {ratio:.1f} times the next: predicted with errors of '
          + ', '.join(f'{error:+.2%}' for error in errors)
          + f' (largest {abs(errors).max():.2%}), in the order of the table')


def plan(files, words, settings, tokens):
    """The last table of tools/plan.py for a run of so many tokens: time and cost."""
    steps = max(1, round(tokens / tokens_per_step(settings)))
    keys = [f'--{key}={getattr(settings, key)}' for key in ('depth', 'batch_size',
                                                            'gradient_accumulation_steps')]
    command = [sys.executable, ROOT / 'tools' / 'plan.py', *files, keys[0], *words['train'],
               *keys[1:], f'--max_iters={steps}', '--gpus=1', *words['plan']]
    result = subprocess.run(command, capture_output=True, text=True)
    reason = result.stderr.strip().removeprefix('plan.py: ')
    require(result.returncode == 0, f'tools/plan.py: {reason}')
    return result.stdout.rstrip().rpartition('\n\n')[2]


def print_best(law, laws, budget, config, files, words):
    """The compute-optimal depth and tokens for a budget of FLOPs."""
    candidates = []  # (parameters, tokens, loss, settings) of each depth
    best = 0
    while len(candidates) < 2 * best + 10 and len(candidates) < 200:
        _, train = settle(files, words['train'], len(candidates) + 1, config)
        n, flops = measure(train)
        candidates.append((n, budget / flops, law.loss(n, budget / flops), train))
        best = min(range(len(candidates)), key=lambda i: candidates[i][2])
    n, d, loss, settings = candidates[best]
    ns, ds = (np.array([row[i] for row in candidates]) for i in (0, 1))
    low, high = scaling.interval([other.loss(ns, ds).argmin() + 1 for other in laws])
    power = law.b / (law.a + law.b)
    print(f'compute-optimal for {budget:.3g} FLOPs: depth {best + 1} ({low:.0f} to {high:.0f}), '
          f'{n / 1e6:,.2f}M parameters, {d / 1e6:,.1f}M tokens ({d / n:.1f} per parameter), loss '
          f'{loss:.4f}; N grows as FLOPs^{power:.2f}, D as FLOPs^{1 - power:.2f}')
    print(plan(files, words, settings, d))


def compare(points, folder):
    """Print what the runs in a folder are worth: the compute with which the ladder reaches their
    losses, over theirs."""
    paths = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    others = [point for point in map(read_point, paths) if point]
    require(others, f'compare: {folder} has no finished run')
    for other in others:
        require(other.windows == points[0].windows,
                f'compare: {folder / other.name} was evaluated on other windows: dataset, '
                f'block_size and eval_iters x batch_size must be {points[0].windows}, not '
                f'{other.windows}; train it with tools/scale.py, too')
    places = {(point.config.depth, point.d): i for i, point in enumerate(points)}
    pairs = np.array([places.get((other.config.depth, other.d), -1) for other in others])
    factor, (low, high) = scaling.speedup(arrays(points), arrays(others), pairs)
    verdict = '' if low > 1 or high < 1 else ': within the noise'
    print(f'{folder}: x{factor:.2f} compute (90%: {low:.2f} to {high:.2f}){verdict}; mean of '
          f'{plural(len(others), "run")}, {(pairs >= 0).sum()} of them beside one of the ladder of '
          f'equal depth and tokens')


def plot(points, law, target, path):
    """Losses and law against FLOPs, and the residuals. target: (parameters, tokens, FLOPs, loss,
    interval) or None. Returns False without matplotlib."""
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
        n, d, flops, loss, (low, high) = target
        top.errorbar([flops], [loss], [[max(loss - low, 0)], [max(high - loss, 0)]], fmt='k*',
                     capsize=4, label=f'predicted, {n / 1e6:.2f}M')
    top.set(xscale='log', yscale='log', ylabel='val loss (nats per token)')
    ticks = np.array(top.get_ylim())
    ticks = np.unique(np.round(np.geomspace(*ticks, 8)[1:-1], 1))
    top.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    top.set_yticks([], minor=True)
    top.set_title(describe(law), fontsize='medium')
    top.legend(fontsize='small')
    top.grid(alpha=0.3)
    bottom.axhline(0, color='gray', linewidth=1)
    bottom.set(xlabel='training FLOPs', ylabel='loss over law (%)')
    bottom.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    pyplot.close(figure)
    with os_errors(f'{path}: cannot write', 'choose another --out_dir'), create(path) as file:
        file.write(image.getvalue())
    return True


def describe(law):
    return f'L = {law.E:.3f} + {law.A:.4g} / N^{law.a:.3f} + {law.B:.4g} / D^{law.b:.3f}'


def report(config, rungs, epoch, files, words, target_plan):
    """Print and draw what the finished runs say."""
    points = [point for rung in rungs if (point := read_point(rung.folder))]
    n, d, losses = arrays(points)
    reason = scaling.why_not(n, d)
    law = None if reason else scaling.fit(n, d, losses)
    print('\n' + format_table(points, law, epoch))
    if reason:
        print(f'no law and no prediction: {reason}')
        return
    laws, _ = scaling.bootstrap(n, d, losses)
    bounds = [scaling.interval(values) for values in zip(*laws)]
    print(f'\n{describe(law)}, residuals {scaling.noise(law, n, d, losses):.2%}')
    print('90%: ' + ', '.join(f'{name} {low:.4g} to {high:.4g}' for name, (low, high)
                              in zip(law._fields, bounds) if name in 'Eab'))
    print_hold_out(points)
    target, budget = None, config.flops
    if config.predict_depth:
        _, settings = settle(files, words['train'], config.predict_depth, config)
        tokens = settings.max_iters * tokens_per_step(settings)
        target_n, flops = measure(settings)
        loss, (low, high) = scaling.predict(n, d, losses, target_n, tokens)
        target = target_n, tokens, flops * tokens, loss, (low, high)
        budget = budget or flops * tokens
        print(f'\ndepth {config.predict_depth}: {target_n / 1e6:.2f}M parameters, {tokens / 1e6:.2f}M '
              f'tokens, {flops * tokens:.3g} FLOPs ({flops * tokens / max(p.flops for p in points):.3g}'
              f' times the largest run): predicted val loss {loss:.4f} (90%: {low:.4f} to '
              f'{high:.4f})')
        print(target_plan)
    if budget:
        print()
        print_best(law, laws, budget, config, files, words)
    for folder in filter(None, config.compare.split(',')):
        compare(points, find(folder))
    path = Path(config.out_dir) / 'scale.png'
    print(path if plot(points, law, target, path) else 'for a plot: pip install matplotlib')


def main(config, rungs, files, words):
    """Returns the exit code."""
    check_folders(rungs)
    for folder in filter(None, config.compare.split(',')):
        require(find(folder).is_dir(), f'compare: {folder} is not a folder of runs')
    work, epoch = print_ladder(rungs)
    target_plan = ''
    if config.predict_depth:  # its mistakes before the training
        _, settings = settle(files, words['train'], config.predict_depth, config)
        tokens = settings.max_iters * tokens_per_step(settings)
        target_plan = plan(files, words, settings, tokens)
    for i, rung in enumerate(rungs):
        progress = f'{i + 1}/{len(rungs)} {rung.folder.name}'
        if read_point(rung.folder):
            print(f'{progress}: already done')
            continue
        print(f'{progress}, {sum(work[:i]) / sum(work):.0%} of the FLOPs are done', flush=True)
        code = train_rung(rung)
        if code:
            stopped = code > 128 or code < 0  # a signal, to this run and to the ladder
            print('stopped; the same command continues from here' if stopped else
                  f'{rung.folder.name} failed; the same command tries again')
            return code
    report(config, rungs, epoch, files, words, target_plan)
    return 0


if __name__ == '__main__':
    with user_errors():
        sys.exit(main(config, rungs, files, words))
