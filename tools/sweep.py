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
import typing
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from configurator import UserError, configure, read_config_file, require, user_errors


def read_command(argv):
    """-> (config files, {key: [texts of its values]}, out_dir). Raises UserError."""
    files = [word for word in argv if not word.startswith('-')]
    require(files, 'name a config file: python tools/sweep.py config/quickstart.py --learning_rate=1e-3,3e-3')
    values, types = {}, typing.get_type_hints(train.Config)
    for word in argv:
        if word.startswith('-'):
            key, equals, text = word.removeprefix('--').partition('=')
            require(equals, f'{word}: write --key=value, or --key=value,value')
            values[key] = text.split(',') if list not in map(typing.get_origin, typing.get_args(types.get(key))) else [text]
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
    return ','.join(f'{key}={re.sub(r"[^-+.\w]", "_", text)}' for key, text in choice.items()) or 'as-it-is'


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
