"""Train many runs that differ in a few keys, and say which differences are above the noise.

    python tools/sweep.py config/quickstart.py --learning_rate=1e-3,3e-3 --n_layer=4,6
    python tools/sweep.py config/quickstart.py --activation=gelu,relu2 --seed=1,2,3
    python tools/sweep.py config/quickstart.py --learning_rate=log:1e-3:1e-1 --trials=20 --halving=3

Each run gets its own folder in --out_dir. The same command continues where it stopped; other
commands add their runs to the same table, so you can also vary one key at a time. It ends with a
table (table.md) and a page with all curves (runs.html).

Values     --key=a,b,c: every combination is a run.
Ranges     --key=log:1e-4:1e-2 or --key=uniform:0:0.3: each of --trials draws a number, a whole one
           where the key takes only these, and goes with every combination of the values.
Seeds      --seed=1,2,3 repeats each setting. The table has the mean, its standard error, and the
           difference to the best setting, paired by seed where both have the same seeds, with p of
           a t-test of these two alone. "within noise": p > 0.05, which 1 of 20 equal ones fails.
Halving    --halving=3: all settings train for a fraction of their steps, on the schedule of the
           whole run; the best third goes on to three times as many, and so on (successive halving,
           Jamieson & Talwalkar 2016). A run that goes on is the same, bit by bit, as one that never
           stopped. An --eval_interval that does not divide the first fraction is set to it.
GPUs       One run on each, of those in CUDA_VISIBLE_DEVICES if it is set; --jobs says how many at a
           time, also on a CPU, whose cores they share unless OMP_NUM_THREADS is set. They print to
           output.txt in their folders.
Stopping   Ctrl-C or SIGTERM: each run saves. The exit code is 1 if a run failed.
"""
import math
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Bound, Count, FilePath, TrainConfig, WholeNumber, configure, help_text
from lib.budget import BUDGETS
from lib.errors import os_errors, plural, require, user_errors
from lib.files import command, find, write_text
from lib.recipe import read_train_config
from lib.trials import Range, combinations, folder_name, read_values, rungs, without_seed

MAX_RUNS = 10_000
ENDS = (*BUDGETS[1:], 'patience')  # keys that let a run end at another step than max_iters
TABLE_MARK = ' | val loss '  # in the first line of table.md


@dataclass
class Config:
    # sweep
    out_dir: FilePath = ''  # of the sweep; empty: sweep-<config>
    trials: Count | None = None  # how often to draw the keys that have a range
    sweep_seed: WholeNumber = 0  # of these draws
    halving: Annotated[int, Bound(lambda x: x >= 2, 'at least 2')] | None = None  # 1/N goes on
    jobs: Count | None = None  # runs at a time; None: one per GPU, or 1


class Trial(NamedTuple):
    folder: Path
    arguments: list  # of train.py
    config: TrainConfig
    setting: tuple  # the choice without the seed
    stops: list  # steps: the rungs of halving, then max_iters


def read_command(argv):
    """(Config, [Trial]). Raises UserError."""
    files = [str(find(word)) for word in argv if not word.startswith('-')]
    require(files, 'name a config file: python tools/sweep.py config/quickstart.py '
                   '--learning_rate=1e-3,3e-3')
    own, values = [], {}
    for word in argv:
        key, equals, text = word.removeprefix('--').partition('=')
        if word.startswith('-'):
            require(equals, f'{word}: write --key=value, or --key=value,value')
            if key in asdict(Config()):
                own.append(word)
            else:
                values.pop(key, None)  # re-insert: order matters for --depth
                values[key] = read_values(key, text)
    config, _ = configure(Config, own)
    config.out_dir = config.out_dir or f'sweep-{Path(files[-1]).stem}'
    drawn = [key for key, texts in values.items() if isinstance(texts, Range)]
    require(config.trials or not drawn, f'{", ".join(drawn)}: how many to draw? --trials=20')
    require(drawn or not config.trials, f'trials = {config.trials}: which key to draw? '
                                        f'--learning_rate=log:1e-4:1e-2')
    varied = [key for key, texts in values.items() if key in drawn or len(texts) > 1]
    n_runs = math.prod(len(values[key]) for key in values if key not in drawn)
    n_runs *= config.trials or 1
    require(n_runs <= MAX_RUNS, f'{n_runs:,} runs: give at most {MAX_RUNS:,}')
    choices = combinations(values, config.trials or 1, config.sweep_seed)
    n_settings = len(set(map(without_seed, choices)))
    runs = []
    for choice in choices:
        arguments = [*files, *(f'--{key}={text}' for key, text in choice.items())]
        run_config, _ = read_train_config(arguments)
        for key, value in (('eval_only', True), ('init_from', 'resume'), ('max_iters', 0)):
            require(getattr(run_config, key) != value,
                    f'{key} = {value}: the runs of a sweep train from the start: leave it out')
        stops = [run_config.max_iters]
        if config.halving:
            stops = rungs(run_config.max_iters, config.halving, n_settings)
            arguments += halving_flags(run_config, stops)
            run_config, _ = read_train_config(arguments)
        folder = Path(config.out_dir) / folder_name(choice, varied)
        runs.append(Trial(folder, arguments, run_config, without_seed(choice), stops))
    return config, runs


def end_of(config):
    """The key of ENDS that a config has, or None."""
    return next((key for key in ENDS if config[key] is not None), None)


def halving_flags(config, stops):
    """What keeps the schedule of a run that stops early, and evaluates it there. Raises UserError.
    """
    key = end_of(asdict(config))
    require(not key, f'{key}: the last step must be known for halving: give --max_iters instead')
    end, interval = config.lr_decay_iters, config.eval_interval
    require(end in (None, config.max_iters), f'lr_decay_iters = {end}: with halving, schedules end '
                                             f'at max_iters: leave it out')
    interval = stops[0] if stops[0] % interval else interval
    return [f'--eval_interval={interval}', f'--lr_decay_iters={config.max_iters}']


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        if '--help' in sys.argv or '-h' in sys.argv:
            _, _, keys = help_text(TrainConfig).partition('[--switch ...]\n')
            text = help_text(Config).replace('[config/file.py] [--key=value ...] [--switch ...]',
                                             'config/file.py [...] [--key=value,value,... ...]')
            print(f'{text}\n\nThe keys of train.py, always as --key=value:\n{keys}')
            sys.exit(0)
        if '--version' in sys.argv:
            configure(Config)
        config, runs = read_command(sys.argv[1:])

from lib import resume
from lib.bins import find_or_prepare
from lib.jobs import Jobs, check_keys, environments, make_folder, read_keys, val_losses
from lib.noise import compare, standard_error
from lib.page import RUNS_MARK, may_replace
from lib.run import read_log

# Training -----------------------------------------------------------------------------------------

def is_done(run, rung=-1):
    if len(run.stops) == 1 and has_ended(run.folder):
        return True
    known = end_of(asdict(run.config)) is None
    return known and max(val_losses(run.folder), default=-1) >= run.stops[rung]


def has_ended(folder):
    path = folder / 'status'
    return path.is_file() and path.read_text().startswith('done')


def train(jobs, runs, rung=-1):
    """Train the runs up to one of their stops."""
    waiting = []
    for run in runs:
        if is_done(run, rung):
            print(f'{run.folder.name}: already done')
            continue
        until = [f'--max_iters={run.stops[rung]}'] if len(run.stops) > 1 else []
        waiting.append((run.folder, run.arguments + until, until))
    jobs.train(waiting)


def halve(jobs, runs, eta):
    """Train the best 1/eta of the settings on and on, by the mean over their seeds at equal shares
    of their steps."""
    settings = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    ranked, n_rungs = list(settings), len(runs[0].stops)
    for rung in range(n_rungs):
        alive = ranked[:max(1, len(settings) // eta**rung)]
        share = f'1/{eta**(n_rungs - 1 - rung)} of their steps' if rung < n_rungs - 1 else 'the end'
        print(f'rung {rung + 1} of {n_rungs}: {plural(len(alive), "setting")}, up to {share}')
        train(jobs, [run for setting in alive for run in settings[setting]], rung)
        losses = {}
        for setting in alive:
            if all(is_done(run, rung) for run in settings[setting]):
                losses[setting] = statistics.mean(val_losses(run.folder)[run.stops[rung]]
                                                  for run in settings[setting])
        ranked = sorted(losses, key=losses.get)
        if jobs.stop or not ranked:
            return


# Results ------------------------------------------------------------------------------------------

class Result(NamedTuple):
    config: dict
    step: int
    full: int  # steps of the whole run: more than step if halving ended it
    val_loss: float
    train_loss: float
    speed: float  # tokens per second


def read_result(folder, full=None):
    """The Result of a run; None if it has not been evaluated yet. full: steps of the whole run, if
    halving may have ended it."""
    lines = read_log(folder)
    evaluations = [line for line in lines if line.get('val_loss') is not None]
    keys = read_keys(folder)
    if keys is None or not evaluations:
        return None
    config, last = asdict(TrainConfig(**keys)), evaluations[-1]
    if config['patience']:  # it has stopped after the best
        last = min(evaluations, key=lambda line: line['val_loss'])
    speeds = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line]
    step = evaluations[-1]['step']
    return Result(config, step, full or step, last['val_loss'], last['train_loss'],
                  statistics.median(speeds or [math.nan]))


def varied_columns(results, varied):
    """{key: values} of the varied keys and where the runs differ, apart from the seed and from what
    follows from depth."""
    columns = {key: [str(result.config[key]) for result in results]
               for key in asdict(TrainConfig()) if key not in ('out_dir', 'seed')}
    columns['max_iters'] = [str(max(result.full, result.config['max_iters'])) for result in results]
    if any(end_of(result.config) for result in results):
        del columns['max_iters']  # follows from the budget, or is not reached
    depths = columns['depth']
    n_depths = len(set(depths))
    return {key: column for key, column in columns.items() if key in varied or len(set(column)) > 1
            and (key == 'depth' or n_depths == 1 or len(set(zip(depths, column))) > n_depths)}


def format_table(results, varied=()):
    """A Markdown table, best first, with one row for runs that differ only in their seed. varied:
    keys that have a column in any case."""
    columns, groups = varied_columns(results, varied), {}
    for i, result in enumerate(results):
        values = tuple(column[i] for column in columns.values())
        group = groups.setdefault((-result.step / result.full, values), {})
        group[result.config['seed']] = result
    rows = []
    for (share, values), group in groups.items():
        losses = {seed: result.val_loss for seed, result in group.items()}
        rows.append((share, statistics.mean(losses.values()), values, losses, [*group.values()]))
    rows.sort(key=lambda row: row[:2])
    best_share, _, _, best, _ = rows[0]
    lines = [[*columns, 'seeds', 'steps', 'val loss', 'difference', 'train loss', 'tokens/s']]
    for share, loss, values, losses, group in rows:
        step = statistics.median_low(result.step for result in group)
        of_full = f'/{group[0].full}' * (step < group[0].full)
        error = f' ± {standard_error(losses.values()):.4f}' if len(losses) > 1 else ''
        against = 'best' if losses is best else '-'  # at another share: not comparable
        if losses is not best and share == best_share:
            against = difference_text(losses, best)
        train_loss = statistics.mean(result.train_loss for result in group)
        speed = statistics.median(result.speed for result in group)
        lines.append([*values, str(len(losses)), f'{step}{of_full}', f'{loss:.4f}{error}',
                      against, f'{train_loss:.4f}', f'{speed:,.0f}'])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def difference_text(losses, best):
    difference, error, p = compare(losses, best)
    if math.isnan(p):
        return f'{difference:+.4f}, one seed'
    verdict = f', p = {p:.2g}'
    if p > 0.05:  # a t-test of two seeds needs a difference of 13 standard errors
        few = min(len(losses), len(best)) < 3
        verdict += ', too few seeds to tell' if few else ', within noise'
    return f'{difference:+.4f} ± {error:.4f}{verdict}'


def check_runs(out_dir, runs):
    """Raise UserError before the first run if a model or a data set does not work, if nothing can
    be written, or if a folder holds a run with other keys: of another config file, or of this one
    before it was edited."""
    for name, mark in (('table.md', TABLE_MARK), ('runs.html', RUNS_MARK)):
        require(may_replace(out_dir / name, mark), f'{out_dir / name} is not of tools/sweep.py: '
                                                   f'move it, or choose another --out_dir')
    for run in runs:
        if run.config.init_from == 'scratch':
            resume.choose_model_config(run.config, {}, None)
    for name in dict.fromkeys(run.config.dataset for run in runs):
        find_or_prepare(name)
    for run in runs:
        derived = len(run.stops) > 1 or end_of(asdict(run.config)) is not None
        check_keys(run.folder, run.config, ['out_dir', 'init_from'] + ['max_iters'] * derived)
    make_folder(out_dir)


def varied_keys(runs):
    values = {}
    for run in runs:
        for key, text in run.setting:
            values.setdefault(key, set()).add(text)
    return [key for key, texts in values.items() if len(texts) > 1]


def report(out_dir, runs):
    """Print and write the table of all finished runs in out_dir, and the page. Returns False if
    that fails."""
    results, full = [], {run.folder: run.stops[-1] for run in runs if len(run.stops) > 1}
    for path in sorted(out_dir.iterdir()):
        result = read_result(path, full.get(path))
        if result and (has_ended(path) or not end_of(result.config)
                       and result.step >= result.config['max_iters']):
            results.append(result)
    if not results:
        print(f'{out_dir}: no run has finished')
        return True
    table = format_table(results, varied_keys(runs))
    print(f'{table}\n{out_dir / "table.md"}', flush=True)
    with os_errors(f'{out_dir}: cannot write the results', 'choose another --out_dir'):
        write_text(out_dir / 'table.md', table + '\n')
    page = subprocess.run([sys.executable, ROOT / 'tools' / 'runs.py', out_dir,
                           f'--out={out_dir / "runs.html"}'], stdout=subprocess.PIPE, text=True)
    if page.returncode == 0:
        print(page.stdout.splitlines()[-1])  # where it is
    return page.returncode == 0


def main(config, runs):
    """Returns the exit code."""
    out_dir, devices = Path(config.out_dir), {run.config.device for run in runs}
    check_runs(out_dir, runs)
    jobs = Jobs(environments(config.jobs, devices))
    print(f'{plural(len(runs), "run")}; to follow them: {command("tools/runs.py", out_dir)} '
          f'--serve')
    if config.halving:
        halve(jobs, runs, config.halving)
    else:
        train(jobs, runs)
    if jobs.stop:
        print('stopped; the same command continues from here')
        return 128 + jobs.stop
    reported = report(out_dir, runs)
    if jobs.failed:
        names = ', '.join(folder.name for folder in jobs.failed)
        print(f'{len(jobs.failed)} of {len(runs)} runs failed: {names}; they are not in the table, '
              f'and the same command tries them again')
    return int(bool(jobs.failed) or not reported)


if __name__ == '__main__':
    with user_errors():
        sys.exit(main(config, runs))
