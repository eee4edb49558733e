"""A run's folder while it trains: lock, log, status, signals. checkpoint.py writes into it too."""
import contextlib
import itertools
import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path

from lib.distributed import gather_ints, print0, rank
from lib.errors import os_errors
from lib.files import lock, open_own, parse_json, patiently, relative, write_text
from lib.trackers import Trackers


class Run(contextlib.ExitStack):
    """The folder config.out_dir of a run, in a with statement: an exception sets status to failed.

    Only the main process writes, and not in an evaluation (eval_only). saver: a checkpoint.Saver.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.writes = rank() == 0 and not config.eval_only
        self.resuming = False  # remembered: resuming restores config.init_from
        self.log = self.claimed = None

    def claim(self):
        """Keep other runs out of the folder. Raises UserError if one is in it."""
        if self.writes and not self.claimed:
            self.claimed = self.enter_context(claim(self.config.out_dir))

    def start(self, step, saver, goes_on):
        """Open the log and catch signals. step: 0, or the one to continue from. goes_on: whether
        some of the budget is left."""
        config = self.config
        if self.writes:
            if not self.resuming and (kept := set_aside(config.out_dir)):
                config.init_from = moved(config.init_from, config.out_dir, kept)
            if goes_on or not self.resuming:  # else the run stays as it is
                write_config(config.out_dir, asdict(config))
            write_status(config.out_dir, f'running {os.getpid()}')
            self.push(self.set_failed)
            cut_log(config.out_dir, step)
            self.callback(saver.wait)
            self.log = self.enter_context(contextlib.closing(Log(config, self.resuming, step)))
        self.saver = saver
        self.signals = Signals(catch=not config.eval_only)  # an evaluation has nothing to save

    def set_failed(self, kind, *rest):
        if kind:
            write_status(self.config.out_dir, 'failed')

    def add_sample(self, step, text):
        """Append a text that the model has written to samples.jsonl, and log it. Raises
        UserError."""
        path = Path(self.config.out_dir) / 'samples.jsonl'
        with os_errors(f'{path}: cannot write'), open_own(path, 'ab') as file:
            file.write(json.dumps({'step': step, 'text': text}).encode() + b'\n')
        self.log.trackers.tell('log_samples', read_samples(self.config.out_dir))

    def save(self, checkpoint):
        """Raises UserError if the log or a checkpoint cannot be written."""
        self.log.sync()
        self.saver.save(checkpoint)

    def finish(self, stop):
        """stop: the signal that stopped the run, or 0."""
        if self.writes:
            write_status(self.config.out_dir, 'stopped' if stop else 'done')
            self.log.exit_code = 128 + stop if stop else 0


def claim(out_dir):
    """Lock the folder until the returned file is closed; delete the incomplete files of a killed
    run: whatever has a .tmp next to it, nothing else. Raises UserError."""
    held, out_dir = lock(out_dir, f'out_dir = {str(out_dir)!r}'), Path(out_dir)
    names, removed = ('ckpt_[0-9]*', 'log.jsonl', 'samples.jsonl', 'config.py'), []
    for mark in sorted(path for name in names for path in out_dir.glob(name + '.tmp')):
        data = mark.with_name(mark.name.replace('.json.tmp', '.pt'))
        if data != mark and data.exists() and not mark.with_suffix('').exists():  # not committed
            data.unlink()
            removed.append(data.name)
        mark.unlink()
        removed.append(mark.name)
    if removed:
        print0(f'{out_dir}: removed what a killed process left half-written: {", ".join(removed)}')
    return held


def set_aside(out_dir):
    """Move the files of an earlier run into out_dir/earlier-N: nothing is overwritten. Returns that
    folder, or None."""
    out_dir = Path(out_dir)
    names = ('ckpt_*', 'log.jsonl', 'samples.jsonl', 'config.py', 'status', 'wandb_id',
             'tensorboard')
    files = [path for name in names for path in out_dir.glob(name)]
    if all(path.name == 'status' for path in files):
        return None
    folders = (out_dir / f'earlier-{n}' for n in itertools.count(1))
    folder = next(folder for folder in folders if not os.path.lexists(folder))
    with os_errors(f'out_dir = {str(out_dir)!r}'):
        folder.mkdir()
        for path in files:
            patiently(os.rename, path, folder / path.name)
    print0(f'{out_dir} holds an earlier run, which is kept in {folder}')
    return folder


def moved(path, out_dir, kept):
    """The path, or where it is now that the run in out_dir is in the folder kept."""
    below = relative(os.path.realpath(path), os.path.realpath(out_dir))
    there = Path(kept, below)
    gone = below == '.' or not os.path.exists(path)
    return str(there) if gone and there.exists() else path


def write_config(out_dir, values):
    """out_dir/config.py: every key of the run, as a config file that runs it again."""
    values = {'depth': values.get('depth')} | values  # first: the keys after it override it
    values.pop('extended_at', None)  # of a run that goes on, not of one that starts
    path = Path(out_dir) / 'config.py'
    with os_errors(f'{path}: cannot write'):
        write_text(path, ''.join(f'{key} = {value!r}\n' for key, value in values.items()))


def write_status(out_dir, status):
    """out_dir/status, for a scheduler: running (with the process id, which is all that is left if
    the process was killed), done, stopped (by a signal) or failed."""
    with contextlib.suppress(OSError):  # the disk may be what failed
        write_text(Path(out_dir) / 'status', status + '\n')


def read_log(out_dir):
    """The lines of a run's log.jsonl, [{'step': number, ...}], except for one that is cut off; []
    if there is no log."""
    return [line for line in read_lines(Path(out_dir) / 'log.jsonl')
            if {int, float, bool, type(None)}.issuperset(map(type, line.values()))]


def read_samples(out_dir):
    """The texts that a run wrote at its evaluations, [{'step': number, 'text': str}]."""
    return [line for line in read_lines(Path(out_dir) / 'samples.jsonl')
            if isinstance(line.get('text'), str)]


def read_lines(path):
    """The objects with a number `step` in a file of JSON Lines; whatever else is in it is left out,
    such as a line that is cut off."""
    texts = path.read_text('utf-8', errors='replace').splitlines() if path.is_file() else []
    try:
        lines = parse_json(f'[{",".join(texts)}]')  # twice as fast as line by line
    except ValueError:
        lines = []
        for text in texts:
            with contextlib.suppress(ValueError):
                lines.append(parse_json(text))
    return [line for line in lines
            if isinstance(line, dict) and type(line.get('step')) in (int, float)]


def cut_log(out_dir, step):
    """Drop the lines of log.jsonl and samples.jsonl from step on: the run continues there."""
    for name, lines in (('log', read_log(out_dir)), ('samples', read_samples(out_dir))):
        path = Path(out_dir) / f'{name}.jsonl'
        if path.exists():
            kept = [json.dumps(line) + '\n' for line in lines if line['step'] < step]
            with os_errors(f'{path}: cannot write'):
                write_text(path, ''.join(kept))


class Log:
    """out_dir/log.jsonl, one JSON object per line; Trackers get the same."""

    def __init__(self, config, resuming, step):
        self.path = Path(config.out_dir) / 'log.jsonl'
        with os_errors(f'{self.path}: cannot write'):
            if self.path.is_symlink():
                self.path.unlink()
            self.file = open_own(self.path, 'ab')  # a line is written whole or not at all
        self.trackers = Trackers(config, resuming, step)
        self.exit_code = 1  # of a run that fails

    def write(self, line):
        """line: a dict of numbers; non-finite ones become null. Raises UserError."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                  for k, v in line.items()}
        with os_errors(f'{self.path}: cannot write',
                       'free some room, then go on with --init_from=resume'):
            self.file.write(json.dumps(finite).encode() + b'\n')
        self.trackers.tell('log', line)

    def sync(self):
        """fsync: lines before a checkpoint reach the disk before it does."""
        with contextlib.suppress(OSError):  # /dev/null cannot be synced
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        self.trackers.tell('finish', self.exit_code)


class Signals:
    """SIGINT (Ctrl-C), SIGTERM, SIGHUP (a closed terminal) and SIGBREAK (Windows) save and stop
    after a step or during an evaluation; Ctrl-C again stops at once. SIGUSR1 saves and goes on."""

    def __init__(self, catch=True):
        self.stop = 0  # the signal's number
        self.saves = 0  # saves requested so far
        handlers = {'SIGINT': self.request_stop, 'SIGTERM': self.request_stop,
                    'SIGHUP': self.request_stop, 'SIGBREAK': self.request_stop,
                    'SIGUSR1': self.request_save}
        for name, handler in handlers.items():
            number = getattr(signal, name, None)  # Windows lacks some
            if catch and number and signal.getsignal(number) != signal.SIG_IGN:  # nohup: SIGHUP
                signal.signal(number, handler)

    def request_stop(self, number, frame):
        self.stop = number
        again = b''
        if number == signal.SIGINT:  # schedulers and torchrun may send the others twice
            signal.signal(number, signal.SIG_DFL)
            again = b'; Ctrl-C again stops at once, without saving'
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b'\nstopping after this step' + again + b'\n')

    def request_save(self, number, frame):
        self.saves += 1

    def exchange(self, seconds):
        """(signal to stop by or 0, saves requested so far, the longest of seconds), the same in all
        processes."""
        stops, saves, nanoseconds = zip(*gather_ints(self.stop, self.saves, int(1e9 * seconds)))
        return max(stops), sum(saves), max(nanoseconds) / 1e9
