"""What attention bought: an LSTM and a GPT with equally many parameters on the same tokens, with the same optimizer.

    python tools/compare_rnn.py --max_iters=600
    python tools/compare_rnn.py --dataset=shakespeare_char --lstm_learning_rate=[0.02,0.04]

Writes compare-rnn/compare.json and, if matplotlib is there, compare-rnn/compare.png: val loss against tokens and against seconds,
how much of the gradient of the last token's loss arrives at tokens far before it, and the time of a step against the length of
a sequence. Each model is trained at several learning rates, and the best run is shown.
"""
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import configure, require, user_errors


@dataclass
class Config:
    dataset: str = 'python_stdlib'  # a folder in data/, or a path
    out_dir: str = 'compare-rnn'
    # both models
    n_layer: int = 2
    n_embd: int = 128  # of the GPT; the LSTM's width follows from the number of parameters
    block_size: int = 128
    dropout: float = 0.0
    # training
    batch_size: int = 16
    max_iters: int = 600
    warmup_iters: int = 20
    gpt_learning_rate: list[float] = field(default_factory=lambda: [2e-3, 4e-3, 8e-3])  # each is tried
    lstm_learning_rate: list[float] = field(default_factory=lambda: [3.2e-2, 6.4e-2, 1.28e-1])
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_iters: int = 20  # batches of an evaluation; there are 20 of these in a run
    seed: int = 1337
    # measuring
    lengths: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024])  # of the sequences that are timed
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'float32'


if __name__ == '__main__':
    with user_errors():
        config, _ = configure(Config)
        for key in ('seed', 'warmup_iters', 'weight_decay', 'grad_clip'):
            require(getattr(config, key) >= 0, f'{key} = {getattr(config, key)}: give 0 or more')
        for key in ('n_layer', 'block_size', 'batch_size', 'max_iters', 'eval_iters', 'n_embd'):
            require(getattr(config, key) >= 1, f'{key} = {getattr(config, key)}: give at least 1')
        require(config.n_embd % 32 == 0, f'n_embd = {config.n_embd}: give a multiple of 32, the size of a head')
        require(0 <= config.dropout < 1, f'dropout = {config.dropout}: give at least 0 and less than 1')
        for key in ('gpt_learning_rate', 'lstm_learning_rate', 'lengths'):
            require(getattr(config, key) and min(getattr(config, key)) > 0, f'{key} = {getattr(config, key)}: give more than 0')

import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import train
from data import bins
from device import autocast, pick_device, pick_dtype
from model import GPT, GPTConfig
from optimizer import adamw
from processes import Signals


class LSTM(nn.Module):
    """An LSTM language model (Hochreiter & Schmidhuber 1997; Zaremba et al. 2014) with the interface of GPT; its head is the
    embedding too."""

    def __init__(self, vocab_size, n_layer, n_embd, dropout):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(n_embd, n_embd, n_layer, batch_first=True, dropout=dropout if n_layer > 1 else 0.0)
        nn.init.normal_(self.wte.weight, std=0.1)  # with GPT's 0.02 it learns nothing in the first half million tokens
        for name, p in self.lstm.named_parameters():
            if name.startswith('bias_ih'):  # forget gates begin open (Jozefowicz et al. 2015)
                p.data[n_embd:2 * n_embd] = 1.0

    def forward(self, idx, targets):
        x, _ = self.lstm(self.drop(self.wte(idx)))  # (B, T, C)
        logits = F.linear(self.drop(x), self.wte.weight).float()
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def count(model):
    return sum(p.numel() for p in model.parameters())


def lstm_like(gpt, config, vocab_size):
    """The LSTM whose number of parameters is nearest to gpt's."""
    def size(n_embd):
        return vocab_size * n_embd + config.n_layer * 8 * (n_embd**2 + n_embd)

    best = min(range(8, 8 * config.n_embd, 2), key=lambda n_embd: abs(size(n_embd) - count(gpt)))
    return LSTM(vocab_size, config.n_layer, best, config.dropout)


def build(name, config, vocab_size):
    torch.manual_seed(config.seed)
    # the plain architecture of today's models, without the n-grams and the optimizer of plainGPT's own recipe
    gpt = GPT(GPTConfig(block_size=max(config.block_size, *config.lengths), vocab_size=vocab_size, n_layer=config.n_layer,
                        n_head=config.n_embd // 32, n_embd=config.n_embd, dropout=config.dropout, bias=False,
                        position='rope', norm='rmsnorm'))
    return gpt if name == 'GPT' else lstm_like(gpt, config, vocab_size)


def evaluate(model, data, config, device, dtype):
    def loss_of(x, y):
        with autocast(device, dtype):
            return model(*train.to_device(x, y, device))[1]

    model.eval()
    windows = data.val.evaluation_windows(config.eval_iters * config.batch_size)
    loss, *_ = train.evaluate(loss_of, data.val, windows, config.batch_size, data.token_bytes, Signals(catch=False))
    model.train()
    return loss


def train_at(rate, name, data, config, device, dtype):
    """-> (model, [{'tokens', 'seconds' of training alone, 'val_loss'}])"""
    model = build(name, config, data.tokenizer.vocab_size).to(device)
    optimizer = adamw(model.parameters(), config.weight_decay, rate, (0.9, 0.95))
    points, seconds, every = [], 0.0, max(1, config.max_iters // 20)
    for step in tqdm(range(config.max_iters + 1), desc=f'{name}, learning rate {rate:g}', disable=None):
        if step % every == 0 or step == config.max_iters:
            tokens = step * config.batch_size * config.block_size
            points.append({'tokens': tokens, 'seconds': seconds, 'val_loss': evaluate(model, data, config, device, dtype)})
        if step == config.max_iters:
            return model, points
        start = time.perf_counter()
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / config.max_iters))
        for group in optimizer.param_groups:
            group['lr'] = rate * min(1.0, (step + 1) / (config.warmup_iters + 1)) * decay
        x, y = train.to_device(*data.train.batch(step * config.batch_size, config.batch_size, config.seed), device)
        with autocast(device, dtype):
            loss = model(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # on a GPU: wait for it
        seconds += time.perf_counter() - start


def gradient_by_distance(model, split, config, device):
    """The norm of the gradient of the last token's loss with respect to the embedding of the token d before it, relative to that
    of the nearest, d = 0, 1, ..., block_size - 1: the mean over windows. Bengio et al. 1994: in a recurrent net it vanishes."""
    kept = []
    embedding = model.transformer.wte if isinstance(model, GPT) else model.wte
    hook = embedding.register_forward_hook(lambda module, inputs, output: kept.append(output) or output.retain_grad())
    model.eval()
    x, y = train.to_device(*split.windows(split.evaluation_windows(2 * config.batch_size)), device)
    y = y.clone()
    y[:, :-1] = -1
    whole = y[:, -1] >= 0  # the last window of a split may be shorter
    model.train()  # cuDNN's LSTM has no backward in evaluation
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model(x[whole], y[whole])[1].backward()
    hook.remove()
    model.zero_grad(set_to_none=True)
    norms = kept[0].grad.norm(dim=-1).flip(1)  # (B, T), the nearest first
    return (norms / norms[:, :1]).mean(dim=0).tolist()


def step_times(model, vocab_size, config, device, dtype, repeats=5):
    """Seconds of forward and backward for one sequence of each length: the median."""
    medians = []
    for length in config.lengths:
        x = torch.randint(vocab_size, (1, length), device=device)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            with autocast(device, dtype):
                loss = model(x, x)[1]
            loss.backward()
            loss.item()
            times.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
        medians.append(statistics.median(times[1:]))  # the first one warms up
    return medians


def plot(results, config, path):
    """Four panels; False where matplotlib, which is optional, is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout='constrained')
    for name, result in results.items():
        label = f'{name}, {result["parameters"] / 1e6:.2f}M parameters'
        losses = [point['val_loss'] for point in result['points']]
        axes[0].plot([point['tokens'] for point in result['points']], losses, 'o-', markersize=3, label=label)
        axes[1].plot([point['seconds'] for point in result['points']], losses, 'o-', markersize=3, label=label)
        axes[2].plot(range(len(result['gradient'])), result['gradient'], label=label)
        axes[3].plot(config.lengths, [1000 * seconds for seconds in result['step_seconds']], 'o-', label=label)
    axes[0].set(xlabel='tokens', ylabel='val loss', title='for each token')
    axes[1].set(xlabel='seconds of training', ylabel='val loss', title='for each second')
    axes[2].set(xlabel='tokens back', ylabel='gradient, 1 at the last token', yscale='log', title='what arrives from how far')
    axes[3].set(xlabel='tokens in a sequence', ylabel='ms', xscale='log', yscale='log', title='forward and backward')
    axes[0].legend(fontsize='small')
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def main(config):
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, config.n_embd)
    folder = bins.find_dataset(config.dataset)
    require((folder / 'val.bin').exists(), f'dataset = {config.dataset!r}: there is no {folder / "val.bin"}: prepare it, for '
                                           f'example with python data/{config.dataset}/prepare.py')
    data = bins.open_dataset(folder, config.block_size)
    require(not data.pairs, f'dataset = {config.dataset!r} has sources and targets: name plain text')
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, rates in (('GPT', config.gpt_learning_rate), ('LSTM', config.lstm_learning_rate)):
        runs = [(rate, *train_at(rate, name, data, config, device, dtype)) for rate in rates]
        runs = [run for run in runs if math.isfinite(run[2][-1]['val_loss'])]
        require(runs, f'{name.lower()}_learning_rate = {rates}: no run has a finite loss in the end; give lower rates')
        rate, model, points = min(runs, key=lambda run: run[2][-1]['val_loss'])
        results[name] = {'parameters': count(model), 'learning_rate': rate, 'points': points,
                         'losses_of_rates': {str(rate): points[-1]['val_loss'] for rate, _, points in runs},
                         'gradient': gradient_by_distance(model, data.val, config, device),
                         'step_seconds': step_times(model, data.tokenizer.vocab_size, config, device, dtype)}
    if (out_dir / 'compare.json').exists():
        print(f'replacing the comparison that was in {out_dir}')
    (out_dir / 'compare.json').write_text(json.dumps({'config': asdict(config), 'results': results}), encoding='utf-8')
    far = config.block_size // 2
    print(f'| | parameters | learning rate | val loss | seconds | gradient {far} tokens back | '
          + ' | '.join(f'{length} tokens' for length in config.lengths) + ' |')
    print('| --- ' * (6 + len(config.lengths)) + '|')
    for name, result in results.items():
        last = result['points'][-1]
        print(f'| {name} | {result["parameters"]:,} | {result["learning_rate"]:g} | {last["val_loss"]:.4f} | '
              f'{last["seconds"]:.1f} | {result["gradient"][far]:.2e} | '
              + ' | '.join(f'{1000 * seconds:.1f} ms' for seconds in result['step_seconds']) + ' |')
    drawn = plot(results, config, out_dir / 'compare.png')
    print(f'{out_dir / "compare.json"}' + (f', {out_dir / "compare.png"}' if drawn else '; for a plot: pip install matplotlib'))


if __name__ == '__main__':
    with user_errors():
        main(config)
