"""Compare an LSTM and a GPT of equal size, on the same tokens with the same optimizer.

    python tools/compare_rnn.py --max_iters=600
    python tools/compare_rnn.py --dataset=shakespeare_char --lstm_learning_rate=[0.02,0.04]

Writes compare-rnn/compare.json and, with matplotlib, compare-rnn/compare.png: val loss against
tokens and against seconds, the gradient of the last token's loss with respect to earlier tokens,
and the time of a step against sequence length. Each model is trained at several learning rates; the
best run counts.
"""
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import Bound, Count, Fraction, NonNegative, WholeNumber, configure
from lib.errors import os_errors, require, user_errors
from lib.files import write_text

HEAD_SIZE = 32  # of the GPT

all_positive = Bound(lambda values: values and min(values) > 0, 'one or more numbers above 0')
Rates = Annotated[list[float], all_positive]
Lengths = Annotated[list[int], all_positive]


@dataclass
class Config:
    dataset: str = 'python_stdlib'  # a folder in data/, or a path
    out_dir: str = 'compare-rnn'  # compare.json and compare.png go here
    # models
    n_layer: Count = 2  # of both
    n_embd: Count = 128  # of the GPT; the LSTM's width follows from the number of parameters
    block_size: Count = 128  # tokens per sequence
    dropout: Fraction = 0.0  # of both
    # training
    batch_size: Count = 16  # sequences per step
    max_iters: Count = 600  # steps
    warmup_iters: WholeNumber = 20  # steps of linear warmup
    gpt_learning_rate: Rates = field(default_factory=lambda: [2e-3, 4e-3, 8e-3])  # tries each
    lstm_learning_rate: Rates = field(default_factory=lambda: [3.2e-2, 6.4e-2, 1.28e-1])
    weight_decay: NonNegative = 0.1  # on matrices and embeddings
    grad_clip: NonNegative = 1.0  # maximum gradient norm
    eval_iters: Count = 20  # batches per evaluation; a run has about 20 evaluations
    seed: WholeNumber = 1337  # of weights and batches
    # measurements
    lengths: Lengths = field(default_factory=lambda: [64, 128, 256, 512, 1024])  # to time steps at
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'float32'  # of matrix products


def check(config):
    """Validate the config. Raises UserError."""
    require(config.n_embd % HEAD_SIZE == 0,
            f'n_embd = {config.n_embd}: give a multiple of {HEAD_SIZE}, the size of a head')


if __name__ == '__main__':  # --help and typos are answered before the slow imports
    with user_errors():
        config, _ = configure(Config)
        check(config)

import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

from lib import bins, evaluation
from lib.device import autocast, math_attention_is_faster, pick_device, pick_dtype, to_device
from lib.plot import import_pyplot, save_png
from lib.run import Signals
from model import GPT, GPTConfig
from optimizer import adamw

# Models ------------------------------------------------------------------------------------------


class LSTM(nn.Module):
    """An LSTM language model (Hochreiter & Schmidhuber 1997; Zaremba et al. 2014) with the
    interface of GPT. Its head shares the embedding."""

    def __init__(self, vocab_size, n_layer, n_embd, dropout):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.drop = nn.Dropout(dropout)
        between_layers = dropout if n_layer > 1 else 0.0
        self.lstm = nn.LSTM(n_embd, n_embd, n_layer, batch_first=True, dropout=between_layers)
        # with GPT's 0.02 it learns nothing from the first half million tokens
        nn.init.normal_(self.wte.weight, std=0.1)
        for name, p in self.lstm.named_parameters():
            if name.startswith('bias_ih'):  # forget gates start open (Jozefowicz et al. 2015)
                p.data[n_embd:2 * n_embd] = 1.0

    def forward(self, idx, targets):
        x, _ = self.lstm(self.drop(self.wte(idx)))  # (B, T, C)
        logits = F.linear(self.drop(x), self.wte.weight).float()  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


def count_params(model):
    return sum(p.numel() for p in model.parameters())


def lstm_like(gpt, config, vocab_size):
    """The LSTM whose number of parameters is closest to gpt's."""
    def distance(n_embd):
        size = vocab_size * n_embd + config.n_layer * 8 * (n_embd**2 + n_embd)
        return abs(size - count_params(gpt))

    n_embd = min(range(8, 8 * config.n_embd, 2), key=distance)
    return LSTM(vocab_size, config.n_layer, n_embd, config.dropout)


def build(name, config, vocab_size, device, dtype, T):
    """A new 'GPT' or 'LSTM' on the device, to be trained on T tokens at a time."""
    torch.manual_seed(config.seed)
    # a standard modern architecture, without the n-grams and Muon of plainGPT's own recipe
    gpt = GPT(GPTConfig(block_size=max(config.block_size, *config.lengths), vocab_size=vocab_size,
                        n_layer=config.n_layer, n_head=config.n_embd // HEAD_SIZE,
                        n_embd=config.n_embd, dropout=config.dropout, bias=False,
                        position='rope', norm='rmsnorm'))
    if name == 'LSTM':
        return lstm_like(gpt, config, vocab_size).to(device)
    if math_attention_is_faster(device, dtype, T):
        gpt.train_with_math_attention()
    return gpt.to(device)


# Training ----------------------------------------------------------------------------------------


def evaluate(model, data, config, device, dtype):
    """The val loss."""
    def loss_of(x, y):
        with autocast(device, dtype):
            return model(*to_device(x, y, device))[1]

    model.eval()
    windows = data.val.evaluation_windows(config.eval_iters * config.batch_size)
    loss, *_ = evaluation.evaluate(loss_of, data.val, windows, config.batch_size, data.token_bytes,
                                   Signals(catch=False))
    model.train()
    return loss


def lr_multiplier(step, config):
    """Linear warmup, times a cosine down to 0.1."""
    warmup = min(1.0, (step + 1) / (config.warmup_iters + 1))
    return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / config.max_iters)))


def train(rate, name, data, config, device, dtype):
    """(model, [{'tokens', 'seconds' of training alone, 'val_loss'}])"""
    vocab_size = data.tokenizer.vocab_size
    model = build(name, config, vocab_size, device, dtype, config.block_size)
    optimizer = adamw(model.parameters(), config.weight_decay, rate, (0.9, 0.95))
    points, seconds = [], 0.0
    eval_interval = max(1, config.max_iters // 20)
    bar = tqdm(range(config.max_iters + 1), desc=f'{name}, learning rate {rate:g}', disable=None)
    for step in bar:
        if step % eval_interval == 0 or step == config.max_iters:
            points.append({'tokens': step * config.batch_size * config.block_size,
                           'seconds': seconds,
                           'val_loss': evaluate(model, data, config, device, dtype)})
        if step == config.max_iters:
            return model, points
        start = time.perf_counter()
        optimizer.set_lr(lr_multiplier(step, config))
        batch = data.train.batch(step * config.batch_size, config.batch_size, config.seed)
        x, y = to_device(*batch, device)
        with autocast(device, dtype):
            loss = model(x, y)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds += time.perf_counter() - start


# Measurements ------------------------------------------------------------------------------------


def gradient_by_distance(model, split, config, device):
    """Norm of the gradient of the last token's loss with respect to the embedding of the token d
    before it, relative to d = 0, for d = 0, 1, ..., block_size - 1; mean over windows.

    In a recurrent network it vanishes (Bengio et al. 1994).
    """
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    embedding = model.transformer.wte if isinstance(model, GPT) else model.wte
    hook = embedding.register_forward_hook(keep)
    windows = split.windows(split.evaluation_windows(2 * config.batch_size))
    x, y = to_device(*windows, device)
    last_only = y.clone()
    last_only[:, :-1] = -1
    whole = y[:, -1] >= 0  # the last window of a split may be shorter
    model.train()  # cuDNN's LSTM has no backward in evaluation mode
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model(x[whole], last_only[whole])[1].backward()
    hook.remove()
    model.zero_grad(set_to_none=True)
    norms = kept[0].grad.norm(dim=-1).flip(1)  # (B, T), the nearest first
    return (norms / norms[:, :1]).mean(dim=0).tolist()


def step_times(name, vocab_size, config, device, dtype, repeats=5):
    """Median seconds of forward and backward on one sequence of each length."""
    medians = []
    for length in config.lengths:
        model = build(name, config, vocab_size, device, dtype, length)
        x = torch.randint(vocab_size, (1, length), device=device)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            with autocast(device, dtype):
                loss = model(x, x)[1]
            loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
        medians.append(statistics.median(times[1:]))  # the first is warmup
    return medians


def compare(name, rates, data, config, device, dtype):
    """The result of a model at its best learning rate. Raises UserError if all runs diverge."""
    runs = []
    for rate in rates:
        model, points = train(rate, name, data, config, device, dtype)
        if math.isfinite(points[-1]['val_loss']):
            runs.append((points[-1]['val_loss'], rate, model, points))
    require(runs, f'{name.lower()}_learning_rate = {rates}: no run ends with a finite loss; give '
                  f'lower rates')
    _, best_rate, model, points = min(runs, key=lambda run: run[0])
    vocab_size = data.tokenizer.vocab_size
    return {'parameters': count_params(model), 'learning_rate': best_rate, 'points': points,
            'losses_of_rates': {str(rate): val_loss for val_loss, rate, _, _ in runs},
            'gradient': gradient_by_distance(model, data.val, config, device),
            'step_seconds': step_times(name, vocab_size, config, device, dtype)}


# Results -----------------------------------------------------------------------------------------


def format_table(results, config):
    """Markdown, one row per model."""
    distance = config.block_size // 2
    header = ['', 'parameters', 'learning rate', 'val loss', 'seconds',
              f'gradient {distance} tokens back',
              *(f'{length} tokens' for length in config.lengths)]
    lines = [header, ['---'] * len(header)]
    for name, result in results.items():
        last = result['points'][-1]
        lines.append([name, f'{result["parameters"]:,}', f'{result["learning_rate"]:g}',
                      f'{last["val_loss"]:.4f}', f'{last["seconds"]:.1f}',
                      f'{result["gradient"][distance]:.2e}',
                      *(f'{1000 * seconds:.1f} ms' for seconds in result['step_seconds'])])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def plot(results, config, path):
    """Four panels; returns False without matplotlib."""
    pyplot = import_pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4), layout='constrained')
    for name, result in results.items():
        label = f'{name}, {result["parameters"] / 1e6:.2f}M parameters'
        tokens = [point['tokens'] for point in result['points']]
        seconds = [point['seconds'] for point in result['points']]
        losses = [point['val_loss'] for point in result['points']]
        milliseconds = [1000 * seconds for seconds in result['step_seconds']]
        axes[0].plot(tokens, losses, 'o-', markersize=3, label=label)
        axes[1].plot(seconds, losses, 'o-', markersize=3, label=label)
        axes[2].plot(range(len(result['gradient'])), result['gradient'], label=label)
        axes[3].plot(config.lengths, milliseconds, 'o-', label=label)
    axes[0].set(xlabel='tokens', ylabel='val loss', title='loss per token')
    axes[1].set(xlabel='seconds of training', ylabel='val loss', title='loss per second')
    axes[2].set(xlabel='tokens back', ylabel='gradient, relative to the last token', yscale='log',
                title='gradient by distance')
    axes[3].set(xlabel='sequence length', ylabel='ms', xscale='log', yscale='log',
                title='forward and backward')
    axes[0].legend(fontsize='small')
    save_png(pyplot, figure, path, dpi=100)
    return True


def main(config):
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, config.n_embd)
    folder = bins.find_dataset(config.dataset)
    require((folder / 'val.bin').exists(),
            f'dataset = {config.dataset!r}: there is no {folder / "val.bin"}: prepare it, for '
            f'example with python data/{config.dataset}/prepare.py')
    data = bins.open_dataset(folder, config.block_size)
    require(not data.pairs, f'dataset = {config.dataset!r} has sources and targets: give plain '
                            f'text')
    out_dir = Path(os.path.expanduser(config.out_dir))
    with os_errors(f'out_dir = {config.out_dir!r}', 'choose another folder'):
        out_dir.mkdir(parents=True, exist_ok=True)
    rates = {'GPT': config.gpt_learning_rate, 'LSTM': config.lstm_learning_rate}
    results = {name: compare(name, rates[name], data, config, device, dtype) for name in rates}
    json_path, plot_path = out_dir / 'compare.json', out_dir / 'compare.png'
    if json_path.exists():
        print(f'replacing the comparison in {out_dir}')
    text = json.dumps({'config': asdict(config), 'results': results})
    print(format_table(results, config))
    with os_errors(f'{out_dir}: cannot write the results', 'choose another --out_dir'):
        write_text(json_path, text)
        if plot(results, config, plot_path):
            print(f'{json_path}, {plot_path}')
        else:
            print(f'{json_path}; for a plot: pip install matplotlib')


if __name__ == '__main__':
    with user_errors():
        main(config)
