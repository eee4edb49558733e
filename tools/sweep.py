"""Train one model for each combination of values, and compare them: a table and a plot.

    python tools/sweep.py config/quickstart.py --learning_rate=1e-3,3e-3 --n_layer=4,6
    python tools/sweep.py config/quickstart.py --activation=gelu,relu2 --seed=1,2,3

Any key of train.py takes several values, with commas between them. Each run has a folder of its own inside --out_dir
(sweep-<config>). The same command goes on where it stopped; other commands add their runs to the same table, so that one
key at a time can be changed too. Runs that differ in their seed alone are one line: mean and standard deviation.
"""
import json
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from configurator import read_config_file, require, user_errors


def read_command(argv):
    """-> (config files, {key: [texts of its values]}, out_dir). Raises UserError."""
    files = [word for word in argv if not word.startswith('-')]
    require(files, 'name a config file: python tools/sweep.py config/quickstart.py --learning_rate=1e-3,3e-3')
    values = {}
    for word in argv:
        if word.startswith('-'):
            key, equals, text = word.removeprefix('--').partition('=')
            require(equals, f'{word}: write --key=value, or --key=value,value')
            values[key] = text.split(',')
    out_dir = values.pop('out_dir', [f'sweep-{Path(files[-1]).stem}'])
    require(len(out_dir) == 1, 'out_dir: one folder for the whole sweep')
    return files, values, Path(out_dir[0])


def combinations(values):
    """Every choice of one value for each key: {key: text}."""
    chosen = [{}]
    for key, texts in values.items():
        chosen = [choice | {key: text} for choice in chosen for text in texts]
    return chosen


def folder_of(choice):
    name = ','.join(f'{key}={text}' for key, text in choice.items())
    return re.sub(r'[^-+.,=\w]', '_', name) or 'as-it-is'


def result_of(folder):
    """What a run's folder tells: {'config', 'step', 'val_loss', ...}; None where nothing was evaluated yet."""
    try:
        lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
        config = asdict(train.Config(**read_config_file(folder / 'config.py', train.Config)))
    except (OSError, ValueError):
        return None
    last = next((line for line in reversed(lines) if line.get('val_loss') is not None), None)
    if last is None:
        return None
    speeds = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line]
    return {'config': config, 'step': last['step'], 'val_loss': last['val_loss'], 'train_loss': last['train_loss'],
            'tokens_per_second': statistics.median(speeds) if speeds else None, 'lines': lines}


def differing(results):
    """The keys in which the runs differ, apart from their folder."""
    return [key for key in asdict(train.Config()) if key != 'out_dir' and len({repr(r['config'][key]) for r in results}) > 1]


def table(results):
    """Markdown, the best first: a line for all runs that differ in their seed alone."""
    keys = [key for key in differing(results) if key != 'seed']
    groups = {}
    for result in results:
        groups.setdefault(tuple(str(result['config'][key]) for key in keys), []).append(result)
    rows = []
    for values, runs in groups.items():
        losses = [run['val_loss'] for run in runs]
        loss, train_loss = statistics.mean(losses), statistics.mean(run['train_loss'] for run in runs)
        spread = f' ± {statistics.stdev(losses):.4f}' if len(runs) > 1 else ''
        speeds = [run['tokens_per_second'] for run in runs if run['tokens_per_second']]
        speed = f'{statistics.median(speeds):,.0f}' if speeds else '-'
        rows.append((loss, [*values, str(len(runs)), str(runs[0]['step']), f'{loss:.4f}{spread}', f'{train_loss:.4f}', speed]))
    lines = [[*keys, 'runs', 'steps', 'val loss', 'train loss', 'tokens/s'], *(cells for _, cells in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines)


def plot(results, path):
    """Val loss against each number that was varied, training loss against steps. -> whether matplotlib is there to draw it."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    keys = [key for key in differing(results)
            if key != 'seed' and all(type(r['config'][key]) in (int, float) for r in results)]
    figure, axes = plt.subplots(1, len(keys) + 1, figsize=(5 * (len(keys) + 1), 4), layout='constrained', squeeze=False)
    for axis, key in zip(axes[0], keys):
        axis.plot(*zip(*sorted((r['config'][key], r['val_loss']) for r in results)), 'o')
        values = [r['config'][key] for r in results]
        if min(values) > 0 and max(values) / min(values) > 5:
            axis.set_xscale('log')
        axis.set(xlabel=key, ylabel='val loss')
    for r in sorted(results, key=lambda r: r['val_loss']):
        points = [(line['step'], line['loss']) for line in r['lines'] if line.get('loss') is not None]
        axes[0][-1].plot(*zip(*points), label=r['name'], linewidth=1)
    axes[0][-1].set(xlabel='step', ylabel='training loss')
    if len(results) <= 12:
        axes[0][-1].legend(fontsize='x-small')
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main(argv):
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return 0
    files, values, out_dir = read_command(argv)
    runs = []
    for choice in combinations(values):  # all of them are looked at before the first is trained
        words = [*files, *(f'--{key}={text}' for key, text in choice.items())]
        config, _ = train.read_command(words)
        runs.append((out_dir / folder_of(choice), words, config))
    for i, (folder, words, config) in enumerate(runs):
        done = result_of(folder)
        if done and done['step'] >= config.max_iters:
            print(f'{i + 1}/{len(runs)} {folder.name}: done before')
            continue
        print(f'{i + 1}/{len(runs)} {folder.name}', flush=True)
        resume = ['--init_from=resume'] * any(folder.glob('ckpt_*.json'))
        code = subprocess.run([sys.executable, ROOT / 'train.py', *words, f'--out_dir={folder}', *resume]).returncode
        if code > 128 or code < 0:  # a signal, to this run and to the sweep
            print('stopped; the same command goes on from here')
            return code
        if code:
            print(f'{folder.name} failed: it is left out of the table')
    results = [dict(result, name=path.name) for path in sorted(out_dir.iterdir()) if (result := result_of(path))]
    results = [result for result in results if result['step'] >= result['config']['max_iters']]
    require(results, f'{out_dir}: no run has come to its end')
    text = table(results)
    (out_dir / 'table.md').write_text(text + '\n', encoding='utf-8')
    drawn = plot(results, out_dir / 'plot.png')
    print(text)
    print(f'{out_dir / "table.md"}' + (f', {out_dir / "plot.png"}' if drawn else '; for a plot: pip install matplotlib'))
    return 0


if __name__ == '__main__':
    with user_errors():
        sys.exit(main(sys.argv[1:]))
