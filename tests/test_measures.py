"""What log lines say besides losses: noise scale, update ratios, peak memory, epoch; against plain
autograd on the same batches."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import checkpoint as ckpt
from helpers import TINY, log_lines, read_log
from lib import bins
from lib.device import peak_memory
from lib.step_log import StepLog, noise_estimates
from lib.synthetic import RandomRows
from stub_trainer import make_trainer

N_MICRO = 4


class PartlyMasked(RandomRows):
    """Rows of which micro-batches have very different numbers of targets."""

    def windows(self, numbers):
        x, y = super().windows(numbers)
        keep = [2 + 5 * number % self.block_size for number in numbers]
        return x, np.where(np.arange(self.block_size) < np.array(keep)[:, None], y, -1)

    def count_targets(self, first_sample, count, seed):
        return int((self.batch(first_sample, count, seed)[1] >= 0).sum())


def squared(grads):
    return sum(grad.double().square().sum().item() for grad in grads)


def plain_gradients(model, batches):
    """[(number of targets, gradients of their mean loss)] of batches, and of all together."""
    found = []
    for x, y in batches:
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        logits = model(x, y)[0]
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        found.append((int((y >= 0).sum()), torch.autograd.grad(loss, list(model.parameters()))))
    n = sum(count for count, _ in found)
    parts = zip(*([count / n * grad for grad in grads] for count, grads in found))
    return found, (n, [sum(part) for part in parts])


def two_batch_estimates(small, big):
    """(|G|^2, tr(Sigma)) as McCandlish et al. (2018), A.1 give them. small, big: (tokens, squared
    norm of the gradient)."""
    (n_small, small), (n_big, big) = small, big
    return ((n_big * big - n_small * small) / (n_big - n_small),
            (small - big) / (1 / n_small - 1 / n_big))


def logged_steps(trainer, n, folder):
    """The lines that a Trainer logs in n steps, and the weights before each and after the last."""
    lines, weights = [], []
    log = SimpleNamespace(write=lines.append)
    trainer.config.out_dir = str(folder)
    with StepLog(trainer.config, log, trainer.raw_model, trainer.device, trainer.dtype,
                 trainer.data.train, 0) as trainer.log:
        for _ in range(n):
            weights.append(copy.deepcopy(trainer.raw_model))
            trainer.train_step()
        trainer.log.flush()
    return lines, [*weights, trainer.raw_model]


def use_rows(trainer, rows):
    trainer.data.train = rows
    trainer.batches = trainer.micro_batches()
    trainer.batch = next(trainer.batches)


# Gradient noise scale -----------------------------------------------------------------------------

@pytest.mark.parametrize('how', ['plain', 'fp16', 'tree', 'weighted'])
def test_noise_scale_follows_from_gradients_of_micro_batches(tmp_path, how):
    dtype = torch.float16 if how == 'fp16' else torch.float32
    trainer = make_trainer({}, torch.device('cpu'), dtype, gradient_accumulation_steps=N_MICRO,
                           deterministic_sum=how == 'tree', grad_clip=0.01, learning_rate=0.01)
    rows = trainer.data.train
    if how == 'weighted':
        rows = PartlyMasked(rows.block_size, rows.vocab_size)
        use_rows(trainer, rows)
    lines, models = logged_steps(trainer, 3, tmp_path)
    signals, noises = [], []
    for step, (line, model) in enumerate(zip(lines, models)):
        batches = [rows.batch(2 * (N_MICRO * step + i), 2, 0) for i in range(N_MICRO)]
        [(n_first, first), *_], (n, whole) = plain_gradients(model, batches)
        signal, noise = two_batch_estimates((n_first, squared(first)), (n, squared(whole)))
        signals.append(signal)
        noises.append(noise * 2 * N_MICRO * rows.block_size / n)  # masked tokens count too
        tolerance = 1e-2 if how == 'fp16' else 1e-4
        size = squared(whole)  # differences of numbers of this size
        assert line['grad_signal'] == pytest.approx(signal, rel=tolerance, abs=tolerance * size)
        assert line['grad_noise'] == pytest.approx(noises[-1], rel=tolerance)
        mean = sum(noises) / sum(signals)
        if mean > 0:
            assert line['noise_scale'] == pytest.approx(mean, rel=0.1 if how == 'fp16' else 1e-3)
        else:
            assert line['noise_scale'] == math.inf
    assert len(lines) == 3


def test_noise_scale_recovers_known_noise():
    """Gradients of a made-up problem, where |G|^2 and tr(Sigma) are known."""
    generator = torch.Generator().manual_seed(0)
    true, sigma, n_small, n_micro = torch.full((50,), 0.3), 2.0, 16, 4
    estimates = []
    for _ in range(2000):
        noise = torch.randn(n_micro, 50, generator=generator) * sigma / n_small**0.5
        micro = (true + noise) / n_micro  # as they are added up
        estimates.append(noise_estimates(micro.sum(0).norm().item(), n_micro * n_small,
                                         micro[0].square().sum().item(), 1 / 4, 1 / 16))
    signal, noise = torch.tensor(estimates).mean(0).tolist()
    assert signal == pytest.approx(50 * 0.3**2, rel=0.05)
    assert noise == pytest.approx(50 * sigma**2, rel=0.05)


@pytest.mark.parametrize('how, accumulation', [
    ('ddp', 4), ('fsdp', 4), pytest.param('tree', 2, marks=pytest.mark.slow)])
def test_measures_over_processes_follow_from_gradients_and_weights(
        ranks, char_data, tmp_path, how, accumulation):
    """DDP and the tree: the mean over the first micro-batch of each process; FSDP adds them up."""
    flags = ['--deterministic_sum'] if how == 'tree' else [f'--parallel={how}']
    ranks(2, f'--out_dir={tmp_path}/out', f'--dataset={char_data}', *TINY, '--dtype=float32',
          f'--gradient_accumulation_steps={accumulation}', '--batch_size=2', '--max_iters=2',
          '--save_interval=1', '--keep_last=9', '--optimizer=muon', *flags)
    line = log_lines(tmp_path / 'out', 'loss')[1]
    before, after = (ckpt.load(tmp_path / 'out' / f'ckpt_0000000{step}.pt') for step in (1, 2))
    data = bins.open_dataset(char_data, 32)
    batches = [data.train.batch(2 * (accumulation + i), 2, 1337) for i in range(accumulation)]
    model = before.build_model()
    found, (n, whole) = plain_gradients(model, batches)
    firsts = [found[0], found[accumulation // 2]]
    if how == 'fsdp':
        n_first = sum(count for count, _ in firsts)
        small = squared([(a + b) / 2 for a, b in zip(*(grads for _, grads in firsts))])
    else:
        n_first, small = firsts[0][0], sum(squared(grads) for _, grads in firsts) / 2
    signal, noise = two_batch_estimates((n_first, small), (n, squared(whole)))
    assert line['grad_signal'] == pytest.approx(signal, rel=1e-3, abs=1e-4 * squared(whole))
    assert line['grad_noise'] == pytest.approx(noise, rel=1e-3)

    names = dict(model.named_parameters())
    groups = {'muon': {name for name, p in names.items() if '.h.' in name and p.dim() == 2},
              'gains': {name for name, p in names.items() if p.dim() < 2}}
    groups['adamw'] = names.keys() - groups['muon'] - groups['gains']
    for group, members in groups.items():
        steps = squared([after.model[name] - before.model[name] for name in members])
        weights = squared([before.model[name] for name in members])
        assert line[f'update_ratio_{group}'] == pytest.approx((steps / weights)**0.5, rel=1e-4)


def test_noise_scale_is_absent_without_a_part_of_the_step(ranks, run, char_data, tmp_path):
    common = (f'--dataset={char_data}', *TINY, '--max_iters=2')
    run('train.py', f'--out_dir={tmp_path}/one', *common)
    ranks(2, f'--out_dir={tmp_path}/two', *common, '--gradient_accumulation_steps=2')
    for name in ('one', 'two'):
        for line in log_lines(tmp_path / name, 'loss'):
            assert not line.keys() & {'noise_scale', 'grad_signal', 'grad_noise'}
            assert line['update_ratio_adamw'] > 0


# Update ratios ------------------------------------------------------------------------------------

def test_update_ratios_are_norm_of_step_over_norm_of_weights(tmp_path):
    keys = {'optimizer': 'muon', 'embedding_learning_rate': 0.02, 'tie_weights': False}
    trainer = make_trainer(keys, torch.device('cpu'), torch.float32, weight_decay=0.1)
    groups = {group['name']: group['params'] for group in trainer.optimizer.param_groups}
    assert groups.keys() == {'adamw', 'gains', 'embeddings', 'muon'}
    names = {p: name for name, p in trainer.raw_model.named_parameters()}
    lines, models = logged_steps(trainer, 3, tmp_path)
    for line, before, after in zip(lines, models, models[1:]):
        old, new = dict(before.named_parameters()), dict(after.named_parameters())
        for group, params in groups.items():
            members = [names[p] for p in params]
            step = squared([new[name] - old[name] for name in members])
            weights = squared([old[name] for name in members])
            assert line[f'update_ratio_{group}'] == pytest.approx((step / weights)**0.5, rel=1e-4)


def test_update_ratio_of_a_large_group_is_estimated_from_a_sample(tmp_path):
    trainer = make_trainer({'n_embd': 256, 'n_head': 4}, torch.device('cpu'), torch.float32,
                           optimizer='muon', gradient_accumulation_steps=2)
    (group,) = [g for g in trainer.optimizer.param_groups if g['name'] == 'muon']
    assert sum(p.numel() for p in group['params']) > 10 * 2**16
    names = {p: name for name, p in trainer.raw_model.named_parameters()}
    (line,), (before, after) = logged_steps(trainer, 1, tmp_path)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    members = [names[p] for p in group['params']]
    step = squared([new[name] - old[name] for name in members])
    expected = (step / squared([old[name] for name in members]))**0.5
    assert line['update_ratio_muon'] == pytest.approx(expected, rel=0.02)


# Others -------------------------------------------------------------------------------------------

def test_only_logged_steps_are_measured(run, char_data, tmp_path):
    """And training is the same, to the last bit."""
    common = (f'--dataset={char_data}', *TINY, '--gradient_accumulation_steps=2', '--max_iters=12')
    for n in (1, 5):
        run('train.py', f'--out_dir={tmp_path}/{n}', *common, f'--log_interval={n}')
    every, some = (log_lines(tmp_path / str(n), 'loss') for n in (1, 5))
    assert [line['step'] for line in some] == [0, 5, 10]
    for line in some:
        assert 'noise_scale' in line and line['loss'] == every[line['step']]['loss']
    one, five = (ckpt.load(tmp_path / str(n)).model for n in (1, 5))
    assert all(torch.equal(one[name], five[name]) for name in one)


def test_epoch_and_peak_memory(trained, char_data):
    meta = json.loads((char_data / 'meta.json').read_text())
    n_windows = (meta['train_tokens'] - 1 - 32) // 32  # one less than fit: they have an offset
    lines = log_lines(trained, 'loss')
    for line in lines:
        assert line['epoch'] == pytest.approx(line['samples_seen'] / n_windows)
    peaks = [line['peak_memory'] for line in lines]
    assert peaks == sorted(peaks) and 1e8 < peaks[0] < 5e9
    status = Path('/proc/self/status')
    if status.exists():  # Linux
        high_water = 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1])
        assert peak_memory(torch.device('cpu')) == pytest.approx(high_water, rel=0.05)


def test_noise_scale_of_a_resumed_run_is_averaged_over_earlier_lines(reference_run):
    """That it goes on from there is tested with every line of the log (test_resume.py)."""
    lines = [line for line in read_log(reference_run) if 'noise_scale' in line]
    assert len(lines) == 20
    signal = sum(line['grad_signal'] for line in lines)
    noise = sum(line['grad_noise'] for line in lines)
    expected = noise / signal if signal > 0 else None
    assert lines[-1]['noise_scale'] == pytest.approx(expected)
