"""Kill a run again and again, resume it each time, and compare it with the run that nobody killed.

    python tools/crashtest.py --kills 50

A small GPT learns the source of this repository, with dropout, accumulated gradients, Muon and AdamW, evaluations and a
checkpoint every 5 steps. SIGKILL comes at random moments: while it starts, in a step, in an evaluation, in a save. In the
end weights, optimizer state and every line of the log must be the same to the last bit. Exit code 1 if they are not.
"""
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure, require, user_errors


@dataclass
class Config:
    kills: int = 50  # processes to kill; each lives for about 30 steps
    seed: int = 0  # of the moments
    optimizer: str = 'muon'  # adamw, or muon with adamw beside it


if __name__ == '__main__':  # before the slow imports
    with user_errors():
        config, _ = configure(Config)
        require(config.kills >= 1, f'kills = {config.kills}: give at least 1')

import torch

import checkpoint as ckpt
from data import bins, tokenizer


def main(config):
    folder = Path(tempfile.mkdtemp(prefix='crashtest-'))
    text = ''.join(path.read_text(encoding='utf-8') for path in sorted(ROOT.glob('*.py')))
    pieces = bins.split_at_end([(text, False)], len(text.encode()))
    bins.write_dataset(folder / 'data', pieces, tokenizer.train_char([text]), 'the source of this repository')
    n_steps = 40 * config.kills
    common = [f'--dataset={folder / "data"}', f'--optimizer={config.optimizer}', f'--max_iters={n_steps}', '--device=cpu',
              '--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64', '--batch_size=4', '--gradient_accumulation_steps=2',
              '--dropout=0.1', '--warmup_iters=10', '--learning_rate=1e-3', '--eval_interval=20', '--eval_iters=2',
              '--save_interval=5']

    print(f'training {n_steps} steps without a kill')
    start(folder / 'whole', common).communicate()
    print(f'training {n_steps} steps with {config.kills} kills')
    chance = random.Random(config.seed)
    kills = resumes = restarts = again = lost = half = 0
    # on a busy machine a kill may come after the last step: then there is nothing left to kill
    while kills < config.kills and (committed := last_committed(folder / 'killed')) != n_steps:
        process = start(folder / 'killed', common + ['--init_from=resume'] * (committed is not None))
        resumes += committed is not None
        restarts += committed is None and kills > 0
        if chance.random() < 0.1:  # while it starts
            time.sleep(chance.uniform(0, 3))
        else:
            begun = read_until(process, min((committed or 0) + chance.randrange(60), n_steps - 20))
            lost += (committed or 0) - begun
            time.sleep(chance.expovariate(1 / 0.02))  # where in a step, in a save
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        half += any((folder / 'killed').glob('*.tmp'))
        again += max(0, last_logged(folder / 'killed') + 1 - (last_committed(folder / 'killed') or 0))
    start(folder / 'killed', common + ['--init_from=resume'] * (last_committed(folder / 'killed') is not None)).communicate()

    print(f'{kills} kills, {half} of them in a save; {resumes + 1} resumes; {restarts} fresh starts, before the first save; '
          f'{again} steps done again, {again / kills:.1f} a kill; {lost} steps lost that had been saved')
    whole, killed = fingerprint(folder / 'whole'), fingerprint(folder / 'killed')
    for name in whole:
        print(f'{name}: {whole[name]} without, {killed[name]} with kills')
    if whole != killed or lost:
        print(f'FAILED: both runs are in {folder}')
        sys.exit(1)
    shutil.rmtree(folder)
    print('OK')


def start(out_dir, arguments):
    command = [sys.executable, str(ROOT / 'train.py'), f'--out_dir={out_dir}', *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process, step):
    """Read what the process prints until it has done this step -> the step at which it began."""
    begun = None
    for line in process.stdout:
        words = line.split()
        if words[:1] == ['step'] and words[2] == 'loss':
            done = int(words[1].rstrip(':'))
            begun = done if begun is None else begun
            if done >= step:
                return begun
    raise SystemExit(f'the process ended by itself, before step {step}')


def last_committed(out_dir):
    """The step of the newest whole checkpoint, None if there is none."""
    return next((manifest['step'] for manifest in ckpt.manifests(out_dir)
                 if not ckpt.damage(out_dir / manifest['file'], manifest)), None)


def log_lines(out_dir):
    path = out_dir / 'log.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n')]


def last_logged(out_dir):
    return max((line['step'] for line in log_lines(out_dir) if 'loss' in line), default=-1)


def fingerprint(out_dir):
    """sha256 of the weights, of the optimizer's state, and of all that the log says but its speeds."""
    found = ckpt.load(out_dir)
    timeless = [{k: v for k, v in line.items() if k not in ('tokens_per_second', 'seconds')} for line in log_lines(out_dir)]
    return {'step': found.step, 'samples': found.samples_seen,
            'log': f'{len(timeless)} lines, sha256 {hashlib.sha256(repr(timeless).encode()).hexdigest()[:16]}',
            'weights': f'sha256 {hash_of(found.model)[:16]}', 'optimizer': f'sha256 {hash_of(found.optimizer)[:16]}'}


def hash_of(value):
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        value = sorted((str(k), hash_of(v)) for k, v in value.items())
    if isinstance(value, list):
        value = [hash_of(v) for v in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


if __name__ == '__main__':
    with user_errors():
        main(config)
