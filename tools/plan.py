"""Plan a training run before it starts: parameters, FLOPs, memory, communication, time and cost.

    python tools/plan.py config/speedrun_gpt2.py --gpu=h100 --gpus=8
    python tools/plan.py config/train_gpt2.py --n_layer=48 --n_embd=1600 --n_head=25 --gpus=40

Takes every key of train.py. Nothing is allocated, so the model may be of any size. Each figure
comes with its formula and its source. Memory is the peak of PyTorch's allocator during a step; the
CUDA context comes on top.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Bound, Count, NonNegative, Positive, TrainConfig
from lib.budget import tokens_per_step
from lib.errors import plural, require, user_errors
from lib.recipe import read_train_config

Utilization = Annotated[float, Bound(lambda x: 0.001 <= x <= 1, 'at least 0.001, at most 1')]


class GPU(NamedTuple):
    name: str  # in lib.device.PEAK_FLOPS
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes/s
    link: float  # to the other GPUs of the machine, bytes/s in one direction (NVLink, else PCIe)


# from NVIDIA's data sheets
GPUS = {
    'b200': GPU('B200', 180e9, 7.7e12, 900e9),
    'h200': GPU('H200', 141e9, 4.8e12, 450e9),
    'h100': GPU('H100', 80e9, 3.35e12, 450e9),
    'a100': GPU('A100', 80e9, 2.04e12, 300e9),
    'v100': GPU('V100', 32e9, 0.9e12, 150e9),
    'l40s': GPU('L40S', 48e9, 0.864e12, 32e9),
    'a10': GPU('A10', 24e9, 0.6e12, 32e9),
    'l4': GPU('L4', 24e9, 0.3e12, 32e9),
    't4': GPU('T4', 16e9, 0.32e12, 16e9),
    'rtx5090': GPU('RTX 5090', 32e9, 1.79e12, 64e9),
    'rtx4090': GPU('RTX 4090', 24e9, 1.01e12, 32e9),
    'rtx3090': GPU('RTX 3090', 24e9, 0.936e12, 32e9),
}
USABLE = 0.9  # share of a GPU's memory that PyTorch can allocate
STRATEGIES = ('ddp', 'fsdp')


@dataclass
class Config(TrainConfig):
    # hardware
    gpu: str = 'h100'  # b200, h200, h100, a100, v100, l40s, a10, l4, t4, rtx5090, rtx4090, rtx3090
    gpus: Count = 8  # one process each
    gpus_per_machine: Count = 8  # connected by NVLink or PCIe
    network: Positive = 50.0  # GB/s per GPU between machines, in one direction: 400 Gbit/s
    mfu: Utilization = 0.4  # expected model FLOPs utilization, for time and cost
    price: NonNegative = 2.5  # dollars per GPU hour
    vocab_size: Count | None = None  # None: the data set's, or GPT-2's if it is not prepared


def read_command(argv):
    """The Config of a command line, checked. Raises UserError."""
    words = [word.removeprefix('--config=') for word in argv if word != '--config']
    config, _ = read_train_config(words, cls=Config)
    config.gpu = config.gpu.lower()
    require(config.gpu in GPUS, f'gpu = {config.gpu!r}: give one of {", ".join(GPUS)}')
    require(config.init_from == 'scratch',
            f'init_from = {config.init_from}: a plan is for training from scratch')
    require(config.dtype != 'float32', 'dtype = float32: a plan is for 16 bits; leave it out')
    total, n = config.gradient_accumulation_steps, config.gpus
    lower = total // n * n
    choices = f'{lower} or {lower + n}' if lower else f'{n}'
    require(total % n == 0,
            f'gradient_accumulation_steps = {total} is not divisible by gpus = {n}: give '
            f'--gpus={math.gcd(total, n)}, or --gradient_accumulation_steps={choices}')
    return config


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config = read_command(sys.argv[1:])

import torch

from lib.device import PEAK_FLOPS
from lib.distributed import choose_parallel
from lib.memory import step_bytes
from lib.sizes import config_sizes
from model import GPT
from optimizer import block_matrices


def print_model(config, sizes, micro_batches):
    """Parameters, and FLOPs and tokens per step."""
    total = sizes.n_params()
    positions = total - sizes.of(GPT.get_num_params)
    tables = 0
    if config.ngram > 1:
        tables = sizes.one.transformer.ngram.tables.weight.numel()
    print_table('model', [
        ('parameters', f'{(total - positions - tables) / 1e6:,.2f}M',
         f'without {positions / 1e6:,.2f}M of learned positions and {tables / 1e6:,.2f}M in n-gram '
         f'tables'),
        ('FLOPs per token', f'{sizes.of(GPT.flops_per_token):.4g}',
         f'6 N + 12 L H Q T (PaLM, appendix B); N = '
         f'{sizes.of(GPT.num_matmul_params) / 1e6:,.2f}M in matrix products'),
        ('tokens per step', f'{tokens_per_step(config):,}',
         f'{config.batch_size} sequences x {config.block_size:,} x {micro_batches} micro-batches x '
         f'{plural(config.gpus, "GPU")}'),
    ])


def print_memory(config, sizes, gpu):
    """Peak memory of a step on each GPU, for DDP and for FSDP."""
    parts = {how: step_bytes(sizes, config, True, how, config.gpus, int(gpu.memory))
             for how in STRATEGIES}
    names = ['weights', 'gradients', 'optimizer', 'activations', 'activations, then gradients',
             'backward', 'logits', "Muon's update"]
    title = f'memory per GPU, which has {gpu.memory / 1e9:.0f} GB'
    print(f'\n{title:<40}{"DDP":>14}{"FSDP":>14}')
    for name in names:
        if any(name in parts[how] for how in STRATEGIES):
            cells = [gigabytes(parts[how][name]) if name in parts[how] else '-'
                     for how in STRATEGIES]
            print(f'  {name:<38}' + ''.join(f'{cell:>14}' for cell in cells))
    totals = [sum(parts[how].values()) for how in STRATEGIES]
    verdicts = ['fits' if total < USABLE * gpu.memory else 'does not fit' for total in totals]
    print(f'  {"total":<38}' + ''.join(f'{gigabytes(total):>14}' for total in totals))
    print(f'  {"":<38}' + ''.join(f'{verdict:>14}' for verdict in verdicts)
          + f'   (in {USABLE:.0%} of it)')
    print('  weights, gradients and optimizer state in fp32, of which FSDP keeps 1/n (Zhao et al.\n'
          '  2023); activations: Korthikanti et al. 2022, section 4, without scores')


class StepTime(NamedTuple):
    """Lower bounds on the seconds of a step; the dicts have an entry per strategy."""
    compute: float
    muon: float
    update: dict
    bytes_sent: dict  # per GPU
    link: float  # bytes/s
    total: dict


def estimate_step(config, sizes, gpu, micro_batches):
    """The StepTime at peak FLOP/s and peak bandwidth."""
    n, peak = config.gpus, PEAK_FLOPS[gpu.name]
    link = gpu.link
    if n > config.gpus_per_machine:
        link = min(link, config.network * 1e9)
    matrices = sizes.muon_shapes(config)
    total = sizes.n_params()
    in_muon = sum(count * shape.numel() for shape, count in matrices.items())
    in_blocks = sizes.of(lambda model: sum(p.numel() for p in block_matrices(model)))

    compute = sizes.of(GPT.flops_per_token) * tokens_per_step(config) / n / peak
    flops = 0
    for shape, count in matrices.items():  # 5 iterations: x x^T, a a and b x
        short, long = min(shape), max(shape)
        flops += count * 5 * (4 * short**2 * long + 2 * short**3)
    muon = flops / peak
    # AdamW reads 4 numbers and writes 3 per parameter, Muon reads 3 and writes 2
    update = 4 * (7 * total - 2 * in_muon) / gpu.bandwidth
    update = {'ddp': update, 'fsdp': update / n}
    # per micro-batch: blocks in 16 bits, for forward and again for backward; the rest and all
    # gradients in fp32
    per_micro_batch = 2 * 2 * in_blocks + 4 * (total - in_blocks) + 4 * total
    bytes_sent = {'ddp': (n - 1) / n * 2 * 4 * total,
                  'fsdp': (n - 1) / n * (micro_batches * per_micro_batch + 4 * in_muon)}
    lower_bound = {how: max(compute, bytes_sent[how] / link) + muon + update[how]
                   for how in STRATEGIES}
    return StepTime(compute, muon, update, bytes_sent, link, lower_bound)


def print_step(config, gpu, step):
    tokens, sent = tokens_per_step(config), step.bytes_sent
    print_table('lower bound on the time per step', [
        ('compute', seconds(step.compute),
         f'at {PEAK_FLOPS[gpu.name] / 1e12:,.0f} TFLOP/s, the peak in 16 bits'),
        ("Muon's matmuls", seconds(step.muon), '5 iterations on every GPU (Jordan 2024)'),
        ('update, DDP', seconds(step.update['ddp']),
         f'28 bytes per parameter of AdamW, 20 of Muon, at {gpu.bandwidth / 1e12:.2f} TB/s'),
        ('update, FSDP', seconds(step.update['fsdp']), 'of its shard'),
        ('communication, DDP', seconds(sent['ddp'] / step.link),
         f'{gigabytes(sent["ddp"])} at {step.link / 1e9:,.0f} GB/s: 2 (n - 1) / n of the gradients '
         f'(ring all-reduce: Patarasuk & Yuan 2009)'),
        ('communication, FSDP', seconds(sent['fsdp'] / step.link),
         f'{gigabytes(sent["fsdp"])}: weights twice and gradients once per micro-batch '
         f'(Rajbhandari et al. 2020)'),
        ('total, DDP', seconds(step.total['ddp']),
         f'{tokens / step.total["ddp"]:,.0f} tokens/s; communication overlaps with compute'),
        ('total, FSDP', seconds(step.total['fsdp']),
         f'{tokens / step.total["fsdp"]:,.0f} tokens/s'),
    ])


def print_run(config, sizes, gpu, step):
    """Time and cost of all steps."""
    how = choose_parallel(config.parallel, 16 * sizes.n_params(), gpu.memory)
    step_seconds = max((step.compute + step.muon) / config.mfu + step.update[how],
                       step.total[how])
    hours = config.max_iters * step_seconds / 3600
    gpu_hours = hours * config.gpus
    time = f'{hours / 24:.1f} days' if hours > 48 else f'{hours:.2f} hours'
    tokens = tokens_per_step(config)
    optimal = 20 * sizes.of(GPT.num_matmul_params)
    print_table(f'run on {config.gpus} x {gpu.name} with {how.upper()} at {config.mfu:.0%} MFU '
                f'(--mfu: an assumption until you measure it)', [
        ('speed', f'{tokens / step_seconds:,.0f}', f'tokens/s, {seconds(step_seconds)} per step'),
        ('tokens', f'{config.max_iters * tokens:.3g}',
         f'in {plural(config.max_iters, "step")}; compute-optimal are 20 N = {optimal:.3g} '
         f'(Hoffmann et al. 2022)'),
        ('time', time, 'without evaluations and checkpoints'),
        ('cost', f'${gpu_hours * config.price:,.0f}',
         f'{gpu_hours:,.1f} GPU hours at ${config.price:.2f} (--price)'),
    ])


def print_table(title, rows):
    print('\n' + title)
    for name, value, note in rows:
        print(f'  {name:<20}{value:>14}   {note}')


def gigabytes(size):
    return f'{size / 1e9:,.2f} GB'


def seconds(value):
    return f'{value * 1e3:,.3g} ms' if value < 1 else f'{value:,.3g} s'


def main(config):
    gpu = GPUS[config.gpu]
    sizes = config_sizes(config, torch.device('cuda'), config.vocab_size)
    micro_batches = config.gradient_accumulation_steps // config.gpus  # per GPU
    print(f'{plural(config.n_layer, "layer")}, {plural(config.n_head, "head")}, '
          f'{config.n_embd} wide, context {config.block_size:,}, vocabulary '
          f'{sizes.config.vocab_size:,}; {config.gpus} x {gpu.name}')
    print_model(config, sizes, micro_batches)
    print_memory(config, sizes, gpu)
    step = estimate_step(config, sizes, gpu, micro_batches)
    print_step(config, gpu, step)
    print_run(config, sizes, gpu, step)


if __name__ == '__main__':
    with user_errors():
        main(config)
