"""What a training run will take, before it is begun: parameters, FLOPs, memory for each GPU, communication, time and cost.

    python tools/plan.py config/speedrun_gpt2.py --gpu=h100 --gpus=8
    python tools/plan.py config/train_gpt2.py --n_layer=48 --n_embd=1600 --n_head=25 --gpu=a100 --gpus=40 --mfu=0.35

Every key of train.py may be given; nothing is allocated, so that the model may be of any size. Formulas and their sources stand
beside the figures. Memory is what PyTorch's allocator holds at the peak of a step; on a GPU its own context comes on top.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import memory
import parallel
import train
from configurator import configure, require, user_errors
from data import bins
from device import PEAK_FLOPS
from model import GPT, GPTConfig
from optimizer import block_matrices, muon_matrices

# bytes of memory, bytes/s of it, bytes/s to the other GPUs of a machine in one direction (NVLink, else PCIe): NVIDIA's data
# sheets; FLOP/s are in device.py
GPUS = {'b200': ('B200', 180e9, 7.7e12, 900e9), 'h200': ('H200', 141e9, 4.8e12, 450e9), 'h100': ('H100', 80e9, 3.35e12, 450e9),
        'a100': ('A100', 80e9, 2.04e12, 300e9), 'v100': ('V100', 32e9, 0.9e12, 150e9), 'l40s': ('L40S', 48e9, 0.864e12, 32e9),
        'a10': ('A10', 24e9, 0.6e12, 32e9), 'l4': ('L4', 24e9, 0.3e12, 32e9), 't4': ('T4', 16e9, 0.32e12, 16e9),
        'rtx5090': ('RTX 5090', 32e9, 1.79e12, 64e9), 'rtx4090': ('RTX 4090', 24e9, 1.01e12, 32e9),
        'rtx3090': ('RTX 3090', 24e9, 0.936e12, 32e9)}

ROOM = 0.9  # of a GPU's memory, for what PyTorch allocates


@dataclass
class Config(train.Config):
    # the machine
    gpu: str = 'h100'  # b200, h200, h100, a100, v100, l40s, a10, l4, t4, rtx5090, rtx4090 or rtx3090
    gpus: int = 8  # how many, one process each
    gpus_per_machine: int = 8  # as many are joined by the fast way
    network: float = 50.0  # GB/s between machines for each GPU, in one direction: 400 Gbit/s
    mfu: float = 0.4  # the share of its peak at which a GPU is expected to work, for the time and the cost
    price: float = 2.5  # dollars for an hour of a GPU
    vocab_size: int | None = None  # None: that of the data set, or GPT-2's if it is not there


def main(config):
    name, room, bandwidth, link = GPUS[config.gpu]
    n, peak = config.gpus, PEAK_FLOPS[name]
    if n > config.gpus_per_machine:
        link = min(link, config.network * 1e9)
    vocab_size = config.vocab_size
    if vocab_size is None:
        tokenizer = bins.open_tokenizer(bins.find_dataset(config.dataset))
        vocab_size = tokenizer.vocab_size if tokenizer else 50257
    shape = train.choose_model_config(config, given=(), checkpoint=None, resume=False)
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape, vocab_size=vocab_size, document_token=0 if config.doc_mask or config.prefix_lm else None))

    # the model
    tables = model.transformer.ngram.tables.weight.numel() if config.ngram > 1 else 0
    positions = model.get_num_params(False) - model.get_num_params()
    total = model.get_num_params(False)
    flops, multiplied = model.flops_per_token(), model.num_multiplied()
    micro_batches = train.micro_batches(config, n)  # of a GPU
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size  # of a step
    print(f'{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, context {config.block_size:,}, vocabulary '
          f'{vocab_size:,}; {n} x {name}')
    table('the model', [
        ('parameters', f'{(model.get_num_params() - tables) / 1e6:,.2f}M',
         f'beside {positions / 1e6:,.2f}M of learned positions and {tables / 1e6:,.2f}M in n-gram tables'),
        ('FLOPs for a token', f'{flops:.4g}', f'6 N + 12 L H Q T (PaLM, appendix B); N: the {multiplied / 1e6:,.2f}M multiplied'),
        ('tokens of a step', f'{tokens:,}', f'{config.batch_size} sequences x {config.block_size:,} x {micro_batches} '
                                            f'micro-batches x {n} GPUs'),
    ])

    # memory
    parts = {how: memory.parts(model, config, True, how, n) for how in ('ddp', 'fsdp')}
    needed = {how: sum(parts[how].values()) for how in parts}
    names = ['weights', 'gradients', 'optimizer', 'activations', 'activations, then gradients', 'backward', 'logits',
             "Muon's update"]
    print(f'\n{f"memory of a GPU, which has {room / 1e9:.0f} GB":<40}{"DDP":>14}{"FSDP":>14}')
    for part in names:
        if any(part in parts[how] for how in parts):
            print(f'  {part:<38}' + ''.join(f'{gigabytes(parts[how][part]) if part in parts[how] else "-":>14}' for how in parts))
    print(f'  {"together":<38}' + ''.join(f'{gigabytes(needed[how]):>14}' for how in parts))
    print(f'  {"":<38}' + ''.join(f'{"fits" if needed[how] < ROOM * room else "does not fit":>14}' for how in parts)
          + '   (into nine tenths)')
    print('  weights, gradients and optimizer state in fp32, of which FSDP keeps 1/n (Zhao et al. 2023);\n'
          '  activations: Korthikanti et al. 2022, section 4, without scores')

    # what a step cannot do without, in seconds of one GPU
    matrices = muon_matrices(model, config)
    in_muon, in_blocks = (sum(p.numel() for p in some) for some in (matrices, block_matrices(model)))
    computing = flops * tokens / n / peak
    orthogonal = sum(5 * (4 * min(p.shape)**2 * max(p.shape) + 2 * min(p.shape)**3) for p in matrices) / peak
    update = 4 * (7 * total - 2 * in_muon) / bandwidth
    updating = {'ddp': update, 'fsdp': update / n}
    gathered = micro_batches * (2 * 2 * in_blocks + 4 * (total - in_blocks))  # blocks in 16 bits, for forward and backward
    sent = {'ddp': (n - 1) / n * 2 * 4 * total, 'fsdp': (n - 1) / n * (gathered + 4 * total + 4 * in_muon)}
    floor = {how: max(computing, sent[how] / link) + orthogonal + updating[how] for how in sent}
    table('a step at the least', [
        ('computing', seconds(computing), f'at {peak / 1e12:,.0f} TFLOP/s, the peak in 16 bits'),
        ("Muon's products", seconds(orthogonal), '5 iterations on each GPU (Jordan 2024)'),
        ('update, DDP', seconds(updating['ddp']), f'28 bytes for each number of AdamW, 20 of Muon, {bandwidth / 1e12:.2f} TB/s'),
        ('update, FSDP', seconds(updating['fsdp']), 'of its share'),
        ('sent, DDP', seconds(sent['ddp'] / link), f'{gigabytes(sent["ddp"])} at {link / 1e9:,.0f} GB/s: 2 (n - 1) / n of the '
                                                   f'gradients (a ring: Patarasuk & Yuan 2009)'),
        ('sent, FSDP', seconds(sent['fsdp'] / link), f'{gigabytes(sent["fsdp"])}: weights twice a micro-batch, gradients once '
                                                     f'(Rajbhandari et al. 2020)'),
        ('together, DDP', seconds(floor['ddp']), f'{tokens / floor["ddp"]:,.0f} tokens/s; what is sent goes beside computing'),
        ('together, FSDP', seconds(floor['fsdp']), f'{tokens / floor["fsdp"]:,.0f} tokens/s'),
    ])

    # the run
    how = parallel.choose(config.parallel, model, room)
    step = max((computing + orthogonal) / config.mfu + updating[how], floor[how])
    hours, planned, optimal = config.max_iters * step / 3600, config.max_iters * tokens, 20 * multiplied
    table(f'the run, {how.upper()}, at {config.mfu:.0%} of the peak (--mfu, which is assumed until you measure it)', [
        ('speed', f'{tokens / step:,.0f}', f'tokens/s, {seconds(step)} a step'),
        ('tokens', f'{planned:.3g}', f'in {config.max_iters:,} steps; for its cost the best are 20 for each of N, '
                                     f'{optimal:.3g} (Hoffmann et al. 2022)'),
        ('time', f'{hours / 24:.1f} days' if hours > 48 else f'{hours:.2f} hours', 'without evaluations and checkpoints'),
        ('cost', f'${hours * n * config.price:,.0f}', f'{hours * n:,.1f} GPU hours at ${config.price:.2f} (--price)'),
    ])


def table(title, rows):
    print('\n' + title)
    for name, value, note in rows:
        print(f'  {name:<20}{value:>14}   {note}')


def gigabytes(size):
    return f'{size / 1e9:,.2f} GB'


def seconds(value):
    return f'{value * 1e3:,.3g} ms' if value < 1 else f'{value:,.3g} s'


def read_command(argv):
    """Raises UserError."""
    words = [word.removeprefix('--config=') for word in argv if word != '--config']
    config, given = configure(Config, words)
    train.turn_dial(config, given)
    train.check(config)
    config.gpu = config.gpu.lower()
    require(config.gpu in GPUS, f'gpu = {config.gpu!r}: give one of {", ".join(GPUS)}')
    for key in ('gpus', 'gpus_per_machine', 'vocab_size'):
        require(getattr(config, key) is None or getattr(config, key) >= 1, f'{key} = {getattr(config, key)}: give at least 1')
    require(config.network > 0, f'network = {config.network}: give more than 0')
    require(config.price >= 0, f'price = {config.price}: give 0 or more')
    require(0 < config.mfu <= 1, f'mfu = {config.mfu}: give a share of the peak, above 0 and at most 1')
    require(config.init_from == 'scratch', f'init_from = {config.init_from}: a plan is for training from scratch')
    require(config.dtype != 'float32', 'dtype = float32: a plan is for 16 bits; leave it out')
    return config


if __name__ == '__main__':
    with user_errors():
        main(read_command(sys.argv[1:]))
