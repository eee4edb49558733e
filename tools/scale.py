"""Predict a large run from small ones: train a ladder of models and fit a scaling law to it.

    python tools/scale.py config/quickstart.py --depths=1,2,3,4 --tokens_per_layer=725e3
    python tools/scale.py config/train_gpt2.py --depths=2,3,4,6,8 --predict_depth=12 --gpu=h100
    python tools/scale.py config/x.py --depths=2,3,4,6 --compare=scale-other

Each depth is one stable run at a constant rate. Where the decay of a horizon begins, a copy
branches off and decays: bit by bit what a run of that length gives, in fewer steps (wsd: Hu et al.
2024). Batch and rates are those of --depth for the longest horizon, the same for all of a depth:
much shorter ones lose by its batch, and the law has no term for that. The law is L = E + A / N^a
+ B / D^b; N: parameters in matrix products (blocks and head), D: tokens; lib/scaling.py says how it
is fitted. Only the noise is in its intervals, not whether it holds: see the size that is left out.
The same command continues where it stopped.
"""
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
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
)
from lib.budget import BUDGETS, tokens_per_step
from lib.errors import os_errors, plural, require, user_errors
from lib.files import find
from lib.recipe import read_train_config

USAGE = """
keys of train.py, which hold for all runs
{}
keys of tools/plan.py, for hours and cost: {}"""
# of tools/plan.py
PLAN_KEYS = ('gpu', 'gpus', 'gpus_per_machine', 'network', 'mfu', 'price')
# of train.py, which this tool sets
OWN_KEYS = (*BUDGETS, 'patience', 'depth', 'lr_decay_iters', 'schedule', 'decay_lr', 'extended_at',
            'init_from', 'eval_only', 'eval_interval', 'eval_iters', 'save_interval',
            'sample_every_eval')
EVAL_WINDOWS = 1024  # of the final evaluation


@dataclass
class Config:
    # ladder
    depths: list[int] = field(default_factory=lambda: [2, 3, 4, 6])  # settings of --depth to train
    horizons: list[int | float] = field(
        default_factory=lambda: [0.4, 0.55, 0.75, 1])  # lengths of runs, as shares of the tokens
    tokens_per_layer: Count | None = None  # of a full run; None: the tokens that --depth implies
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
    """(Config, [Rung], config files, {'own', 'plan', 'train': flags}). Raises UserError."""
    files = [str(find(word)) for word in argv if not word.startswith('-')]
    require(files, 'name a config file: python tools/scale.py config/quickstart.py --depths=1,2,3')
    words = {'own': [], 'plan': [], 'train': []}
    for word in argv:
        if word.startswith('-'):
            key, equals, _ = word.removeprefix('--').partition('=')
            require(equals, f'{word}: write --key=value')
            require(key not in OWN_KEYS, f'{key}: the ladder sets it itself: leave it out')
            own = 'own' if key in key_types(Config) else 'train'
            words['plan' if key in PLAN_KEYS else own].append(word)
    config, _ = configure(Config, words['own'])
    config.out_dir = config.out_dir or f'scale-{Path(files[-1]).stem}'
    config.depths, config.horizons = sorted(set(config.depths)), sorted(set(config.horizons))
    require(config.depths and min(config.depths) >= 1, 'depths: give numbers of 1 or more')
    require(config.horizons and min(config.horizons) > 0, 'horizons: give numbers above 0')
    settings = [(depth, *settle(files, words['train'], depth, config))
                for depth in config.depths]
    n_windows = math.lcm(*(train.batch_size for *_, train in settings))
    n_windows *= math.ceil(EVAL_WINDOWS / n_windows)
    rungs = [rung for depth, arguments, train in settings
             for rung in make_rungs(depth, arguments, train, config, n_windows)]
    return config, rungs, files, words


def settle(files, flags, depth, config):
    """(train.py's arguments, their TrainConfig) of a full run at a depth."""
    arguments = [*files, f'--depth={depth}', *flags]
    train, _ = read_train_config(arguments)
    require(not train.auto_batch_size, 'batch_size = auto: all runs of a depth need one batch: '
                                       'give a number')
    tokens = train.max_iters * tokens_per_step(train)
    if config.tokens_per_layer:
        tokens = config.tokens_per_layer * depth
    longest = round(tokens * max(config.horizons))
    train, _ = read_train_config([*arguments, f'--target_tokens={longest}'])
    train.max_iters = max(1, round(tokens / tokens_per_step(train)))
    arguments += [f'--{key}={getattr(train, key)}'
                  for key in ('batch_size', 'gradient_accumulation_steps')]
    return arguments, train


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
        if '--version' in sys.argv:
            configure(Config)
        config, rungs, files, words = read_command(sys.argv[1:])

import numpy as np

from checkpoint import manifests
from lib import bins, scaling
from lib import device as devices
from lib.jobs import Jobs, check_keys, make_folder
from lib.ladder import (
    STABLE,
    arrays,
    describe,
    describe_evaluation,
    format_table,
    measure,
    plot,
    read_point,
)

# Training ----------------------------------------------------------------------------------------


def check_folders(rungs):
    """Raises UserError if a folder of the ladder holds a run with other keys."""
    free = {*OWN_KEYS, 'out_dir', 'wandb_run_name'} - {'depth'}
    for rung in rungs:
        for folder in (rung.folder, stable_folder(rung)):
            check_keys(folder, rung.config, free)


def stable_folder(rung):
    return rung.folder.with_name(f'depth{rung.depth}{STABLE}')


def last_step(folder):
    """The step of a run's last checkpoint, 0 if there is none."""
    return max((manifest['step'] for manifest in manifests(folder)), default=0)


def train_rung(jobs, rung):
    """Train or go on with a run of the ladder."""
    stable = stable_folder(rung)
    if not last_step(rung.folder) and 0 < rung.branch:
        if last_step(stable) < rung.branch:
            train(jobs, stable, rung.words, '--schedule=constant', f'--max_iters={rung.branch}',
                  '--eval_iters=1', '--eval_interval=1000000000')
            if jobs.stop or jobs.failed:
                return
        if last_step(stable) == rung.branch:
            branch_off(stable, rung.folder)
        # else it is beyond: a horizon was added; this run then starts from scratch
    evaluations = [word for word in rung.words if word.startswith('--eval_')]
    train(jobs, rung.folder, rung.words, '--schedule=wsd',
          f'--max_iters={rung.config.max_iters}', *evaluations)


def train(jobs, folder, words, *changes):
    """Run train.py in folder, or resume it with the changes alone."""
    jobs.train([(folder, [*words, *changes], changes)])


def branch_off(stable, folder):
    """Copy a run's checkpoint and log, not its keys: the copy is no finished run. The manifests
    come last, so that a copy that was cut off has no checkpoint and is made again."""
    skipped = ('config.py', 'status', '.lock', 'wandb*', 'earlier-*', '*.tmp', '*.json')
    with os_errors(f'{folder}: cannot write', 'choose another --out_dir'):
        shutil.copytree(stable, folder, ignore=shutil.ignore_patterns(*skipped), dirs_exist_ok=True)
        for manifest in stable.glob('ckpt_*.json'):
            shutil.copy(manifest, folder)


# Reporting ---------------------------------------------------------------------------------------


def print_ladder(config, rungs):
    """Say what is to be trained, that data are repeated, that a ladder is too small to predict.
    Returns (FLOPs that each run adds, tokens of the training split)."""
    first = rungs[0].config
    folder = bins.find_or_prepare(first.dataset)
    epoch = bins.open_dataset(folder, first.block_size).train.n_tokens
    n, d, work, shared = [], [], [], {}
    for rung in rungs:
        size, flops = measure(rung.config)
        per_step = tokens_per_step(rung.config)
        n.append(size)
        d.append(rung.config.max_iters * per_step)
        work.append((rung.config.max_iters - shared.get(rung.depth, 0)) * per_step * flops)
        shared[rung.depth] = rung.branch  # the stable steps, which the next run does not repeat
    print(f'{plural(len(rungs), "run")} in {config.out_dir}, {sum(work):.3g} FLOPs; val loss over '
          f'the same {describe_evaluation(first)} for all, or the whole split if it has fewer')
    if max(d) > 1.01 * epoch:
        print(f'note: the longest run has {max(d) / epoch:.1f} epochs of {epoch:,} tokens: '
              f'repeated tokens are worth less than new ones (Muennighoff et al. 2023), which the '
              f'law ignores; --tokens_per_layer={epoch // max(config.depths)} stays within one')
    dtypes = {rung.depth: dtype_of(rung.config) for rung in rungs}
    if len(set(dtypes.values())) > 1:
        words = ', '.join(f'depth {depth} in {name}' for depth, name in dtypes.items())
        print(f'note: {words}: --dtype=float32 trains all alike')
    reason = scaling.why_not(n, d)
    if reason:
        print(f'note: {reason}: there will be no law; give more --depths or --horizons')
    return work, epoch


def dtype_of(train):
    return devices.dtype_name(devices.pick_dtype(train.dtype, devices.pick_device(train.device),
                                                 train.n_embd))


def print_hold_out(points):
    """The error of the law of the others for the largest size."""
    n, d, losses = arrays(points)
    smaller = n < n.max()
    reason = scaling.why_not(n[smaller], d[smaller], held_out=True)
    if reason:
        print(f'note: the law is not checked on a size that was left out: of the others, {reason}; '
              f'give one more of --depths')
        return
    law = scaling.fit(n[smaller], d[smaller], losses[smaller])
    errors = law.loss(n[~smaller], d[~smaller]) / losses[~smaller] - 1
    print(f'largest size left out ({n.max() / n[smaller].max():.1f} times the next): the others '
          f'predict its losses with errors of {", ".join(f"{error:+.2%}" for error in errors)}')


class Target(NamedTuple):
    """The run to predict."""
    settings: TrainConfig
    n: float
    d: float
    flops: float
    plan: str  # its time and cost


def find_target(config, files, words):
    """The Target, or None if none is asked for. Raises UserError if it cannot be trained."""
    if not config.predict_depth:
        return None
    _, settings = settle(files, words['train'], config.predict_depth, config)
    n, flops = measure(settings)
    d = settings.max_iters * tokens_per_step(settings)
    return Target(settings, n, d, flops * d, plan(files, words, settings, d))


def plan(files, words, settings, tokens):
    """The last table of tools/plan.py for a run of so many tokens: time and cost."""
    steps = max(1, round(tokens / tokens_per_step(settings)))
    command = [sys.executable, ROOT / 'tools' / 'plan.py', *files, f'--depth={settings.depth}',
               *words['train'], f'--batch_size={settings.batch_size}', f'--max_iters={steps}',
               f'--gradient_accumulation_steps={settings.gradient_accumulation_steps}',
               '--gpus=1', *words['plan']]
    result = subprocess.run(command, capture_output=True, text=True)
    reason = result.stderr.strip().removeprefix('plan.py: ')
    require(result.returncode == 0, f'tools/plan.py: {reason}')
    table = result.stdout.rstrip().rpartition('\n\n')[2].splitlines()
    # without the tokens by another law than the one fitted here
    return '\n'.join(line for line in table if not line.startswith('  tokens '))


def print_prediction(points, ladder, target, epoch):
    """Returns (loss, its interval)."""
    loss, (low, high) = scaling.predict(ladder, target.n, target.d)
    ratio = target.flops / max(point.flops for point in points)
    print(f'\ndepth {target.settings.depth}, {target.n / 1e6:,.2f}M parameters, '
          f'{target.d / 1e6:,.2f}M tokens ({target.d / epoch:.1f} epochs), {target.flops:.3g} '
          f'FLOPs ({ratio:.3g} times the largest run of the ladder):\n'
          f'predicted val loss {loss:.4f} (90%: {low:.4f} to {high:.4f})\n{target.plan}')
    return loss, (low, high)


def print_best(points, ladder, budget, epoch, config, files, words):
    """The compute-optimal depth and tokens for a budget of FLOPs."""
    rows, best = [], 0  # (parameters, tokens, loss, settings) of depth 1, 2, ...
    while len(rows) < 2 * best + 10 and len(rows) < 200:
        _, settings = settle(files, words['train'], len(rows) + 1, config)
        n, flops = measure(settings)
        rows.append((n, budget / flops, ladder.law.loss(n, budget / flops), settings))
        best = min(range(len(rows)), key=lambda i: rows[i][2])
    n, d, loss, settings = rows[best]
    all_n, all_d = (np.array([row[i] for row in rows]) for i in (0, 1))
    beyond = max(n / max(point.n for point in points), d / max(point.d for point in points))
    if beyond > 20:
        print(f'\ncompute-optimal for {budget:.3g} FLOPs: by this law depth {best + 1} and '
              f'{d / 1e6:,.0f}M tokens, {beyond:.0f} times what the ladder has measured: give it '
              f'more --depths or --tokens_per_layer to rely on')
        return
    low, high = scaling.interval([law.loss(all_n, all_d).argmin() + 1 for law in ladder.laws])
    power = ladder.law.b / (ladder.law.a + ladder.law.b)
    print(f'\ncompute-optimal for {budget:.3g} FLOPs: depth {best + 1} (90%: {low:.0f} to '
          f'{high:.0f}), {n / 1e6:,.2f}M parameters, {d / 1e6:,.2f}M tokens ({d / n:.1f} per '
          f'parameter, {d / epoch:.1f} epochs), val loss {loss:.4f};\n'
          f'the best N grows as FLOPs^{power:.2f}, D as FLOPs^{1 - power:.2f} '
          f'(Hoffmann et al. 2022: 0.5 each)')
    print(plan(files, words, settings, d))


def read_others(config, rungs):
    """{folder: [Point]} to compare with. Raises UserError if they do not compare."""
    found, windows = {}, describe_evaluation(rungs[0].config)
    for name in filter(None, config.compare.split(',')):
        folder = find(name)
        require(folder.is_dir(), f'compare: there is no folder {name}')
        paths = [folder, *sorted(folder.iterdir())]
        found[name] = [point for point in map(read_point, paths) if point]
        require(found[name], f'compare: {name} has no finished run')
        for point in found[name]:
            other = describe_evaluation(point.config)
            require(other == windows,
                    f'compare: {name}: {point.name} was evaluated on {other}, the ladder on '
                    f'{windows}: train it with tools/scale.py')
    return found


def print_speedup(points, ladder, name, others):
    """What other runs are worth: the compute with which the ladder reaches their losses, over
    theirs."""
    places = {(point.config.depth, point.d): i for i, point in enumerate(points)}
    pairs = np.array([places.get((other.config.depth, other.d), -1) for other in others])
    factor, (low, high) = scaling.speedup(ladder, arrays(points)[2], arrays(others), pairs)
    verdict = ', within the noise' * (low <= 1 <= high)
    print(f'{name}: x{factor:.2f} compute (90%: {low:.2f} to {high:.2f}){verdict}; '
          f'{plural(len(others), "run")}, {(pairs >= 0).sum()} against one of the ladder with '
          f'equal depth and tokens')


def report(config, rungs, epoch, target, others, files, words):
    """Print and draw what the runs say."""
    points = [read_point(rung.folder) for rung in rungs]
    n, d, losses = arrays(points)
    reason = scaling.why_not(n, d)
    law = None if reason else scaling.fit(n, d, losses)
    print('\n' + format_table(points, law, epoch))
    if reason:
        print(f'no law and no prediction: {reason}')
        return
    ladder = scaling.bootstrap(n, d, losses)
    intervals = dict(zip(law._fields, map(scaling.interval, zip(*ladder.laws))))
    ranges = [f'{name} {low:.3g} to {high:.3g}' for name, (low, high) in intervals.items()
              if name in 'Eab']
    print(f'\n{describe(law)}\nN: parameters in matrix products (blocks and head), D: tokens, E: '
          f'the loss that no model gets below\n90%: {", ".join(ranges)}; residuals '
          f'{scaling.noise(law, n, d, losses):.2%}')
    low, high = intervals['E']
    if high > 2 * low:
        print('note: the ladder does not determine E: rely on the law near these runs only; more '
              '--depths or longer runs help')
    print_hold_out(points)
    predicted = print_prediction(points, ladder, target, epoch) if target else None
    path = Path(config.out_dir) / 'scale.png'
    drawn = plot(points, law, target and (target.flops, *predicted), path)
    print(f'\n{path}' if drawn else '\nfor a plot: pip install matplotlib')
    for name, found in others.items():
        print_speedup(points, ladder, name, found)
    budget = config.flops or target and target.flops
    if budget:
        print_best(points, ladder, budget, epoch, config, files, words)


def main(config, rungs, files, words):
    """Returns the exit code."""
    check_folders(rungs)
    others = read_others(config, rungs)
    work, epoch = print_ladder(config, rungs)
    target = find_target(config, files, words)
    make_folder(Path(config.out_dir))
    jobs = Jobs([{}], quiet=True)
    for i, rung in enumerate(rungs):
        progress = f'{i + 1}/{len(rungs)} {rung.folder.name}'
        if read_point(rung.folder):
            print(f'{progress}: already done')
            continue
        print(f'{progress}: {sum(work[:i]) / sum(work):.0%} of the FLOPs are done', flush=True)
        train_rung(jobs, rung)
        if jobs.stop:
            print('stopped; the same command continues from here')
            return 128 + jobs.stop
        if jobs.failed:
            print(f'{jobs.failed[0].name} failed; the same command tries again')
            return 1
    report(config, rungs, epoch, target, others, files, words)
    return 0


if __name__ == '__main__':
    with user_errors():
        sys.exit(main(config, rungs, files, words))
