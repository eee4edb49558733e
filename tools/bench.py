"""What training, sampling, preparing data and starting cost on this machine, in one table.

    python tools/bench.py                              # everything, about ten minutes on 2 CPU cores
    python tools/bench.py --parts=training --compare   # beside the plain way: fp32, eager, full logits, no cache, as in nanoGPT
    python tools/bench.py --parts=training --profile=trace.json   # of three training steps, for chrome://tracing

Every measurement has a process of its own, so that peak memory is its own too; figures are medians. CPU seconds count all
threads. The model is GPT-2's 124M with random weights: what it writes does not matter here.
"""
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure, read_config_file, require, user_errors

PARTS = ('training', 'sampling', 'prepare', 'data', 'start', 'saving')


@dataclass
class Config:
    parts: list[str] = field(default_factory=lambda: list(PARTS))  # which ones: --parts='["training", "sampling"]'
    repeats: int = 5  # of each measurement; the table has the medians
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    compare: bool = False  # measure the plain way too, and print the ratio
    json: bool = False  # print JSON instead of a table
    profile: str | None = None  # write a Chrome trace of training to this file
    compile: bool = False  # torch.compile for training and for the step of one token
    input: str | None = None  # a text file for prepare; None: the source of Python's standard library, several times over


if __name__ == '__main__':  # before the slow imports
    with user_errors():
        config, _ = configure(Config)
        require(config.repeats >= 1, f'repeats = {config.repeats}: give at least 1')
        for part in config.parts:
            require(part in PARTS, f'parts = {part!r}: give some of {", ".join(PARTS)}')
        require(config.profile is None or Path(config.profile).parent.is_dir(), f'profile = {config.profile!r}: no such folder')
        require(config.input is None or Path(config.input).is_file(), f'input = {config.input!r}: there is no such file')

import numpy as np
import torch

import checkpoint as ckpt
import train
from data import bins, tokenizer
from device import autocast, peak_memory, pick_device, pick_dtype
from model import GPT, GPTConfig
from optimizer import adamw, make_optimizer

BATCH, CONTEXT, PROMPT, NEW = 2, 512, 480, 64


def main(config):
    device = pick_device(config.device)
    head = {'device': str(device), 'threads': torch.get_num_threads(), 'torch': str(torch.__version__)}
    rows = []
    for part in config.parts:
        rows += measure(part, config)
    if config.json:
        print(json.dumps({**head, 'rows': rows}, indent=1))
        return
    print(', '.join(f'{key} {value}' for key, value in head.items()))
    for row in rows:
        plain = f'{row["plain"]:>12,.3g}   x {row["ratio"]:.2f}' if 'plain' in row else ''
        print(f'{row["name"]:<62}{row["value"]:>12,.4g} {row["unit"]:<9}{plain}')


def measure(part, config):
    """The rows of a part: {'name', 'value', 'unit'}, and where there is a plain way {'plain', 'ratio'}: above 1 is better."""
    jobs = {'training': [(training, False), (training, True)], 'sampling': [(sampling, None), (sampling, 'int8')],
            'prepare': [(prepare,)], 'data': [(data,)], 'start': [(start,)], 'saving': [(saving,)]}[part]
    plain = {'training': plain_training, 'sampling': plain_sampling}.get(part)
    rows = [row for function, *arguments in jobs for row in in_own_process(function, config, *arguments)]
    if config.compare and plain:
        values = in_own_process(plain, config)
        for row in rows:
            kind = row.pop('kind', None)
            if kind in values:
                row['plain'] = values[kind]
                row['ratio'] = row['value'] / row['plain'] if row['unit'].endswith('/s') else row['plain'] / row['value']
    return [{key: value for key, value in row.items() if key != 'kind'} for row in rows]


def in_own_process(function, *arguments):
    print(f'{function.__name__} ...', file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()


def row(name, value, unit, kind=None):
    return {'name': name, 'value': value, 'unit': unit, 'kind': kind}


def timed(function, repeats, device):
    """Median seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        elif device.type == 'mps':
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


# Training -----------------------------------------------------------------------------------------------------------------

def step_of_124m(device, dtype, plain=False, compiled=False, **options):
    """(model, a function that trains it by one step)"""
    model = GPT(GPTConfig(block_size=CONTEXT, bias=False, **options)).to(device)
    optimizer = adamw(model.parameters(), 0.1, 6e-4, (0.9, 0.95))
    if plain:
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step():
        x = torch.randint(50257, (BATCH, CONTEXT), device=device)
        with autocast(device, dtype):
            loss = run(x, x, return_logits=plain)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product: what there is to be had."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, 10, device)


def training(config, checkpointing):
    device = pick_device(config.device)
    dtype = pick_dtype('auto', device, 768)
    model, step = step_of_124m(device, dtype, compiled=config.compile, activation_checkpointing=checkpointing)
    seconds = timed(step, config.repeats, device)
    memory = peak_memory(device)
    if config.profile and not checkpointing:
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == 'cuda')
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(3):
                step()
        trace.export_chrome_trace(config.profile)
    how = f'training, {BATCH} x {CONTEXT}, {str(dtype)[6:]}' + ', activation checkpointing' * checkpointing
    speed = BATCH * CONTEXT / seconds
    share = model.flops_per_token() * speed / matmul_peak(device, dtype)
    return [row(how, speed, 'tokens/s', 'speed'), row('  share of the peak of a matrix product here', 100 * share, '%'),
            row('  peak memory', memory / 1e9, 'GB', 'memory')]


def plain_training(config):
    device = pick_device(config.device)
    _, step = step_of_124m(device, torch.float32, plain=True)
    seconds = timed(step, max(1, config.repeats // 2), device)
    return {'speed': BATCH * CONTEXT / seconds, 'memory': peak_memory(device) / 1e9}


# Sampling -----------------------------------------------------------------------------------------------------------------

def sampling(config, quantize):
    device = pick_device(config.device)
    dtype = pick_dtype('auto', device, 768)
    model = GPT(GPTConfig(bias=False)).to(device, dtype).eval()
    n_bytes = model.get_num_params() * (1 if quantize else dtype.itemsize)
    if quantize:
        model.quantize()
    prompt = torch.randint(50257, (PROMPT,)).tolist()
    one = timed(lambda: model.generate([prompt], NEW, compile=config.compile), config.repeats, device)
    first = timed(lambda: model.generate([prompt], 1), config.repeats, device)
    ten = timed(lambda: model.generate([prompt] * 10, NEW, compile=config.compile), config.repeats, device)
    big = torch.ones(2**28, device=device)
    floor = n_bytes / (4 * len(big) / timed(big.sum, config.repeats, device))  # every weight is read for each token
    how = quantize or str(dtype)[6:]
    return [row(f'one sample of {NEW} tokens after {PROMPT}, {how}', NEW / one, 'tokens/s', 'one'),
            row('  each token after the first', (NEW - 1) / (one - first), 'tokens/s'),
            row('  share of what reading the weights alone allows', 100 * floor * (NEW - 1) / (one - first), '%'),
            row(f'10 samples of {NEW} tokens from one prompt of {PROMPT}, {how}', 10 * NEW / ten, 'tokens/s', 'ten')]


def plain_sampling(config):
    """The whole context for each token, one sample after the other, in fp32; a few tokens stand for all."""
    device = pick_device(config.device)
    model = GPT(GPTConfig(bias=False)).to(device).eval()
    prompt = torch.randint(50257, (PROMPT + NEW // 2,)).tolist()  # the middle of what is written
    speed = 4 / timed(lambda: model.generate([prompt], 4, use_cache=False), max(1, config.repeats // 2), device)
    return {'one': speed, 'ten': speed}


# Preparing data, starting, saving -------------------------------------------------------------------------------------------

def prepare(config):
    """GPT-2's BPE (where it cannot be had, one of our own) into bins, beside what tiktoken alone does with all cores."""
    with tempfile.TemporaryDirectory() as folder:
        path = config.input
        if path is None:
            path, sources = Path(folder) / 'text.txt', sorted(Path(os.__file__).parent.glob('*.py'))
            text = '\n'.join(source.read_text(encoding='utf-8', errors='replace') for source in sources)
            path.write_text(text * 8, encoding='utf-8')
        try:
            tokens = tokenizer.gpt2()
        except ValueError:
            tokens = tokenizer.train_bpe(bins.read_pieces(path), 1024, 2**20)
        size, raw, ours = os.path.getsize(path), [], []
        for _ in range(max(1, config.repeats // 2)):
            begin = time.perf_counter()
            with ThreadPoolExecutor(os.cpu_count()) as pool, open(path, encoding='utf-8') as file:
                for _ in pool.map(lambda text: len(tokens.encode_to_numpy(text)), iter(lambda: file.read(2**20), '')):
                    pass
            raw.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            with contextlib.redirect_stdout(None):
                bins.write_dataset(Path(folder) / 'bins', bins.split_at_end(((t, False) for t in bins.read_pieces(path)), size),
                                   tokens, 'a benchmark', size)
            ours.append(time.perf_counter() - begin)
    seconds = statistics.median(ours)
    return [row(f'prepare, {tokens.kind}, {size / 1e6:,.0f} MB', size / 1e6 / seconds, 'MB/s'),
            row('  share of tiktoken alone, on all cores', 100 * statistics.median(raw) / seconds, '%'),
            row('  peak memory', peak_memory(torch.device('cpu')) / 1e9, 'GB')]


def data(config):
    """Batches out of one file and out of 100, drawn in turn, and the opening of a terabyte: files without content."""
    def split(folder, n_tokens, n_files):
        folder.mkdir(exist_ok=True)
        for number in range(n_files):
            with open(bins.shard_path(folder, 'train', number), 'wb') as file:
                file.truncate(2 * n_tokens // n_files)
        return lambda: bins.TokenBin(folder, 'train', np.dtype('<u2'), 50257, 1024, n_tokens)

    with tempfile.TemporaryDirectory() as folder:
        one, many = split(Path(folder) / 'one', 10**8, 1)(), split(Path(folder) / 'many', 10**8, 100)()
        seconds = {one: [], many: []}
        for i in range(100 * config.repeats):
            for bin_ in seconds:
                begin = time.perf_counter()
                bin_.batch(64 * i, 64, seed=1)
                seconds[bin_].append(time.perf_counter() - begin)
        terabyte = split(Path(folder) / 'terabyte', 5 * 10**11, 500)
        opening = []
        for _ in range(config.repeats):
            begin = time.perf_counter()
            opened = terabyte()
            opening.append(time.perf_counter() - begin)
            del opened
    drawing = [statistics.median(seconds[bin_]) for bin_ in (one, many)]
    return [row('drawing 64 x 1024 tokens out of 100 files', 1e3 * drawing[1], 'ms'),
            row('  the time of one file', drawing[1] / drawing[0], ''),
            row('opening 1 TB in 500 files', 1e3 * statistics.median(opening), 'ms')]


def start(config):
    def seconds(*command, until=None):
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True)
        while until is not None and until not in process.stdout.readline():
            require(process.poll() is None, f'{" ".join(map(str, command))} ended early')
        now = time.perf_counter() - begin
        if until is not None:
            process.terminate()
        process.communicate()
        return now if until is not None else time.perf_counter() - begin

    median = lambda *command, **options: statistics.median(seconds(*command, **options) for _ in range(config.repeats))  # noqa: E731
    bare = median('-c', 'import torch')
    with tempfile.TemporaryDirectory() as folder:
        first = median('train.py', 'config/quickstart.py', '--log_interval=1', f'--out_dir={folder}', f'--device={config.device}',
                       until='step 0: loss')
    return [row('train.py --help', median('train.py', '--help'), 's'), row('import torch', bare, 's'),
            row('import model, after torch', median('-c', 'import torch, model') - bare, 's'),
            row('train.py config/quickstart.py to its first step', first, 's')]


def saving(config):
    """A checkpoint in the background: what it takes from 100 steps of the quickstart, and how long 500 MB stop the loop."""
    device = pick_device(config.device)
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

    spent, saves = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = ckpt.Saver(folder, 2, background=True, say=lambda text: None)
        steps(3)
        for i in range(config.repeats):
            begin = clocks()
            steps(20)
            spent.append(since(begin))
            saves.append(save(saver, model, optimizer, i))
        size = ckpt.manifests(folder)[0]['bytes']
    wall, cpu = (5 * statistics.median(x[i] for x in spent) for i in (0, 1))
    stop, cpu_save = (statistics.median(x[i] for x in saves) for i in (0, 2))
    rows = [row('100 steps of the quickstart', wall, 's'), row('  CPU seconds', cpu, 's'),
            row(f'  saving its {size / 1e6:.0f} MB once stops the loop', stop, 's'),
            row('    share of the time', 100 * stop / wall, '%'), row('    share of the CPU seconds', 100 * cpu_save / cpu, '%')]

    model = GPT(GPTConfig(n_layer=12, n_head=8, n_embd=512, vocab_size=8192, block_size=128)).to(device)
    optimizer = make_optimizer(model, run)
    with tempfile.TemporaryDirectory() as folder:
        saver = ckpt.Saver(folder, 1, background=True, say=lambda text: None)
        saves = [save(saver, model, optimizer, i) for i in range(config.repeats)]
        size = ckpt.manifests(folder)[0]['bytes']
    stop, until = (statistics.median(x[i] for x in saves) for i in (0, 1))
    return rows + [row(f'saving {size / 1e6:.0f} MB stops the loop', stop, 's'), row('  at most', max(saves)[0], 's'),
                   row('  on the disk after', until, 's')]


def save(saver, model, optimizer, step):
    """(seconds for which the loop stops, seconds until it is on the disk, CPU seconds)."""
    begin = clocks()
    saver.save(ckpt.Checkpoint(asdict(model.config), model.state_dict(), step, optimizer=optimizer.state_dict()))
    stopped, _ = since(begin)
    saver.wait()
    return stopped, *since(begin)


def clocks():
    return time.perf_counter(), time.process_time()


def since(begin):
    """(seconds, CPU seconds) since clocks()."""
    return tuple(now - then for now, then in zip(clocks(), begin))


if __name__ == '__main__':
    with user_errors():
        main(config)
