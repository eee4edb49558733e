"""What things cost on this machine, in one table.

    python tools/bench.py

CPU seconds count all threads: they say what is taken from training, also where the wall clock hides it.
"""
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure, read_config_file, require, user_errors


@dataclass
class Config:
    repeats: int = 5  # of each measurement; the table has the medians
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps


if __name__ == '__main__':  # before the slow imports
    with user_errors():
        config, _ = configure(Config)
        require(config.repeats >= 1, f'repeats = {config.repeats}: give at least 1')

import torch
from tqdm import tqdm

import checkpoint as ckpt
import train
from device import autocast, pick_device, pick_dtype
from model import GPT, GPTConfig
from optimizer import make_optimizer


def main(config):
    device = pick_device(config.device)
    print(f'{device}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    for name, value in saving(config, device):
        print(f'{name:<70} {value}')


def saving(config, device):
    """A checkpoint in the background: what it takes from 100 steps of the quickstart, and how long 500 MB stop the loop."""
    run = train.Config(**read_config_file(ROOT / 'config' / 'quickstart.py', train.Config))
    keys = {key: getattr(run, key) for key in GPTConfig.__dataclass_fields__ if key != 'vocab_size'}
    model = GPT(GPTConfig(**keys, vocab_size=2048)).to(device)
    optimizer = make_optimizer(model, run)
    dtype = pick_dtype('auto', device, run.n_embd)

    def steps(n):
        for _ in range(n):
            x = torch.randint(2048, (run.batch_size, run.block_size), device=device)
            with autocast(device, dtype):
                loss = model(x, x)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    training, saves = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = ckpt.Saver(folder, 2, background=True, say=lambda text: None)
        steps(3)
        for i in tqdm(range(config.repeats), desc='saving', disable=None):
            start = clocks()
            steps(20)
            training.append(since(start))
            saves.append(save(saver, model, optimizer, i))
        size = ckpt.manifests(folder)[0]['bytes']
    wall, cpu = (5 * statistics.median(x[i] for x in training) for i in (0, 1))
    stop, cpu_save = (statistics.median(x[i] for x in saves) for i in (0, 2))
    yield '100 steps of the quickstart', f'{wall:.1f} s, {cpu:.1f} CPU s'
    yield f'  saving its checkpoint of {size / 1e6:.0f} MB once', f'stops the loop {stop * 1e3:.0f} ms, {cpu_save:.2f} CPU s'
    yield '  share of the training', f'{stop / wall:.2%} of the time, {cpu_save / cpu:.2%} of the CPU seconds'

    model = GPT(GPTConfig(n_layer=12, n_head=8, n_embd=512, vocab_size=8192, block_size=128)).to(device)
    optimizer = make_optimizer(model, run)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        saver = ckpt.Saver(folder, 1, background=True, say=lambda text: None)
        saves = [save(saver, model, optimizer, i) for i in tqdm(range(config.repeats), desc='saving 500 MB', disable=None)]
        size = ckpt.manifests(folder)[0]['bytes']
    stop, until = (statistics.median(x[i] for x in saves) for i in (0, 1))
    yield f'saving {size / 1e6:.0f} MB', f'stops the loop {stop:.2f} s (at most {max(saves)[0]:.2f} s), done after {until:.2f} s'


def save(saver, model, optimizer, step):
    """(seconds for which the loop stops, seconds until it is on the disk, CPU seconds)."""
    start = clocks()
    saver.save(ckpt.Checkpoint(asdict(model.config), model.state_dict(), step, optimizer=optimizer.state_dict()))
    stopped, _ = since(start)
    saver.wait()
    return stopped, *since(start)


def clocks():
    return time.perf_counter(), time.process_time()


def since(start):
    """(seconds, CPU seconds) since clocks()."""
    return tuple(now - then for now, then in zip(clocks(), start))


if __name__ == '__main__':
    with user_errors():
        main(config)
