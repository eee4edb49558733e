"""Test and measure plainGPT on this GPU; writes gpu_report.md and gpu_report.json.

    python tools/gpu_report.py                       # eight minutes on an H100; needs no network
    python tools/gpu_report.py --parts='["training", "nanogpt"]' --minutes=20
    python tools/gpu_report.py --device=cpu --quick  # tiny sizes: tries the report, not the machine

`pytest -m cuda`; training of GPT-2 124M and of depths of the --depth dial; nanoGPT's plain way, in
turn with ours; sampling; a step's time by kernel; saving. Every measurement is a process with a
time limit: a crash costs one row. Several prepare and compile at a time; each has the GPU to itself
while it measures. After --minutes nothing more is begun; Ctrl-C prints what is there.
"""
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import FilePath, Positive, configure
from lib.errors import os_errors, plural, require, user_errors
from lib.files import write_text

PARTS = ('tests', 'training', 'nanogpt', 'sampling', 'breakdown', 'saving')


@dataclass
class Config:
    parts: list[str] = field(default_factory=lambda: list(PARTS))  # e.g. '["tests", "training"]'
    out_dir: FilePath | None = None  # None: gpu-report-<card>
    minutes: Positive = 8.0  # no measurement begins later
    device: str = 'auto'  # auto, cuda, cuda:1; with --quick also cpu
    quick: bool = False  # tiny sizes, and nothing is compiled: tries the report itself


def check(config):
    """Validate the config. Raises UserError."""
    require(hasattr(os, 'fork'), 'it forks its measurements, which Windows cannot: take Linux')
    for part in config.parts:
        require(part in PARTS, f'parts = {part!r}: give some of {", ".join(PARTS)}')


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)
        check(config)

import torch

import checkpoint as ckpt
from lib import device as devices
from lib import memory
from lib.linear import quantize
from lib.recipe import read_train_config
from lib.synthetic import PlainGPT, RandomRows, make_trainer
from model import GPT, GPTConfig
from optimizer import adamw_groups

VOCAB_SIZE = 50257  # GPT-2's tokens, as its data sets have them
PREPARE_SECONDS, MEASURE_SECONDS = 240, 60  # limits of a job
# nanoGPT's run on 8 GPUs, one of them
GPT2 = [str(ROOT / 'config/train_gpt2.py'), '--gradient_accumulation_steps=5']
TINY = ['--block_size=64', '--batch_size=2', '--gradient_accumulation_steps=2']
TINY_MODEL = ['--n_layer=2', '--n_head=2', '--n_embd=64']


# Measuring, in a process of each job's own --------------------------------------------------------
# A job is a generator: it prepares, yields, measures when it goes on, and yields its row.


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=1):
    """Mean seconds of a call."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def repeats_of(function, device, config):
    """How many calls take half a second, after a first one."""
    return 1 if config.quick else max(1, min(100, round(0.5 / seconds_of(function, device))))


def peak_gigabytes(device, function):
    """The peak of PyTorch's memory on the GPU during a call; None on a CPU."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == 'cuda' else None


def start(config, compiled, deterministic=False, flash_attention_3=False):
    """(device, dtype) of this process."""
    device = devices.start_device(config.device, deterministic)
    if not flash_attention_3:  # which the Trainer takes where it is installed
        devices.use_flash_attention_3 = lambda device: None
    if config.quick:
        torch.compiler.set_stance('force_eager')
    if compiled and not devices.can_compile(True, device):
        raise RuntimeError('torch.compile failed')
    devices.compile_failed = forbid  # measure no eager mode under the name of a compiled one
    return device, devices.pick_dtype('auto', device, 768)


def forbid(error):
    if error:
        raise error


def trainer_of(config, model, compiled, n_chunks=None, vocab_size=VOCAB_SIZE, deterministic=False,
               flash_attention_3=False):
    """train.py's Trainer for 'GPT-2 124M' or 'depth N', on random tokens, warmed up. n_chunks: in
    which the loss is computed; None: train.py's choice."""
    device, dtype = start(config, compiled, deterministic, flash_attention_3)
    # the step to be measured is in an entry point, which is imported nowhere else
    train = importlib.import_module('train')
    keys = GPT2 if model == 'GPT-2 124M' else [f'--depth={model.removeprefix("depth ")}']
    if config.quick:
        keys = keys + TINY + (TINY_MODEL if keys is GPT2 else [])
        vocab_size = 300
    train_config, _ = read_train_config(keys)
    size = train_config.batch_size
    if n_chunks:
        n_logits = size * train_config.block_size * vocab_size
        train.max_logits = lambda gpu_memory: math.ceil(n_logits / n_chunks)
    trainer = make_trainer(train, train_config, RandomRows(train_config.block_size, vocab_size),
                           vocab_size, device, dtype, compiled)
    if train_config.batch_size < size:
        raise torch.OutOfMemoryError(f'out of memory with batch_size = {size}')
    seconds_of(trainer.train_step, device)  # warmup
    return trainer


def speed(trainer, seconds):
    """Figures of a step that takes so many seconds."""
    samples, device = trainer.samples_per_step, trainer.device
    peak = devices.peak_flops(device, trainer.dtype)
    return {'tokens/s': samples * trainer.config.block_size / seconds, 'step ms': 1e3 * seconds,
            'MFU %': peak and 100 * trainer.raw_model.estimate_mfu(samples, seconds, peak)}


def training(config, model, variant, **options):
    """Speed and memory of training."""
    trainer = trainer_of(config, model, **options)
    device, c = trainer.device, trainer.config
    yield
    peak = peak_gigabytes(device, trainer.train_step)
    repeats = repeats_of(trainer.train_step, device, config)
    seconds = statistics.median(seconds_of(trainer.train_step, device, repeats) for _ in range(3))
    step = f'{c.gradient_accumulation_steps} x {c.batch_size} x {c.block_size}'
    estimate = memory.step_bytes(memory.Sizes(trainer.raw_model.config, device), c,
                                 trainer.dtype != torch.float32,
                                 gpu_memory=devices.total_memory(device))
    yield {'model': model, 'variant': variant, 'step': step, **speed(trainer, seconds),
           'peak GB': peak, 'estimated GB': sum(estimate.values()) / 1e9}


def plain_step(config, device, dtype):
    """nanoGPT's training step, with the sizes of its config/train_gpt2.py."""
    c, _ = read_train_config(GPT2 + (TINY + TINY_MODEL if config.quick else []))
    vocab_size = 320 if config.quick else 50304
    rows = RandomRows(c.block_size, 300 if config.quick else VOCAB_SIZE)
    model = PlainGPT(vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd).to(device)
    optimizer = torch.optim.AdamW(adamw_groups(model.parameters(), 0.1, 6e-4), lr=6e-4,
                                  betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)

    def step():
        for _ in range(c.gradient_accumulation_steps):
            x, y = devices.to_device(*rows.batch(0, c.batch_size, 0), device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = compiled(x, y) / c.gradient_accumulation_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def nanogpt(config):
    """GPT-2 124M here and in nanoGPT's way, in turn."""
    device, dtype = start(config, compiled=True)
    plain = plain_step(config, device, dtype)
    plain()
    plain_gb = peak_gigabytes(device, plain)
    trainer = trainer_of(config, 'GPT-2 124M', compiled=True)
    yield
    repeats = repeats_of(trainer.train_step, device, config)
    mine, theirs = [], []
    for _ in range(5):  # in turn: the clock of the GPU changes with its temperature
        mine.append(seconds_of(trainer.train_step, device, repeats))
        theirs.append(seconds_of(plain, device, repeats))
    seconds, plain_seconds = statistics.median(mine), statistics.median(theirs)
    yield {**speed(trainer, seconds), 'ratio': plain_seconds / seconds,
           'plain: tokens/s': speed(trainer, plain_seconds)['tokens/s'],
           'plain: peak GB': plain_gb}


def sampling(config, streams, variant, compiled=False, int8=False):
    """Tokens per second of GPT-2 124M after the first one; prompts of 128 tokens, top_k = 200."""
    device, dtype = start(config, compiled)
    sizes = {'n_layer': 2, 'n_head': 2, 'n_embd': 64} if config.quick else {}
    model = GPT(GPTConfig(bias=False, **sizes)).to(device, dtype).eval()
    if int8:
        quantize(model)
    prompts = [torch.randint(VOCAB_SIZE, (128,)).tolist()] * streams
    n_new = 16 if config.quick else 256

    def generate(n):
        model.generate(prompts, n, top_k=200, seed=1, compile=compiled)

    generate(4)  # the second step records a CUDA graph
    yield
    first = statistics.median(seconds_of(lambda: generate(1), device) for _ in range(3))
    every = statistics.median(seconds_of(lambda: generate(n_new), device) for _ in range(3))
    yield {'streams': streams, 'variant': variant, 'first token ms': 1e3 * first,
           'tokens/s after it': streams * (n_new - 1) / max(every - first, 1e-9)}


KINDS = {  # of a kernel, by parts of its name; the first one that matches
    'optimizer and clipping': 'adam|multi_tensor|lpnorm|vector_norm',
    'attention': 'flash|fmha|attention|sdpa',
    'loss and logits': 'log_softmax|logsumexp|nll_loss|cross_entropy',
    'matmul': r'gemm|nvjet|cutlass|matmul|wgmma|splitk|aten::(add)?mm',
}


def kind_of(name, shapes, vocab_size):
    """The kind of a kernel, or of an operation on a CPU. shapes: of its operation's inputs; a
    product with the head's matrix belongs to the logits."""
    found = next((k for k, names in KINDS.items() if re.search(names, name, re.IGNORECASE)),
                 'other')
    dims = re.findall(r'\d+', str(shapes))
    of_head = any(vocab_size <= int(n) <= vocab_size + 128 for n in dims)
    return 'loss and logits' if found == 'matmul' and of_head else found


def breakdown(config):
    """Where the time of a compiled step of GPT-2 124M goes, by kind of kernel."""
    trainer, n_steps = trainer_of(config, 'GPT-2 124M', compiled=True), 3
    device, on_cuda = trainer.device, trainer.device.type == 'cuda'
    vocab_size = trainer.raw_model.config.vocab_size
    yield
    repeats = repeats_of(trainer.train_step, device, config)
    seconds = seconds_of(trainer.train_step, device, repeats)
    with torch.profiler.profile(record_shapes=True) as trace:  # of CPU and GPU
        seconds_of(trainer.train_step, device, n_steps)
    kinds, kernels = Counter(), Counter()  # microseconds
    for event in trace.events():
        if event.is_user_annotation:
            continue
        work = [(kernel.name, kernel.duration) for kernel in event.kernels]
        if not on_cuda:
            work = [(event.name, event.self_cpu_time_total)]
        for name, duration in work:  # a kernel has no shapes, but what launched it has
            kinds[kind_of(name, event.input_shapes, vocab_size)] += duration
            kernels[name] += duration
    total = max(1e-9, sum(kinds.values()))
    busy = total / n_steps / 1e6 / seconds  # kernels of one stream do not overlap
    shares = {f'{name} %': 100 * kinds[name] / total for name in (*KINDS, 'other')}
    yield {'step ms': 1e3 * seconds, **shares, 'GPU idle %': 100 * (1 - busy) if on_cuda else None,
           'kernels': {name[:200]: us / 1e3 / n_steps for name, us in kernels.most_common(25)}}


def saving(config):
    """How long a checkpoint of GPT-2 124M takes, and how long the loop waits for it."""
    trainer = trainer_of(config, 'GPT-2 124M', compiled=False)
    yield
    blocked, done = [], []
    with tempfile.TemporaryDirectory(dir=config.out_dir) as folder:
        saver = ckpt.Saver(folder, keep_last=1)
        trainer.run = SimpleNamespace(writes=True, save=saver.save)
        for _ in range(3):
            seconds_of(trainer.train_step, trainer.device)
            begin = time.perf_counter()
            trainer.save(None)
            blocked.append(time.perf_counter() - begin)
            saver.wait()
            done.append(time.perf_counter() - begin)
        n_bytes = ckpt.manifests(folder)[0]['bytes']
    yield {'GB': n_bytes / 1e9, 'the loop waits s': statistics.median(blocked),
           'on disk after s': statistics.median(done)}


def tests(config):
    """Run `pytest -m cuda`, several at a time."""
    n = 1 if config.quick else max(1, min(4, (os.cpu_count() or 1) // 3))
    command = [sys.executable, '-m', 'pytest', '-o', 'addopts=', '-m', 'cuda', '-n', str(n),
               '--dist', 'worksteal', '-v', '-rf', '--tb=short', '-p', 'no:cacheprovider']
    files = sorted(ROOT.glob('tests/test_cuda*.py'))
    with open(Path(config.out_dir, 'log', 'pytest.txt'), 'w', encoding='utf-8') as log:
        subprocess.run([*command, *files], cwd=ROOT, stdout=log, stderr=log)
    yield
    yield {'log': log.name}


def read_tests(path):
    """{'counts': {'passed': n, ...}, 'failures': lines} of pytest's output so far, or None."""
    if not path.exists():
        return None
    text = path.read_text(encoding='utf-8', errors='replace')
    ended = re.findall(r'^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.+?) *$', text, re.MULTILINE)
    counts = Counter(outcome.lower() for outcome, _ in ended)
    # the summary at the end has the reasons
    failures = re.findall(r'^(?:FAILED|ERROR) (.+)$', text, re.MULTILINE)
    failures = failures or [test for outcome, test in ended if outcome in ('FAILED', 'ERROR')]
    return {'counts': {'passed': 0, 'failed': 0, 'skipped': 0} | counts, 'failures': failures}


# Jobs ---------------------------------------------------------------------------------------------


@dataclass
class Job:
    name: str
    function: Callable  # a generator, see above
    options: dict = field(default_factory=dict)
    priority: int = 0  # 0 comes first

    @property
    def part(self):
        return self.function.__name__


def make_jobs(config, device):
    """The jobs of the parts asked for, in the order of the report."""
    on = {'compiled': True}
    variants = [(1, 'eager', {'compiled': False}), (0, 'compiled', on)]
    hopper = device.type == 'cuda' and torch.cuda.get_device_capability(device)[0] == 9
    if hopper and importlib.util.find_spec('flash_attn_interface'):
        variants.append((1, 'compiled, FlashAttention 3', on | {'flash_attention_3': True}))
    variants.append((2, 'compiled, --deterministic', on | {'deterministic': True}))
    losses = [(1, f'compiled, loss in {plural(n, "chunk")}', on | {'n_chunks': n})
              for n in ([4] if config.quick else [1, 2, 4, 37])]
    losses.append((1, 'compiled, vocabulary 50304', on | {'vocab_size': 50304, 'n_chunks': 1}))
    models = ['GPT-2 124M', *(f'depth {n}' for n in ([1] if config.quick else [4, 8, 12, 18]))]
    jobs = [Job('tests', tests, priority=-1)]
    for model in models:
        rank = 2 * (model != models[0])
        for more, name, options in variants + losses * (rank == 0):
            options = {'model': model, 'variant': name} | options
            jobs.append(Job(f'{model}, {name}', training, options, rank + more))
    jobs.append(Job('nanoGPT', nanogpt))
    for streams in [2] if config.quick else [1, 32]:
        for name, options in (('eager', {}), ('CUDA graph', on),
                              ('int8, CUDA graph', on | {'int8': True})):
            options = {'streams': streams, 'variant': name} | options
            jobs.append(Job(f'{plural(streams, "stream")}, {name}', sampling, options, 1))
    jobs += [Job('breakdown', breakdown), Job('saving', saving, priority=1)]
    return [job for job in jobs if job.part in config.parts]


def work(pipe, log, function, config, options):
    """A job in its process: prepare, wait for the turn, measure."""
    os.setpgid(0, 0)  # a group with the processes that it starts
    if config.quick:
        torch.set_num_threads(1)  # several share a CPU
    with open(log, 'w', encoding='utf-8') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    steps = function(config, **options)
    next(steps)
    pipe.send('ready')
    pipe.recv()
    pipe.send(next(steps))


class Worker:
    """A job's process, seen from outside."""

    def __init__(self, job, config):
        name = re.sub(r'\W+', '-', f'{job.part} {job.name}')
        self.job, self.log, self.error = job, Path(config.out_dir, 'log', f'{name}.txt'), None
        # forked from a server that has done the slow imports, but has not touched CUDA
        os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'  # nor is_available() in it
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['train', 'torch._inductor'])
        self.pipe, theirs = context.Pipe()
        arguments = theirs, self.log, job.function, config, job.options
        self.process = context.Process(target=work, args=arguments)
        self.process.start()
        theirs.close()

    def receive(self, seconds):
        """What the process sends next; None, with the reason in error, if that is nothing."""
        try:
            if self.pipe.poll(max(1.0, seconds)):
                return self.pipe.recv()
            self.error = f'not done after {seconds:.0f} s'
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            lines = self.log.read_text(errors='replace').split('\n') if self.log.exists() else []
            last = next((line for line in reversed(lines) if line.strip()), '')
            self.error = f'exit code {self.process.exitcode}: {last[:300]}'
        self.end()

    def end(self):
        """Kill the process and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def n_at_once(device):
    """How many jobs prepare at a time: their models and compilers share GPU and CPU."""
    n_cpus = os.cpu_count() or 1
    if device.type == 'cpu':
        return 2 * n_cpus
    return max(1, min(6, n_cpus // 3, int(devices.total_memory(device) / 16e9)))


def run_jobs(jobs, device, report):
    """Run all jobs, in waves; those that ran out of memory next to others once more, alone."""
    waiting, alone = sorted(jobs, key=lambda job: job.priority), []
    while waiting or alone:
        retry = not waiting
        source, n = (alone, 1) if retry else (waiting, n_at_once(device))
        wave = source[:n]
        del source[:n]
        if report.seconds_left() <= 0:
            for job in wave:
                report.fail(job, f'not begun: --minutes={report.config.minutes:g} were over')
            continue
        report.progress(f'preparing {"; ".join(job.name for job in wave)}')
        workers, end = [], time.monotonic() + min(PREPARE_SECONDS, report.seconds_left())
        try:
            workers += (Worker(job, report.config) for job in wave)
            ready = [worker for worker in workers if worker.receive(end - time.monotonic())]
            for worker in ready:
                report.progress(worker.job.name)
                with contextlib.suppress(OSError):  # it has just ended: receive says why
                    worker.pipe.send('go')
                row = worker.receive(MEASURE_SECONDS)
                if row:
                    report.add(worker.job, row)
                    worker.process.join(5)
                worker.end()
        finally:
            for worker in workers:
                worker.end()
        for worker in workers:
            if worker.error and 'out of memory' in worker.error.lower() and not retry:
                alone.append(worker.job)
            elif worker.error:
                report.fail(worker.job, worker.error)


# The report ---------------------------------------------------------------------------------------


class Report:
    """What is known so far; its files are written anew with each row."""

    def __init__(self, config, device, jobs):
        self.config, self.began = config, time.monotonic()
        self.machine = describe_machine(device)
        self.rows, self.missing, self.order = [], [], [job.name for job in jobs]

    def seconds_left(self):
        return self.began + 60 * self.config.minutes - time.monotonic()

    def progress(self, text):
        print(f'{time.monotonic() - self.began:4.0f} s  {text}', file=sys.stderr, flush=True)

    def add(self, job, row):
        self.rows.append({'part': job.part, 'job': job.name} | row)
        self.rows.sort(key=lambda row: self.order.index(row['job']))
        self.write()

    def fail(self, job, reason):
        self.progress(f'{job.name}: {reason}')
        self.missing.append({'job': job.name, 'reason': reason})
        self.write()

    def write(self):
        """Write both files; returns the Markdown. Raises UserError."""
        folder = Path(self.config.out_dir)
        tests = read_tests(folder / 'log' / 'pytest.txt')
        content = {'machine': self.machine, 'tests': tests, 'rows': self.rows,
                   'missing': self.missing}
        text = self.markdown(tests)
        with os_errors(f'out_dir = {self.config.out_dir!r}'):
            write_text(folder / 'gpu_report.json', json.dumps(content, indent=1))
            write_text(folder / 'gpu_report.md', text)
        return text

    def markdown(self, tests):
        lines = [f'# {self.machine["card"]}', '']
        lines.append(', '.join(f'{key} {value}' for key, value in self.machine.items()))
        if tests:
            lines += ['', '## tests', '', ', '.join(f'{n} {x}' for x, n in tests['counts'].items())]
            lines += ['', *(f'- {line}' for line in tests['failures'])]
        for part in PARTS[1:]:
            rows = [row for row in self.rows if row['part'] == part]
            if not rows:
                continue
            keys = [key for key, value in rows[0].items()
                    if key not in ('part', 'job') and not isinstance(value, dict)]
            table = [keys, ['---'] * len(keys), *([cell(row[key]) for key in keys] for row in rows)]
            lines += ['', f'## {part}', '', *(f'| {" | ".join(cells)} |' for cells in table)]
        if self.missing:
            lines += ['', '## not measured', '']
            lines += [f'- {entry["job"]}: {entry["reason"]}' for entry in self.missing]
        return '\n'.join(lines) + '\n'


def cell(value):
    if isinstance(value, float):
        return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'
    return '-' if value is None else str(value)


def describe_machine(device):
    """Names and versions that the figures depend on."""
    machine = {'card': devices.device_name(device), 'torch': str(torch.__version__),
               'CUDA': torch.version.cuda, 'driver': None, 'CPUs': os.cpu_count(),
               'date': time.strftime('%Y-%m-%d %H:%M')}
    with contextlib.suppress(OSError):
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        output = subprocess.run(command, text=True, capture_output=True).stdout.split()
        machine['driver'] = output[0] if output else None
    return machine


def main(config):
    device = devices.pick_device(config.device)
    require(device.type == 'cuda' or config.device == 'cpu' and config.quick,
            f'device = {device}: this measures an NVIDIA GPU, and PyTorch sees none here; '
            f'--device=cpu --quick tries the report itself')
    jobs = make_jobs(config, device)
    report = Report(config, device, jobs)
    config.device = str(device)
    if config.out_dir is None:
        config.out_dir = 'gpu-report-' + re.sub(r'\W+', '-', report.machine['card'])
    with os_errors(f'out_dir = {config.out_dir!r}'):
        Path(config.out_dir, 'log').mkdir(parents=True, exist_ok=True)
        Path(config.out_dir, 'log', 'pytest.txt').unlink(missing_ok=True)
    try:
        run_jobs(jobs, device, report)
    finally:  # Ctrl-C too
        print(report.write())


if __name__ == '__main__':
    with user_errors():
        main(config)
