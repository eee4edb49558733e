"""Benchmark training, sampling, data preparation, startup and checkpoints on this machine.

    python tools/bench.py                              # everything: ten minutes on 2 CPU cores
    python tools/bench.py --parts=training --compare   # against a plain baseline
    python tools/bench.py --parts=training --profile=trace.json   # 3 steps, for chrome://tracing

The baseline works as nanoGPT does: fp32, eager, full logits, no KV cache. Every measurement runs in
its own process, so that peak memory is its own too. Figures are medians; CPU seconds count all
threads. The model is GPT-2 124M with random weights, except where a row says otherwise.
"""
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
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

from configurator import Count, TrainConfig, configure, read_config_file
from lib.errors import UserError, os_errors, require, user_errors
from lib.files import create, find, write_text

PARTS = ('training', 'sampling', 'prepare', 'data', 'start', 'saving')


@dataclass
class Config:
    parts: list[str] = field(default_factory=lambda: list(PARTS))  # e.g. '["training", "data"]'
    repeats: Count = 5  # of each measurement; the table shows medians
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    compare: bool = False  # measure the baseline too, and print the ratio
    json: bool = False  # print JSON instead of a table
    profile: str | None = None  # write a Chrome trace of training to this file
    compile: bool = False  # torch.compile for training and for the decode step
    input: str | None = None  # text file for prepare; None: Python's standard library, 8 copies


def check(config):
    """Validate the config and find its files. Raises UserError."""
    for part in config.parts:
        require(part in PARTS, f'parts = {part!r}: give some of {", ".join(PARTS)}')
    if config.profile is not None:
        config.profile = os.path.expanduser(config.profile)
        require(Path(config.profile).parent.is_dir(),
                f'profile = {config.profile!r}: there is no such folder')
    if config.input is not None:
        config.input = str(find(config.input))
        require(Path(config.input).is_file(),
                f'input = {config.input!r}: there is no such file')


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)
        check(config)

import numpy as np
import tiktoken
import torch

import checkpoint as ckpt
from lib.bins import TokenBin, shard_path
from lib.bpe import train_bpe
from lib.device import (
    autocast,
    dtype_name,
    math_attention_is_faster,
    peak_memory,
    pick_device,
    pick_dtype,
    start_device,
)
from lib.linear import pack, quantize
from lib.resume import choose_model_config
from lib.text import read_pieces, split_at_end
from lib.tokenizer import gpt2
from lib.write import write_dataset
from model import GPT, GPTConfig
from optimizer import adamw, make_optimizer

BATCH_SIZE, BLOCK_SIZE = 2, 512  # of training
N_PROMPT, N_NEW = 480, 64  # tokens, of sampling


def measure(part, config):
    """The rows of a part: {'name', 'value', 'unit'}, and where there is a baseline 'plain', its
    value, and 'ratio': above 1 is better."""
    jobs = {'training': [(training, False), (training, True)],
            'sampling': [(sampling, False), (sampling, True)],
            'prepare': [(prepare,)],
            'data': [(data,)],
            'start': [(start,)],
            'saving': [(saving,)]}
    baselines = {'training': plain_training, 'sampling': plain_sampling}
    rows = []
    for function, *arguments in jobs[part]:
        rows += in_own_process(function, config, *arguments)
    plain = {}
    if config.compare and part in baselines:
        plain = in_own_process(baselines[part], config)
    for row in rows:
        kind = row.pop('kind')
        if kind in plain:
            row['plain'] = plain[kind]
            row['ratio'] = row['value'] / row['plain']
            if not row['unit'].endswith('/s'):  # less is better
                row['ratio'] = row['plain'] / row['value']
    return rows


def in_own_process(function, *arguments):
    print(f'{function.__name__} ...', file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        return pool.submit(quietly, function, *arguments).result()


def quietly(function, *arguments):
    """Call function without its output on stdout, which is for the results."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def make_row(name, value, unit, kind=None):
    """kind: names the figure of the baseline to compare with."""
    return {'name': name, 'value': value, 'unit': unit, 'kind': kind}


def median_time(function, repeats, device):
    """Median seconds of a call, after a warmup call."""
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


# Training ----------------------------------------------------------------------------------------


def make_step(device, dtype, plain=False, compiled=False, **options):
    """(GPT-2 124M, a function that trains it by one step). plain: the baseline."""
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, bias=False, **options)).to(device)
    if plain:
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95),
                                      weight_decay=0.1)
    else:
        optimizer = adamw(model.parameters(), 0.1, 6e-4, (0.9, 0.95))
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step():
        x = torch.randint(50257, (BATCH_SIZE, BLOCK_SIZE), device=device)
        with autocast(device, dtype):
            loss = forward(x, x, return_logits=plain)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def matmul_flops(device, dtype):
    """FLOP/s of a large matrix product: an upper bound in practice."""
    n = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_time(lambda: a @ b, 10, device)


def training(config, checkpointing):
    device = start_device(config.device, 'auto')  # as train.py does
    dtype = pick_dtype('auto', device, 768)
    model, step = make_step(device, dtype, compiled=config.compile,
                            activation_checkpointing=checkpointing)
    seconds = median_time(step, config.repeats, device)
    memory = peak_memory(device)
    if config.profile and not checkpointing:
        write_profile(step, device, config.profile)
    name = f'training, {BATCH_SIZE} x {BLOCK_SIZE}, {dtype_name(dtype)}'
    if checkpointing:
        name += ', activation checkpointing'
    speed = BATCH_SIZE * BLOCK_SIZE / seconds
    share = model.flops_per_token() * speed / matmul_flops(device, dtype)
    return [make_row(name, speed, 'tokens/s', 'speed'),
            make_row('  share of the FLOP/s of a large matmul', 100 * share, '%'),
            make_row('  peak memory', memory / 1e9, 'GB', 'memory')]


def write_profile(step, device, path):
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(3):
            step()
    with tempfile.TemporaryDirectory() as folder, os_errors(f'profile = {path!r}'):
        exported = Path(folder) / Path(path).name  # compressed if it ends in .gz
        trace.export_chrome_trace(str(exported))
        with open(exported, 'rb') as source, create(path) as target:
            shutil.copyfileobj(source, target)


def plain_training(config):
    device = pick_device(config.device)
    _, step = make_step(device, torch.float32, plain=True)
    seconds = median_time(step, max(1, config.repeats // 2), device)
    return {'speed': BATCH_SIZE * BLOCK_SIZE / seconds, 'memory': peak_memory(device) / 1e9}


# Sampling ----------------------------------------------------------------------------------------


def sampling(config, int8):
    device = pick_device(config.device)
    dtype = pick_dtype('auto', device, 768)
    model = GPT(GPTConfig(bias=False)).to(device, dtype).eval()
    weight_bytes = model.get_num_params() * dtype.itemsize
    name = dtype_name(dtype)
    if int8:
        weight_bytes = model.get_num_params()
        name = 'int8'
        quantize(model)
    elif not config.compile:
        pack(model)
    prompt = torch.randint(50257, (N_PROMPT,)).tolist()

    def seconds(n_samples, n_new, compile=False):
        return median_time(lambda: model.generate([prompt] * n_samples, n_new, compile=compile),
                           config.repeats, device)

    one = seconds(1, N_NEW, config.compile)
    first_token = seconds(1, 1)
    ten = seconds(10, N_NEW, config.compile)
    speed = (N_NEW - 1) / (one - first_token)  # of the tokens after the first
    # every token reads all weights
    floor = weight_bytes / memory_bandwidth(device, config.repeats)
    return [make_row(f'1 sample of {N_NEW} tokens, prompt of {N_PROMPT}, {name}', N_NEW / one,
                     'tokens/s', 'one'),
            make_row('  each token after the first', speed, 'tokens/s'),
            make_row('  share of the speed at which weights can be read', 100 * floor * speed, '%'),
            make_row(f'10 samples of {N_NEW} tokens, one prompt of {N_PROMPT}, {name}',
                     10 * N_NEW / ten, 'tokens/s', 'ten')]


def memory_bandwidth(device, repeats):
    """Bytes/s read by a sum over 1 GB."""
    numbers = torch.ones(2**28, device=device)
    return 4 * len(numbers) / median_time(numbers.sum, repeats, device)


def plain_sampling(config):
    """The whole context for each token, one sample after the other, in fp32; 4 tokens stand for
    all."""
    device = pick_device(config.device)
    model = GPT(GPTConfig(bias=False)).to(device).eval()
    n = N_PROMPT + N_NEW // 2  # the mean length of the context
    prompt = torch.randint(50257, (n,)).tolist()
    seconds = median_time(lambda: model.generate([prompt], 4, use_cache=False),
                          max(1, config.repeats // 2), device)
    return {'one': 4 / seconds, 'ten': 4 / seconds}


# Data --------------------------------------------------------------------------------------------


def prepare(config):
    """Text into bins with GPT-2's BPE (without a network, a BPE trained here), against tiktoken
    alone on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = config.input
        if path is None:
            path = folder / 'text.txt'
            write_stdlib(path)
        try:
            tokenizer = gpt2()
        except UserError:
            tokenizer = train_bpe(read_pieces(path), 1024, 2**20)
        size = os.path.getsize(path)
        tiktoken_seconds, seconds = [], []
        for _ in range(max(1, config.repeats // 2)):
            begin = time.perf_counter()
            tokenize_only(path, tokenizer)
            tiktoken_seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            pieces = split_at_end(((text, False) for text in read_pieces(path)), size)
            write_dataset(folder / 'bins', pieces, tokenizer, 'a benchmark', size)
            seconds.append(time.perf_counter() - begin)
    seconds, tiktoken_seconds = statistics.median(seconds), statistics.median(tiktoken_seconds)
    return [make_row(f'prepare, {tokenizer.kind}, {size / 1e6:,.0f} MB', size / 1e6 / seconds,
                     'MB/s'),
            make_row('  share of the speed of tiktoken alone, on all cores',
                     100 * tiktoken_seconds / seconds, '%'),
            make_row('  peak memory', peak_memory(torch.device('cpu')) / 1e9, 'GB')]


def write_stdlib(path):
    """The source of Python's standard library, 8 times."""
    sources = sorted(Path(os.__file__).parent.glob('*.py'))
    texts = [source.read_text(encoding='utf-8', errors='replace') for source in sources]
    write_text(path, '\n'.join(texts) * 8)


def tokenize_only(path, tokenizer):
    """tiktoken alone, on all cores."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    encoding = tiktoken.Encoding('alone', pat_str=tokenizer.pattern, mergeable_ranks=ranks,
                                 special_tokens=tokenizer.special)
    with ThreadPoolExecutor(os.cpu_count()) as pool, open(path, encoding='utf-8') as file:
        pieces = iter(lambda: file.read(2**20), '')
        encode = functools.partial(encoding.encode_to_numpy, disallowed_special=())
        for _ in pool.map(lambda text: len(encode(text)), pieces):
            pass


def data(config):
    """Batches from one file and from 100, and opening a terabyte; the files are sparse."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        n_tokens = 10**8
        write_empty_bins(folder / 'one', n_tokens, 1)
        write_empty_bins(folder / 'many', n_tokens, 100)
        one, many = open_bins(folder / 'one', n_tokens), open_bins(folder / 'many', n_tokens)
        seconds = {one: [], many: []}
        for i in range(100 * config.repeats):
            for split in seconds:  # in turn, so that noise hits both
                begin = time.perf_counter()
                split.batch(64 * i, 64, seed=1)
                seconds[split].append(time.perf_counter() - begin)
        n_tokens = 5 * 10**11
        write_empty_bins(folder / 'terabyte', n_tokens, 500)
        open_seconds = []
        for _ in range(config.repeats):
            begin = time.perf_counter()
            split = open_bins(folder / 'terabyte', n_tokens)
            open_seconds.append(time.perf_counter() - begin)
            del split  # unmap outside of the measured time
    one, many = statistics.median(seconds[one]), statistics.median(seconds[many])
    return [make_row('a batch of 64 x 1024 tokens from 100 files', 1e3 * many, 'ms'),
            make_row('  relative to one file', many / one, ''),
            make_row('opening 1 TB in 500 files', 1e3 * statistics.median(open_seconds), 'ms')]


def write_empty_bins(folder, n_tokens, n_files):
    folder.mkdir()
    for number in range(n_files):
        with create(shard_path(folder, 'train', number)) as file:
            file.truncate(2 * n_tokens // n_files)


def open_bins(folder, n_tokens):
    return TokenBin(folder, 'train', np.dtype('<u2'), 50257, 1024, n_tokens)


# Startup -----------------------------------------------------------------------------------------


def start(config):
    def seconds(*command, until=None):
        run_time(command, until)  # warmup: reads files from the disk, prepares the data
        return statistics.median(run_time(command, until) for _ in range(config.repeats))

    import_torch = seconds('-c', 'import torch')
    with tempfile.TemporaryDirectory() as folder:
        first_step = seconds('train.py', 'config/quickstart.py', '--log_interval=1',
                             f'--out_dir={folder}', f'--device={config.device}',
                             until='step 0: loss')
    show_help = seconds('train.py', '--help')
    import_model = statistics.median(import_time() for _ in range(config.repeats))
    return [make_row('train.py --help', show_help, 's'),
            make_row('import torch', import_torch, 's'),
            make_row('import model, after torch', import_model, 's'),
            make_row('train.py config/quickstart.py to its first step', first_step, 's')]


def import_time():
    """Seconds that `import model` takes in a process that has imported torch. The difference of two
    processes would be lost in the noise of importing torch."""
    code = ('import time, torch; begin = time.perf_counter(); import model; '
            'print(time.perf_counter() - begin)')
    return float(subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, check=True,
                                stdout=subprocess.PIPE).stdout)


def run_time(arguments, until=None):
    """Seconds until a Python process ends, or until it prints a text."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if until is None:
        process.communicate()
        return time.perf_counter() - begin
    while until not in process.stdout.readline():
        require(process.poll() is None, f'{" ".join(arguments)} ended early')
    seconds = time.perf_counter() - begin
    process.terminate()
    process.communicate()
    return seconds


# Checkpoints -------------------------------------------------------------------------------------


def saving(config):
    """Background checkpoints: the cost of one during 100 steps of the quickstart, and for how long
    a large one blocks the loop."""
    return [*saving_quickstart(config), *saving_large(config)]


def saving_quickstart(config):
    device = pick_device(config.device)
    train_config = quickstart()
    shape = choose_model_config(train_config, given=set(), checkpoint=None)
    model = GPT(GPTConfig(**shape, vocab_size=2048)).to(device)
    optimizer = make_optimizer(model, train_config)
    dtype = pick_dtype('auto', device, train_config.n_embd)
    if math_attention_is_faster(device, dtype, train_config.block_size):
        model.train_with_math_attention()

    def train(n_steps):
        for _ in range(n_steps):
            x = torch.randint(2048, (train_config.batch_size, train_config.block_size),
                              device=device)
            with autocast(device, dtype):
                loss = model(x, x)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device

    steps, saves = [], []  # clocks
    with tempfile.TemporaryDirectory() as folder:
        saver = ckpt.Saver(folder, keep_last=2)
        train(3)  # warmup
        for i in range(config.repeats):
            begin = clocks()
            train(20)
            steps.append(since(begin))
            saves.append(time_save(saver, model, optimizer, i))
        size = ckpt.manifests(folder)[0]['bytes']
    seconds = 5 * statistics.median(wall for wall, _ in steps)
    cpu = 5 * statistics.median(cpu for _, cpu in steps)
    blocked = statistics.median(blocked for blocked, _, _ in saves)
    cpu_save = statistics.median(cpu for _, _, cpu in saves)
    return [make_row('100 steps of the quickstart', seconds, 's'),
            make_row('  CPU seconds', cpu, 's'),
            make_row(f'  saving its {size / 1e6:.0f} MB once blocks the loop for', blocked, 's'),
            make_row('    share of the time', 100 * blocked / seconds, '%'),
            make_row('    share of the CPU seconds', 100 * cpu_save / cpu, '%')]


def saving_large(config):
    device = pick_device(config.device)
    model = GPT(GPTConfig(n_layer=12, n_head=8, n_embd=512, vocab_size=8192, block_size=128))
    model = model.to(device)
    optimizer = make_optimizer(model, quickstart())
    with tempfile.TemporaryDirectory() as folder:
        saver = ckpt.Saver(folder, keep_last=1)
        saves = [time_save(saver, model, optimizer, i) for i in range(config.repeats)]
        size = ckpt.manifests(folder)[0]['bytes']
    blocked = [blocked for blocked, _, _ in saves]
    return [make_row(f'saving {size / 1e6:.0f} MB blocks the loop for', statistics.median(blocked),
                     's'),
            make_row('  at most', max(blocked), 's'),
            make_row('  on disk after', statistics.median(done for _, done, _ in saves), 's')]


def quickstart():
    path = ROOT / 'config' / 'quickstart.py'
    return TrainConfig(**read_config_file(str(path), TrainConfig))


def time_save(saver, model, optimizer, step):
    """(seconds that the loop is blocked, seconds until the file is on disk, CPU seconds)"""
    begin = clocks()
    saver.save(ckpt.Checkpoint(asdict(model.config), model.state_dict(), step,
                               optimizer=optimizer.state_dict()))
    blocked, _ = since(begin)
    saver.wait()
    return blocked, *since(begin)


def clocks():
    return time.perf_counter(), time.process_time()


def since(begin):
    """(seconds, CPU seconds) since clocks() were read."""
    seconds, cpu = clocks()
    return seconds - begin[0], cpu - begin[1]


# -------------------------------------------------------------------------------------------------


def main(config):
    header = {'device': str(pick_device(config.device)), 'threads': torch.get_num_threads(),
              'torch': str(torch.__version__)}
    rows = []
    for part in config.parts:
        rows += measure(part, config)
    if config.json:
        print(json.dumps(header | {'rows': rows}, indent=1))
        return
    print(', '.join(f'{key} {value}' for key, value in header.items()))
    for row in rows:
        line = f'{row["name"]:<62}{row["value"]:>12,.4g} {row["unit"]:<9}'
        if 'plain' in row:
            line += f'{row["plain"]:>12,.3g}   x {row["ratio"]:.2f}'
        print(line)


if __name__ == '__main__':
    with user_errors():
        main(config)
