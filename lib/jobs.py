"""train.py in child processes, for tools: one on each GPU, until a signal stops them all; the keys
and losses of such runs."""
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

import torch

from configurator import TrainConfig, read_config_file
from lib import resume
from lib.bins import find_or_prepare, open_dataset
from lib.errors import os_errors, require
from lib.files import ROOT, WINDOWS, open_own
from lib.run import read_log

STOP = signal.SIGTERM
OWN_GROUP = {'start_new_session': True}
if WINDOWS:  # where SIGTERM would kill at once
    STOP = signal.CTRL_BREAK_EVENT
    OWN_GROUP = {'creationflags': subprocess.CREATE_NEW_PROCESS_GROUP}


def stop(process):
    """Ask a run to save and end."""
    try:
        process.send_signal(STOP)
    except OSError:  # Windows without a console: it ends without saving
        process.terminate()


def val_losses(folder):
    """{step: val loss} of a run; {} if it has not been evaluated yet."""
    return {line['step']: line['val_loss'] for line in read_log(folder)
            if line.get('val_loss') is not None}


def read_keys(folder):
    """{key: value} of a run's config.py; None if there is none that can be read."""
    try:
        return read_config_file(str(folder / 'config.py'), TrainConfig)
    except ValueError:  # not a run, or one of another version
        return None


def check_keys(folder, config, free):
    """Raise UserError if the folder holds a run with other keys, not counting the free ones and
    those that follow from its data or first weights."""
    path = folder / 'config.py'
    if not os.path.lexists(path):
        return
    saved = read_keys(folder)
    require(saved is not None, f'{path} cannot be read: choose another --out_dir, or move the '
                               f'folder away')
    data = open_dataset(find_or_prepare(config.dataset), config.block_size)
    free = {*free, *resume.derived_keys(config, data)}
    changed = [key for key, value in asdict(config).items()
               if key not in free and saved.get(key, value) != value]
    require(not changed, f'{folder} holds a run with other values of {", ".join(changed)}: choose '
                         f'another --out_dir, or move the folder away')


def make_folder(path):
    """Raises UserError if nothing can be written there."""
    with os_errors(f'{path}: cannot write there', 'choose another --out_dir'):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def environments(n_jobs, devices):
    """Variables for each run at a time: a GPU of its own, or a share of the cores.

    n_jobs: how many; None: one per GPU, or 1. devices: config.device of the runs.
    """
    n_gpus = torch.cuda.device_count()
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    gpus = visible.split(',')[:n_gpus] if visible else list(map(str, range(n_gpus)))
    if not {'auto', 'cuda'}.issuperset(devices):
        gpus = []
    n_jobs, common = n_jobs or len(gpus) or 1, {}
    if n_jobs > 1:
        common['PYTHONUNBUFFERED'] = '1'  # output.txt can be followed
        if not gpus and 'OMP_NUM_THREADS' not in os.environ:
            common['OMP_NUM_THREADS'] = str(max(1, torch.get_num_threads() // n_jobs))
    if not gpus:
        return [common] * n_jobs
    return [common | {'CUDA_VISIBLE_DEVICES': gpus[i % len(gpus)]} for i in range(n_jobs)]


class Jobs:
    """Runs of train.py, one at a time in each of the environments. Several print to output.txt in
    their folders, a single one to the terminal. quiet: leave it to the caller to say which."""

    def __init__(self, environments, quiet=False):
        self.free, self.quiet = list(environments), quiet
        self.to_files = len(environments) > 1
        self.running = {}  # process -> (folder, environment)
        self.failed = []  # folders
        self.stop = 0  # the signal that stopped all

    @contextlib.contextmanager
    def catch_signals(self):
        """Stop all runs on SIGINT, SIGTERM, SIGHUP or SIGBREAK."""
        before = {}
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGBREAK'):
            number = getattr(signal, name, None)  # Windows lacks one, others the last
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, self.request_stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request_stop(self, number, frame):
        for process in self.running:
            if self.stop and number == signal.SIGINT:
                process.kill()
            else:
                stop(process)
        self.stop = number
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b'\nstopping: each run saves; Ctrl-C again stops without saving\n')

    def train(self, runs):
        """Start or resume runs: [(folder, arguments, arguments for resuming)]."""
        waiting = list(enumerate(runs, 1))
        with self.catch_signals():
            try:
                while self.running or waiting and not self.stop:
                    if waiting and self.free and not self.stop:
                        i, run = waiting.pop(0)
                        self.report(f'{i}/{len(runs)} {run[0].name}')
                        self.start(*run)
                    else:
                        time.sleep(0.05)
                    ended = [process for process in self.running if process.poll() is not None]
                    for process in ended:
                        self.end(process)
            finally:
                for process in self.running:
                    process.terminate()

    def start(self, folder, arguments, resume):
        if any(folder.glob('ckpt_*.json')):  # all other keys are in the checkpoint
            arguments = ['--init_from=resume', *resume]
        environment, output = self.free.pop(0), None
        if self.to_files:
            folder.mkdir(parents=True, exist_ok=True)
            output = open_own(folder / 'output.txt', 'ab')
        # Ctrl-C reaches this process alone, which passes it on once
        process = subprocess.Popen(
            [sys.executable, ROOT / 'train.py', *arguments, f'--out_dir={folder}'],
            env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            **OWN_GROUP)
        self.running[process] = folder, environment
        if output:
            output.close()
        if self.stop:  # the signal came while the process started
            stop(process)

    def end(self, process):
        folder, environment = self.running.pop(process)
        self.free.append(environment)
        losses = val_losses(folder)
        if process.returncode == 0 and losses:
            self.report(f'{folder.name}: val loss {losses[max(losses)]:.4f}')
        elif not self.stop:
            self.failed.append(folder)
            see = f'; see {folder / "output.txt"}' if self.to_files else ''
            self.report(f'{folder.name} failed{see}')

    def report(self, text):
        if not self.quiet:
            print(text, flush=True)
