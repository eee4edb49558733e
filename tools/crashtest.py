"""Kill a training run again and again, resume it each time, and compare it with an undisturbed run.

    python tools/crashtest.py --kills 50

A small GPT learns the source of this repository, with dropout, gradient accumulation, Muon and
AdamW, evaluations, and a checkpoint every 5 steps. SIGKILL comes at random moments: during startup,
a step, an evaluation or a save. At the end weights, optimizer state and every line of the log must
be bitwise the same. Exit code 1 if they are not.
"""
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Count, configure
from lib.errors import plural, user_errors


@dataclass
class Config:
    kills: Count = 50  # processes to kill; each lives for about 30 steps
    seed: int = 0  # of the moments to kill at
    optimizer: Literal['adamw', 'muon'] = 'muon'  # muon: with AdamW for embeddings and gains


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)

import torch

import checkpoint as ckpt
from lib.bpe import train_char
from lib.run import read_log
from lib.text import split_at_end
from lib.write import write_dataset


def prepare(folder):
    """Bins of the repository's source, in characters."""
    text = ''.join(path.read_text(encoding='utf-8') for path in sorted(ROOT.glob('*.py')))
    pieces = split_at_end([(text, False)], len(text.encode()))
    write_dataset(folder, pieces, train_char([text]), 'the source of this repository')


class Counts:
    """What happened to the killed run."""
    kills = 0
    in_save = 0  # kills that left a half-written file
    resumes = 0
    restarts = 0  # killed before the first checkpoint
    repeated = 0  # steps done again
    lost = 0  # steps done again although a checkpoint had them


def kill_and_resume(out_dir, arguments, n_steps, config):
    """Train n_steps steps in processes that are killed, then in one that is not. -> Counts"""
    chance = random.Random(config.seed)
    counts = Counts()
    # on a busy machine a kill may come after the last step: then there is nothing left to kill
    while counts.kills < config.kills and (committed := last_committed(out_dir)) != n_steps:
        if committed is not None:
            counts.resumes += 1
        elif counts.kills > 0:
            counts.restarts += 1
        process = start_or_resume(out_dir, arguments)
        if chance.random() < 0.1:  # during startup
            time.sleep(chance.uniform(0, 3))
        else:
            step = min((committed or 0) + chance.randrange(60), n_steps - 20)
            counts.lost += (committed or 0) - read_until(process, step)
            time.sleep(chance.expovariate(1 / 0.02))  # somewhere in a step or a save
        process.kill()
        process.communicate()
        counts.kills += 1
        counts.in_save += any(out_dir.glob('*.tmp'))
        done = last_logged(out_dir) + 1
        counts.repeated += max(0, done - (last_committed(out_dir) or 0))
    counts.resumes += last_committed(out_dir) is not None
    start_or_resume(out_dir, arguments).communicate()
    return counts


def start_or_resume(out_dir, arguments):
    """A process of train.py, which resumes if out_dir has a whole checkpoint."""
    command = [sys.executable, str(ROOT / 'train.py'), f'--out_dir={out_dir}', *arguments]
    if last_committed(out_dir) is not None:
        command.append('--init_from=resume')
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process, step):
    """Read the output of train.py until it has done this step; returns the step it began with."""
    first = None
    for line in process.stdout:
        words = line.split()
        if words[:1] == ['step'] and words[2] == 'loss':
            done = int(words[1].rstrip(':'))
            if first is None:
                first = done
            if done >= step:
                return first
    raise SystemExit(f'train.py ended by itself, before step {step}')


def last_committed(out_dir):
    """The step of the newest whole checkpoint, None if there is none."""
    for manifest in ckpt.manifests(out_dir):
        if not ckpt.damage(out_dir / manifest['file'], manifest):
            return manifest['step']
    return None


def last_logged(out_dir):
    """The last step in the log, -1 if there is none."""
    return max((line['step'] for line in read_log(out_dir) if 'loss' in line), default=-1)


def fingerprint(out_dir):
    """sha256 of weights, optimizer state, and everything in the log but speeds and memory."""
    checkpoint = ckpt.load(out_dir)
    lines = read_log(out_dir)
    for line in lines:
        for key in ('tokens_per_second', 'seconds', 'peak_memory'):
            line.pop(key, None)
    return {'step': checkpoint.step, 'samples': checkpoint.samples_seen,
            'log': f'{len(lines)} lines, sha256 {hash_of(lines)[:16]}',
            'weights': f'sha256 {hash_of(checkpoint.model)[:16]}',
            'optimizer': f'sha256 {hash_of(checkpoint.optimizer)[:16]}'}


def hash_of(value):
    """sha256 of nested dicts and lists of tensors and plain values."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        value = sorted((str(key), hash_of(v)) for key, v in value.items())
    elif isinstance(value, list):
        value = [hash_of(v) for v in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def main(config):
    folder = Path(tempfile.mkdtemp(prefix='crashtest-'))
    prepare(folder / 'data')
    n_steps = 40 * config.kills
    arguments = [
        f'--dataset={folder / "data"}', f'--optimizer={config.optimizer}',
        f'--max_iters={n_steps}', '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=64',
        '--block_size=64', '--batch_size=4', '--gradient_accumulation_steps=2', '--dropout=0.1',
        '--warmup_iters=10', '--learning_rate=1e-3', '--eval_interval=20', '--eval_iters=2',
        '--save_interval=5']

    print(f'training {n_steps} steps undisturbed', flush=True)
    start_or_resume(folder / 'whole', arguments).communicate()
    print(f'training {n_steps} steps with {plural(config.kills, "kill")}', flush=True)
    counts = kill_and_resume(folder / 'killed', arguments, n_steps, config)

    print(f'{plural(counts.kills, "kill")}, {counts.in_save} in a save; '
          f'{plural(counts.resumes, "resume")}; {plural(counts.restarts, "restart")} before the '
          f'first save; {plural(counts.repeated, "step")} repeated, '
          f'{counts.repeated / max(1, counts.kills):.1f} per kill; saved steps lost: {counts.lost}')
    whole, killed = fingerprint(folder / 'whole'), fingerprint(folder / 'killed')
    for name in whole:
        print(f'{name}: {whole[name]} without, {killed[name]} with kills')
    if whole != killed or counts.lost:
        print(f'FAILED: both runs are in {folder}')
        sys.exit(1)
    shutil.rmtree(folder)
    print('OK')


if __name__ == '__main__':
    with user_errors():
        main(config)
