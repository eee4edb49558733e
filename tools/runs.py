"""Compare runs: a table of all runs below some folders, and a page with their curves.

    python tools/runs.py                              # below the working directory
    python tools/runs.py sweep-quickstart out-mine --out=compare.html
    python tools/runs.py --serve                      # the page follows runs while they train
    python tools/runs.py --png=val_loss.png           # the picture for a README

A run is a folder with a log.jsonl; runs that were set aside (earlier-1) are left out unless they
are named. The page is one file that opens from disk and loads nothing.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import FilePath, Port, configure, help_text
from lib.errors import duration, os_errors, plural, require, user_errors
from lib.files import find, relative
from lib.page import RUNS_MARK, may_replace


@dataclass
class Config:
    # output
    out: FilePath = 'runs.html'  # the page; empty: the table only
    png: FilePath = ''  # also draw the val losses into this file (pip install matplotlib)
    # system
    serve: bool = False  # serve the page on this machine instead: it follows runs as they train
    port: Port = 8338  # for --serve, on 127.0.0.1; 0: any free port


def read_command(argv):
    """(folders, Config): words without -- are folders. Raises UserError."""
    if '--help' in argv or '-h' in argv:
        print(help_text(Config).replace('[config/file.py]', '[FOLDER ...]'))
        sys.exit(0)
    words, folders, flags = list(argv), [], []
    while words:
        word = words.pop(0)
        (flags if word.startswith('-') else folders).append(word)
        if word in ('--out', '--png', '--port') and words:  # --key value
            flags.append(words.pop(0))
    config, _ = configure(Config, flags)
    folders = [find(folder) for folder in folders or ['.']]
    for folder in folders:
        require(folder.is_dir(), f'{folder}: there is no such folder: name a run, or a folder '
                                 f'with runs in it')
    for key, path in (('out', config.out), ('png', config.png)):
        path = path and Path(path)
        require(not path or path.parent.is_dir() and not path.is_dir(),
                f'{key} = {str(path)!r}: name a file in a folder that exists')
        require(not path or may_replace(path, RUNS_MARK),
                f'{key} = {str(path)!r} is a file that this program has not written: move it, or '
                f'choose another --{key}')
    return folders, config


if __name__ == '__main__':  # before the slow imports, so that --help and typos answer at once
    with user_errors():
        folders, config = read_command(sys.argv[1:])

import ast
import base64
import contextlib
import ctypes
import functools
import json
import math
import os
import pickle
import re
import shutil
import time
import zlib
from dataclasses import fields
from urllib.parse import quote

import numpy as np
import torch

import checkpoint as ckpt
from configurator import GPTConfig, ModelConfig, read_model_config
from lib import bins
from lib.files import command, printable, write_text
from lib.memory import Sizes
from lib.page import DATA, nan_to_none, page_template
from lib.plot import import_pyplot, save_png
from lib.run import read_log, read_samples
from lib.serve import Server, serve
from model import GPT

MAX_DEPTH = 4  # of folders below the given ones
SKIPPED = re.compile(r'\..*|data|earlier-\d+|wandb|tensorboard|site-packages|node_modules|'
                     '__pycache__')
MAX_POINTS = 1000  # a longer log is drawn as means of lines
FIRST, REST = 100, 400  # its points: the first lines one by one, means of the others
MAX_SAMPLES = 100  # of a run
STEP_CURVES = ('loss', 'grad_norm', 'tokens_per_second')  # with their extremes
GROUPS = ('muon', 'adamw', 'embeddings', 'gains')  # of the optimizer
SMOOTH_CURVES = ('lr', 'noise_scale', 'peak_memory', *(f'update_ratio_{name}' for name in GROUPS))
EVALUATION_CURVES = ('val_loss', 'train_loss', 'val_bits_per_byte')
# not a difference between runs: names, and where they began
NAMES = {'out_dir', 'init_from', 'wandb_run_name', 'wandb_project', 'wandb_log', 'tensorboard_log',
         'extended_at'}
POLL_SECONDS = 3


# Reading runs -------------------------------------------------------------------------------------

def find_runs(folders):
    """The folders with a log.jsonl in or below the given ones."""
    found, seen = [], set()
    for root in folders:
        for folder, names, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if 'log.jsonl' in files and real not in seen:
                found.append(Path(folder))
            depth = len(Path(folder).relative_to(root).parts)
            goes_on = depth < MAX_DEPTH and real not in seen  # links may form a cycle
            names[:] = sorted(name for name in names if goes_on and not SKIPPED.fullmatch(name))
            seen.add(real)
    return found


def short_names(folders):
    """Their paths below the folder that they share."""
    paths = [os.path.realpath(folder) for folder in folders]
    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # on several drives of Windows
        return [printable(path) for path in paths]
    return [printable(os.path.relpath(path, shared)) for path in paths]


def read_config(folder):
    """{key: value} of config.py, which may be of another version, or of the last checkpoint."""
    try:
        tree = ast.parse((folder / 'config.py').read_text(encoding='utf-8'))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        manifests = ckpt.manifests(folder)
        return manifests[0]['config'] if manifests else {}
    config = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                try:
                    config[key] = ast.literal_eval(node)
                except (ValueError, TypeError):  # not a value: inf
                    config[key] = ast.unparse(node)
    return config


def read_status(folder):
    """running, done, stopped or failed; killed: it says running, but the process is gone; unknown:
    the run is of another version."""
    try:
        status, *pid = (folder / 'status').read_text(encoding='utf-8').split()
    except (OSError, ValueError):
        return 'unknown'
    if status == 'running':
        return 'running' if is_alive(pid) else 'killed'
    return status if status in ('done', 'stopped', 'failed') else 'unknown'


def is_alive(pid):
    """Whether there is a process with the id in this list of words."""
    try:
        if os.name == 'nt':  # where signal 0 would end it
            kernel = ctypes.windll.kernel32
            process = kernel.OpenProcess(0x100000, False, int(pid[0]))  # SYNCHRONIZE
            ended = kernel.WaitForSingleObject(process, 0) != 0x102  # WAIT_TIMEOUT: it runs
            kernel.CloseHandle(process)
            return not ended
        os.kill(max(1, int(pid[0])), 0)
    except PermissionError:
        return True
    except (IndexError, ValueError, OverflowError, ProcessLookupError):
        return False
    return True


def column(lines, key):
    """A number of each line, nan where there is none."""
    values = [line.get(key) for line in lines]
    with contextlib.suppress(OverflowError):  # an int of hundreds of digits
        return np.array(values, dtype=float)
    return np.full(len(values), math.nan)


def bucket_starts(n):
    """Where the n lines of a log are cut into points: all of them, or about FIRST + REST."""
    if n <= MAX_POINTS:
        return np.arange(n)
    rest = np.linspace(FIRST, n - 1, REST, endpoint=False)
    return np.unique(np.concatenate((np.arange(FIRST), rest, [n - 1])).astype(int))


def means(values, starts):
    known = np.isfinite(values)
    with np.errstate(invalid='ignore'):
        return (np.add.reduceat(np.where(known, values, 0), starts)
                / np.add.reduceat(known.astype(int), starts))


def rounded(values, digits):
    """A list of floats with this many significant digits, which are short in JSON."""
    with np.errstate(divide='ignore', invalid='ignore'):
        size = np.floor(np.log10(np.abs(values)))
        scale = 10.0 ** np.where(np.isfinite(size), digits - 1 - size, 0)
    return (np.round(values * scale) / scale).tolist()


def progress(lines, config):
    """The steps that the lines report, and the tokens, epochs and seconds of training at the end of
    each: {name: (n,)}. Evaluations and saves take no time here. nan: neither log nor config says.
    """
    per_step = tokens_per_step(config)
    steps = column(lines, 'step')
    tokens = column(lines, 'samples_seen') * number_of(config, 'block_size')
    tokens = np.where(np.isfinite(tokens), tokens, (steps + 1) * per_step)
    speed = column(lines, 'tokens_per_second')
    with np.errstate(divide='ignore', invalid='ignore'):
        seconds = np.diff(tokens, prepend=0) / speed
    seconds = np.cumsum(np.where(np.isfinite(seconds), seconds, 0))
    return {'step': steps, 'tokens': tokens, 'epoch': column(lines, 'epoch'), 'seconds': seconds}


def tokens_per_step(config):
    keys = ('batch_size', 'gradient_accumulation_steps', 'block_size')
    return math.prod(number_of(config, key) for key in keys)


def number_of(config, key):
    value = config.get(key)
    return value if type(value) in (int, float) else math.nan


def at_steps(steps, known_steps, values):
    """values, which are those at the end of known_steps, at the beginning of steps. The line
    through the last two goes on beyond them."""
    if not len(known_steps):
        return np.full(len(steps), math.nan)
    ends = known_steps + 1
    found = np.interp(steps, np.concatenate(([0], ends)), np.concatenate(([0], values)))
    before = (ends[-2], values[-2]) if len(ends) > 1 else (0, 0)
    slope = (values[-1] - before[1]) / (ends[-1] - before[0])
    return found + np.maximum(steps - ends[-1], 0) * slope


def step_curves(lines, axes):
    """The curves of the steps for the page: {name: list}. axes: of progress."""
    if not lines:
        return {}
    starts = bucket_starts(len(lines))
    curves = {name: rounded(means(values, starts), 8) for name, values in axes.items()
              if np.isfinite(values).any()}
    for name in (*STEP_CURVES, *SMOOTH_CURVES):
        values = column(lines, name)
        if not np.isfinite(values).any():
            continue
        curves[name] = rounded(means(values, starts), 5)
        if len(starts) < len(lines) and name in STEP_CURVES:
            curves[f'{name}_low'] = rounded(np.fmin.reduceat(values, starts), 4)
            curves[f'{name}_high'] = rounded(np.fmax.reduceat(values, starts), 4)
    return curves


def evaluation_curves(evaluations, axes):
    """The same of the evaluations, with all digits; axes: those of the steps."""
    steps = column(evaluations, 'step')
    curves = {'step': steps} | {name: at_steps(steps, axes['step'], axes[name])
                                for name in ('tokens', 'epoch', 'seconds')}
    curves |= {name: column(evaluations, name) for name in EVALUATION_CURVES}
    starts = bucket_starts(len(evaluations))
    return {name: values[starts].tolist() for name, values in curves.items()
            if np.isfinite(values).any()}


def size_of(folder, config):
    """(parameters, FLOPs per token) of a run, from its last checkpoint, or from its keys and its
    data; (None, None) if neither can be read."""
    try:
        paths = sorted(folder.glob('ckpt_[0-9]*.pt'))
        if paths:
            model_config = torch.load(paths[-1], mmap=True, weights_only=True)['model_config']
        else:
            keys = {field.name for field in fields(ModelConfig)} - {'prefix_lm'}  # needs pairs
            model_config = {key: config[key] for key in keys if key in config}
            model_config['vocab_size'] = vocab_size_of(config['dataset'])
        return model_size(config.get('lora_rank') or 0, **read_model_config(model_config))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError,
            pickle.UnpicklingError):  # damaged, of another version, or gone
        return None, None


@functools.cache
def vocab_size_of(dataset):
    return bins.open_tokenizer(bins.find_dataset(dataset)).vocab_size


@functools.cache
def model_size(lora_rank, **model_config):
    """(parameters, FLOPs per token)"""
    sizes = Sizes(GPTConfig(**model_config), torch.device('meta'), lora_rank)
    return sizes.n_params(), sizes.of(GPT.flops_per_token)


def ordered(log, key):
    """The lines with this key by their step, the last one of each."""
    lines = {line['step']: line for line in log if key in line and 0 <= line['step'] < 2**53}
    return [lines[step] for step in sorted(lines)]


def is_finite(value):
    return value is not None and abs(value) < 1e300


def read_run(folder, name):
    """What the table and the page show of a run, or None if the folder holds none."""
    config, log = read_config(folder), read_log(folder)
    lines = ordered(log, 'loss')
    evaluations = [{key: value for key, value in line.items() if is_finite(value)}
                   for line in ordered(log, 'val_loss')]
    if not (lines or evaluations or config):
        return None
    n_params, flops = size_of(folder, config)
    axes = progress(lines, config)
    step = max([line['step'] + 1 for line in lines[-1:]]
               + [line['step'] for line in evaluations[-1:]], default=0)
    tokens, seconds = (at_steps(np.array([step]), axes['step'], axes[name])[0].item()
                       for name in ('tokens', 'seconds'))
    known = [line for line in evaluations if 'val_loss' in line]
    best = min(known, key=lambda line: line['val_loss'], default={})
    last = evaluations[-1] if evaluations else {}
    samples = read_samples(folder)
    stride = math.ceil(len(samples) / MAX_SAMPLES) or 1
    status = read_status(folder)
    if status == 'unknown' and 0 < number_of(config, 'max_iters') <= step:
        status = 'done'
    path = printable(folder)
    commands = {}
    if status not in ('done', 'running') and any(folder.glob('ckpt*.pt')):
        commands['resume'] = command('train.py', init_from='resume', out_dir=path)
    if (folder / 'config.py').is_file():
        commands['repeat'] = command('train.py', folder / 'config.py', out_dir=f'{path}-again')
    return nan_to_none({
        'id': f'{zlib.crc32(os.fsencode(os.path.realpath(folder))):08x}',
        'name': name,
        'path': path,
        'status': status,
        'step': step,
        'max_iters': config.get('max_iters'),
        'train_loss': last.get('train_loss', column(lines[-1:], 'loss').max(initial=-math.inf)),
        'val_loss': last.get('val_loss'),
        'bits': last.get('val_bits_per_byte'),
        'best': best.get('val_loss'),
        'best_step': best.get('step'),
        'tokens': tokens,
        'seconds': seconds,
        'flops_per_token': flops,
        'n_params': n_params,
        'config': {key: str(value) for key, value in config.items() if key not in NAMES},
        'lines': len(lines),
        'curves': step_curves(lines, axes),
        'evaluations': evaluation_curves(evaluations, axes),
        'samples': samples[::-stride][::-1],  # the last one included
        'commands': commands,
        'explain': (folder / 'explain.html').is_file(),
    })


def read_runs(folders):
    """Raises UserError if there are none."""
    found = find_runs(folders)
    names = short_names(found) if found else []
    runs = list(filter(None, map(read_run, found, names)))
    where = ', '.join(map(str, folders))
    require(runs, f'{where}: there are no runs in it: a run is a folder with a log.jsonl; '
                  f'train one: {command("train.py", "config/quickstart.py")}')
    return runs


def differing_keys(runs):
    """The keys in which they differ. A key that only some of them have does not tell them apart."""
    keys = dict.fromkeys(key for run in runs for key in run['config'])
    return [key for key in keys
            if len({run['config'][key] for run in runs if key in run['config']}) > 1]


# The table ----------------------------------------------------------------------------------------

def short_number(x):
    """Three digits and a unit: 819k, 1.23M"""
    if x is None:
        return '-'
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if x >= size:
            return f'{x / size:.3g}{unit}'
    return f'{x:.3g}'


def loss_text(x):
    return '-' if x is None else f'{x:.4f}'


def table_columns(runs):
    """[(heading, cells)]"""
    columns = [
        ('run', [run['name'] for run in runs]),
        ('status', [run['status'] for run in runs]),
        ('step', [f'{run["step"]:.0f}/{run["max_iters"] or "?"}' for run in runs]),
        ('train', [loss_text(run['train_loss']) for run in runs]),
        ('val', [loss_text(run['val_loss']) for run in runs]),
        ('best', [loss_text(run['best']) for run in runs]),
        ('at', ['-' if run['best_step'] is None else f'{run["best_step"]:.0f}' for run in runs]),
        ('bits/B', [loss_text(run['bits']) for run in runs]),
        ('tokens', [short_number(run['tokens']) for run in runs]),
        ('time', ['-' if run['seconds'] is None else duration(run['seconds']) for run in runs]),
    ]
    for key in differing_keys(runs):
        columns.append((key, [run['config'].get(key, '-') for run in runs]))
    return columns


def format_table(runs, width):
    """The table in blocks of whole columns that fit into width, each with the names of the runs."""
    (_, names), *columns = table_columns(runs)
    room = max(12, width - 62)  # for names; the figures take about 62
    names = [shorten_left(name, room) for name in ('run', *names)]
    first = [name.ljust(max(map(len, names))) for name in names]
    blocks = [first]
    for heading, cells in columns:
        cells = [shorten_left(' '.join(cell.split()), max(24, width // 3))
                 for cell in (heading, *cells)]
        justify = str.ljust if heading == 'status' else str.rjust
        cells = [justify(cell, max(map(len, cells))) for cell in cells]
        if len(blocks[-1][0]) + 1 + len(cells[0]) > width and blocks[-1] != first:
            blocks.append(first)
        blocks[-1] = [f'{line} {cell}' for line, cell in zip(blocks[-1], cells)]
    return '\n\n'.join('\n'.join(line.rstrip() for line in block) for block in blocks)


def shorten_left(text, n):
    """The last n characters, without control characters."""
    text = ''.join(c if c.isprintable() else '?' for c in text)
    return text if len(text) <= n else '…' + text[1 - n:]


# The page -----------------------------------------------------------------------------------------

def page_data(runs, **more):
    """What the page gets: now, or from /data."""
    return {'runs': runs, 'keys': differing_keys(runs), 'max_points': MAX_POINTS} | more


def to_json(value):
    return json.dumps(value, ensure_ascii=False, separators=(',', ':'))


def build_page(data, live=False):
    """The HTML of the page. data: as page_data returns it."""
    page, _ = page_template('runs.html', connects=live)
    packed = base64.b64encode(zlib.compress(to_json(data).encode(), 6)).decode()
    return page.replace(DATA, f'<script type="text/plain" id="data">{packed}</script>\n')


def add_links(runs, page_path):
    """Set `explain` to the address of the run's explain.html, as seen from the page."""
    for run in runs:
        path = Path(run['path'], 'explain.html')
        link = relative(path, page_path.parent)
        run['explain'] = quote(Path(link).as_posix()) if run['explain'] else None


def draw_png(runs, path):
    """The val losses against steps. Raises UserError without matplotlib."""
    pyplot = import_pyplot()
    require(pyplot, 'png: needs matplotlib: pip install matplotlib')
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    ranked = sorted(runs, key=lambda run: math.inf if run['best'] is None else run['best'])
    for run in ranked:
        curve = run['evaluations']
        if 'val_loss' in curve:
            axis.plot(curve['step'], [math.nan if y is None else y for y in curve['val_loss']],
                      label=f'{run["name"]}: {loss_text(run["best"])}', linewidth=1.2)
    axis.set(xlabel='step', ylabel='val loss')
    axis.grid(alpha=0.3)
    if len(runs) <= 12 and axis.lines:
        axis.legend(fontsize='small', title='best val loss')
    with os_errors(f'{path}: cannot write'):
        save_png(pyplot, figure, path, dpi=150, metadata={'Title': RUNS_MARK})
    print(f'{path}: val loss of {plural(len(runs), "run")}')


class Follower:
    """The runs below some folders as they change, for the page of --serve."""

    def __init__(self, folders):
        self.folders = folders
        self.version = time.time_ns() // 10**6  # above those of an earlier server
        self.runs = {}  # path -> (stamp, version, run)

    def refresh(self):
        """Read the runs whose files have changed."""
        found = find_runs(self.folders)
        known, self.runs = self.runs, {}
        for folder, name in zip(found, short_names(found) if found else []):
            stamp = (name, *map(file_stamp, (folder / 'log.jsonl', folder / 'samples.jsonl',
                                             folder / 'status', folder / 'config.py')),
                     read_status(folder))
            old_stamp, version, run = known.get(folder, (None, 0, None))
            if stamp != old_stamp:
                self.version += 1
                version, run = self.version, read_run(folder, name)
            self.runs[folder] = stamp, version, run

    def data(self, since):
        """The runs that have changed since a version, and the ids of all."""
        self.refresh()
        runs = [run for *_, run in self.runs.values() if run]
        changed = [run for _, version, run in self.runs.values() if run and version > since]
        return page_data(runs, version=self.version, ids=[run['id'] for run in runs],
                         poll_seconds=POLL_SECONDS) | {'runs': changed}

    def answer(self, path, query):
        if path == '/':
            return 200, 'text/html', build_page(self.data(since=0), live=True).encode()
        if path == '/data':
            since = query.get('since', '')
            data = self.data(int(since) if since.isdecimal() and len(since) < 19 else 0)
            return 200, 'application/json', to_json(data).encode()
        return None


def file_stamp(path):
    try:
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    except OSError:
        return None


def main(folders, config):
    runs = read_runs(folders)
    table = format_table(runs, shutil.get_terminal_size().columns)
    if config.png:
        draw_png(runs, config.png)
    if config.serve:
        print(table)
        try:
            policy = page_template('runs.html', connects=True)[1]
            serve(Server(config.port), Follower(folders).answer, policy)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    elif config.out:
        path = Path(config.out)
        add_links(runs, path)
        page = build_page(page_data(runs))
        with os_errors(f'{path}: cannot write'):
            write_text(path, page)
        print(f'{table}\n{path}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser')
    else:
        print(table)


if __name__ == '__main__':
    with user_errors():
        main(folders, config)
