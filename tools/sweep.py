"""Train one model per combination of values, and compare them in a table and a plot.

    python tools/sweep.py config/quickstart.py --learning_rate=1e-3,3e-3 --n_layer=4,6
    python tools/sweep.py config/quickstart.py --activation=gelu,relu2 --seed=1,2,3

Each run gets its own folder in --out_dir (default: sweep-<config>). The same command continues
where it stopped; other commands add their runs to the same table, so you can also vary one key at a
time. Runs that differ only in their seed share a row: mean and standard deviation.
"""
import hashlib
import io
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import TrainConfig, help_text, read_config_file
from lib.errors import os_errors, require, user_errors
from lib.files import create, find, write_text
from lib.recipe import read_train_config

USAGE = """usage: python tools/sweep.py config/file.py [...] [--key=value,value,... ...]

The keys are those of train.py, and always take the form --key=value. Commas separate the values to
try. Every combination of values is one run; all of them are checked before the first one starts.
Config files are applied before the flags. The exit code is 1 if a run failed."""


MAX_RUNS = 10_000


def read_command(argv):
    """(out_dir, [(folder, train.py's arguments, config) of each run]). Raises UserError."""
    files = [str(find(word)) for word in argv if not word.startswith('-')]
    require(files, 'name a config file: python tools/sweep.py config/quickstart.py '
                   '--learning_rate=1e-3,3e-3')
    values = {}
    for word in argv:
        if word.startswith('-'):
            key, equals, text = word.removeprefix('--').partition('=')
            require(equals, f'{word}: write --key=value, or --key=value,value')
            values[key] = text.split(',')
    out_dirs = values.pop('out_dir', [f'sweep-{Path(files[-1]).stem}'])
    require(len(out_dirs) == 1 and out_dirs[0], 'out_dir: give one folder for the whole sweep')
    n_runs = math.prod(map(len, values.values()))
    require(n_runs <= MAX_RUNS, f'{n_runs:,} runs: give at most {MAX_RUNS:,} combinations')
    out_dir = Path(os.path.expanduser(out_dirs[0]))
    runs = []
    for choice in combinations(values):
        arguments = [*files, *(f'--{key}={text}' for key, text in choice.items())]
        config, _ = read_train_config(arguments)
        runs.append((out_dir / folder_name(choice), arguments, config))
    return out_dir, runs


def combinations(values):
    """Every choice of one value per key: [{key: text}]."""
    choices = [{}]
    for key, texts in values.items():
        choices = [choice | {key: text} for choice in choices for text in texts]
    return choices


def folder_name(choice):
    """A name of at most 255 bytes. One that does not spell out the choice ends in its hash."""
    text = ','.join(f'{key}={text}' for key, text in choice.items()) or 'as-it-is'
    name = re.sub(r'[^-+.,=\w]', '_', text)
    if name == text and len(name.encode()) <= 255:
        return name
    digest = hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:16]
    return name.encode()[:200].decode(errors='ignore') + ',' + digest


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        if '--help' in sys.argv or '-h' in sys.argv:
            _, _, keys = help_text(TrainConfig).partition('[--switch ...]\n')
            print(f'{__doc__}\n{USAGE}\n{keys}')
            sys.exit(0)
        out_dir, runs = read_command(sys.argv[1:])

from lib.bins import find_or_prepare
from lib.plot import import_pyplot
from lib.run import read_log


def read_result(folder):
    """{'config', 'step', 'val_loss', ...} of a run; None if it has not been evaluated yet."""
    try:
        config = TrainConfig(**read_config_file(str(folder / 'config.py'), TrainConfig))
    except ValueError:  # not a run, or one of another version
        return None
    lines = read_log(folder)
    evaluations = [line for line in lines if line.get('val_loss') is not None]
    if not evaluations:
        return None
    speeds = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line]
    last = evaluations[-1]
    return {'name': folder.name, 'config': asdict(config), 'step': last['step'],
            'val_loss': last['val_loss'], 'train_loss': last['train_loss'],
            'tokens_per_second': statistics.median(speeds) if speeds else None, 'lines': lines}


def varied_keys(results):
    """The keys in which the runs differ, except for out_dir."""
    return [key for key in asdict(TrainConfig()) if key != 'out_dir'
            and len({repr(result['config'][key]) for result in results}) > 1]


def format_table(results):
    """A Markdown table, best first, with one row for runs that differ only in their seed."""
    keys = [key for key in varied_keys(results) if key != 'seed']
    groups = {}
    for result in results:
        values = tuple(str(result['config'][key]) for key in keys)
        groups.setdefault(values, []).append(result)
    rows = []
    for values, group in groups.items():
        losses = [result['val_loss'] for result in group]
        val_loss = statistics.mean(losses)
        spread = f' ± {statistics.stdev(losses):.4f}' if len(group) > 1 else ''
        train_loss = statistics.mean(result['train_loss'] for result in group)
        speeds = [result['tokens_per_second'] for result in group if result['tokens_per_second']]
        speed = f'{statistics.median(speeds):,.0f}' if speeds else '-'
        rows.append((val_loss, [*values, str(len(group)), str(group[0]['step']),
                                f'{val_loss:.4f}{spread}', f'{train_loss:.4f}', speed]))
    header = [*keys, 'runs', 'steps', 'val loss', 'train loss', 'tokens/s']
    lines = [header, *(cells for _, cells in sorted(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ['-' * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def plot(results, path):
    """Val loss against each numeric key that varies, and training loss against steps. Returns False
    without matplotlib."""
    pyplot = import_pyplot()
    if pyplot is None:
        return False
    keys = [key for key in varied_keys(results) if key != 'seed'
            and all(type(result['config'][key]) in (int, float) for result in results)]
    n = len(keys) + 1
    figure, axes = pyplot.subplots(1, n, figsize=(5 * n, 4), layout='constrained', squeeze=False)
    *key_axes, loss_axis = axes[0]
    for axis, key in zip(key_axes, keys):
        values = [result['config'][key] for result in results]
        axis.plot(values, [result['val_loss'] for result in results], 'o')
        if min(values) > 0 and max(values) / min(values) > 5:
            axis.set_xscale('log')
        axis.set(xlabel=key, ylabel='val loss')
    for result in sorted(results, key=lambda result: result['val_loss']):
        lines = [line for line in result['lines'] if line.get('loss') is not None]
        loss_axis.plot([line['step'] for line in lines], [line['loss'] for line in lines],
                       label=result['name'], linewidth=1)
    loss_axis.set(xlabel='step', ylabel='training loss')
    if len(results) <= 12:
        loss_axis.legend(fontsize='x-small')
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    pyplot.close(figure)
    with create(path) as file:
        file.write(image.getvalue())
    return True


def train(folder, arguments):
    """Run or resume train.py in folder; returns its exit code."""
    command = [sys.executable, ROOT / 'train.py', *arguments, f'--out_dir={folder}']
    if any(folder.glob('ckpt_*.json')):
        command.append('--init_from=resume')
    return subprocess.run(command).returncode


def check_runs(runs):
    """Raise UserError before the first run if a data set is missing, or if a folder holds a run
    with other keys: of another config file, or of this one before it was edited."""
    for name in dict.fromkeys(config.dataset for *_, config in runs):
        find_or_prepare(name)
    for folder, _, config in runs:
        result = read_result(folder)
        saved = result['config'] if result else {}
        # None: derived from other keys
        changed = [key for key, value in asdict(config).items() if value is not None
                   and key not in ('out_dir', 'init_from') and saved.get(key, value) != value]
        require(not changed, f'{folder} holds a run with other values of {", ".join(changed)}: '
                             f'choose another --out_dir, or move the folder away')


def main(out_dir, runs):
    """Returns the exit code."""
    check_runs(runs)
    failed = []
    for i, (folder, arguments, config) in enumerate(runs):
        progress = f'{i + 1}/{len(runs)} {folder.name}'
        result = read_result(folder)
        if result and result['step'] >= config.max_iters:
            print(f'{progress}: already done')
            continue
        print(progress, flush=True)
        code = train(folder, arguments)
        if code > 128 or code < 0:  # a signal, to this run and to the sweep
            print('stopped; the same command continues from here')
            return code
        if code:
            failed.append(folder.name)
            print(f'{folder.name} failed: it is left out of the table')
    report(out_dir)
    if failed:
        print(f'{len(failed)} of {len(runs)} runs failed: {", ".join(failed)}; the same command '
              f'tries them again')
    return int(bool(failed))


def report(out_dir):
    """Write and print the table of all finished runs in out_dir, and the plot."""
    paths = sorted(out_dir.iterdir()) if out_dir.is_dir() else []
    results = [result for result in map(read_result, paths)
               if result and result['step'] >= result['config']['max_iters']]
    if not results:
        print(f'{out_dir}: no run has finished')
        return
    table = format_table(results)
    print(table)
    with os_errors(f'{out_dir}: cannot write the results', 'choose another --out_dir'):
        write_text(out_dir / 'table.md', table + '\n')
        if plot(results, out_dir / 'plot.png'):
            print(f'{out_dir / "table.md"}, {out_dir / "plot.png"}')
        else:
            print(f'{out_dir / "table.md"}; for a plot: pip install matplotlib')


if __name__ == '__main__':
    with user_errors():
        sys.exit(main(out_dir, runs))
