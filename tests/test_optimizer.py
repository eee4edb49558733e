"""Learning rate schedules and optimizers, against papers, torch.optim and hand calculation."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT
from lib.recipe import read_train_config
from model import GPT, GPTConfig
from optimizer import (
    Optimizer,
    adamw,
    adamw_step,
    lr_multiplier,
    make_optimizer,
    orthogonalize,
    state_bytes,
)

BASE = {
    'learning_rate': 1e-3,
    'min_lr': 1e-4,
    'warmup_iters': 10,
    'lr_decay_iters': 110,
    'max_iters': 110,
    'schedule': 'cosine',
    'decay_fraction': 0.2,
    'decay_lr': True,
    'weight_decay': 0.0,
    'beta1': 0.9,
    'beta2': 0.95,
    'adam_eps': 1e-8,
    'muon_learning_rate': 0.02,
    'muon_momentum': 0.95,
    'embedding_learning_rate': None,
    'extended_at': 0,
}


def rates(**options):
    config = SimpleNamespace(**BASE | options)
    return [config.learning_rate * lr_multiplier(step, config) for step in range(130)]


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd', 'constant'])
def test_schedule_warms_up_to_peak(schedule):
    lr = rates(schedule=schedule)
    # nanoGPT's warmup is never 0
    assert lr[:10] == pytest.approx([1e-3 * (step + 1) / 11 for step in range(10)])
    assert lr[10] == pytest.approx(1e-3) == max(lr)
    assert all(a >= b for a, b in zip(lr[10:], lr[11:], strict=False))


def test_schedule_decay_matches_formulas():
    cosine = rates()
    assert cosine[60] == pytest.approx((1e-3 + 1e-4) / 2)
    assert cosine[35] == pytest.approx(1e-4 + 0.5 * (1 + math.cos(math.pi / 4)) * 9e-4)
    linear = rates(schedule='linear')
    assert linear[60] == pytest.approx((1e-3 + 1e-4) / 2)
    assert linear[35] == pytest.approx(1e-3 - 9e-4 / 4)
    wsd = rates(schedule='wsd')
    assert wsd[10:91] == pytest.approx([1e-3] * 81) and wsd[100] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates(schedule='constant')[10:] == [1e-3] * 120
    # d^-0.5 min(t^-0.5, t w^-1.5), scaled to its peak; the paper counts steps from 1
    noam = [min(t**-0.5, t * 10**-1.5) for t in range(1, 131)]
    expected = [1e-3 * rate / max(noam) for rate in noam]
    assert rates(schedule='inverse_sqrt') == pytest.approx(expected)
    assert rates(schedule='inverse_sqrt')[9] == max(expected)
    for lr in (cosine, linear, wsd):
        assert lr[110:] == [1e-4] * 20


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'])
def test_schedule_handles_no_warmup_and_short_runs(schedule):
    assert rates(schedule=schedule, warmup_iters=0)[0] == pytest.approx(1e-3)
    assert all(
        0 < lr <= 1e-3 for lr in rates(schedule=schedule, warmup_iters=50, lr_decay_iters=20)
    )


def test_schedule_of_an_extended_run_warms_up_again():
    """Steps before it keep their rates."""
    plain = rates(schedule='wsd', max_iters=120, lr_decay_iters=120)
    extended = rates(schedule='wsd', max_iters=120, lr_decay_iters=120, extended_at=60)
    assert extended[:60] == plain[:60]
    assert extended[60:70] == pytest.approx([plain[60] / 2 * (i + 1) / 11 for i in range(10)])
    assert extended[70:] == pytest.approx([rate / 2 for rate in plain[70:]])


def test_schedule_derives_missing_values():
    assert rates(min_lr=None, lr_decay_iters=None) == rates()
    assert rates(decay_lr=False) == [1e-3] * 130  # like nanoGPT, no warmup either


def test_adamw_decays_only_matrices():
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8))
    decay, rest = adamw(model.parameters(), 0.1, 1e-3, (0.9, 0.95)).param_groups
    assert (decay['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split('.')[-2] for p in decay['params']} == {
        'wte',
        'wpe',
        'c_attn',
        'c_proj',
        'c_fc',
    }
    assert all(names[id(p)].endswith('bias') or '.ln_' in names[id(p)] for p in rest['params'])
    assert len(decay['params']) + len(rest['params']) == len(names)


def test_adamw_first_step_matches_formula(monkeypatch):
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8))
    optimizer = adamw(model.parameters(), 0.1, 1e-2, (0.9, 0.95))
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        adamw_step(*args, **kwargs)

    monkeypatch.setattr('optimizer.adamw_step', recorded)
    p = model.transformer.wpe.weight
    before, grad = p.detach().clone(), torch.randn_like(p)
    p.grad = grad.clone()
    # Loshchilov & Hutter 2019, algorithm 2; at step 1, m / (1 - beta1) = g, v / (1 - beta2) = g^2
    optimizer.step()
    assert calls and all(call['fused'] for call in calls)
    torch.testing.assert_close(
        p.detach(), before * (1 - 1e-2 * 0.1) - 1e-2 * grad / (grad.abs() + 1e-8)
    )


def one_step(name, **options):
    """(model, initial weights, gradients, optimizer) after one step of a small GPT."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, bias=True))
    config = SimpleNamespace(**BASE | {'optimizer': name} | options)
    optimizer = make_optimizer(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    idx = torch.randint(11, (4, 8))
    model(idx, idx)[1].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return model, before, gradients, optimizer


def test_muon_orthogonalizes_matrices_and_uses_adamw_for_rest():
    model, before, gradients, _ = one_step('muon')
    plain, _, _, _ = one_step('adamw')
    for name, p in model.named_parameters():
        if '.h.' in name and p.dim() == 2:
            # the gradient's singular directions, all of about the same length (Jordan et al. 2024)
            u, sizes, v = torch.linalg.svd(gradients[name], full_matrices=False)
            scale = 0.02 * max(1, p.size(0) / p.size(1)) ** 0.5
            lengths = (u.T @ (before[name] - p) @ v.T / scale).diagonal()[
                sizes > 0.05 * sizes.norm()
            ]
            assert len(lengths) > 3 and 0.5 < lengths.min() and lengths.max() < 1.3, (name, lengths)
        else:
            assert torch.equal(p, dict(plain.named_parameters())[name]), name


def test_muon_is_independent_of_batching(monkeypatch):
    together = one_step('muon')[0]
    monkeypatch.setattr('optimizer.MUON_MAX_NUMEL', 1)
    for p, q in zip(together.parameters(), one_step('muon')[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_load_state_restores_state_and_keeps_configured_rates(name):
    model, _, _, old = one_step(name)
    _, _, _, new = one_step(name, learning_rate=5e-4, muon_learning_rate=0.01, weight_decay=0.3)
    new.load_state_dict(old.state_dict())

    def flat(optimizer):
        return [v for state in optimizer.state.values() for v in state.values()]

    assert len(flat(new)) > 10
    assert all(torch.equal(a, b) for a, b in zip(flat(old), flat(new), strict=True))
    assert {group['initial_lr'] for group in new.param_groups} == (
        {5e-4} if name == 'adamw' else {5e-4, 0.01}
    )
    assert {group['weight_decay'] for group in new.param_groups} == {0.0, 0.3}
    assert state_bytes(model, SimpleNamespace(optimizer=name)) == 4 * sum(
        v.numel() for v in flat(new) if v.dim() > 0
    )


def test_load_state_rejects_mismatched_state():
    _, _, _, adam = one_step('adamw')
    _, _, _, muon = one_step('muon')
    for optimizer, state in ((adam, muon.state_dict()), (muon, adam.state_dict())):
        with pytest.raises(ValueError, match='it is not the state of this optimizer'):
            optimizer.load_state_dict(state)
    state = adam.state_dict()
    state['state'][0]['exp_avg'] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match='shape'):
        adam.load_state_dict(state)


def test_muon_matches_torch_muon():
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 8), (8, 24), (24, 8), (16, 16)]
    ]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {'params': ours, 'kind': 'muon', 'lr': 0.02, 'weight_decay': 0.1, 'momentum': 0.9}
    a = Optimizer([group])
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn='original')
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(a.state[p]['momentum_buffer'], b.state[q]['momentum_buffer'])
        # orthogonalized in bfloat16 (8 bits): 5 steps of 0.02 * sqrt(3) with entries around 0.3
        torch.testing.assert_close(p, q, atol=5 * 0.035 * 2**-7, rtol=0)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_step_if_false_changes_nothing(name):
    model, _, gradients, optimizer = one_step(name)
    same = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step_if_finite(torch.tensor(False))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), same[0].parameters(), strict=True)
    )
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(optimizer.state_dict()), flat(same[1]), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    for n, p in model.named_parameters():
        p.grad = gradients[n].clone()
    optimizer.step_if_finite(torch.tensor(True))
    assert all(
        not torch.equal(p, q) for p, q in zip(model.parameters(), same[0].parameters(), strict=True)
    )


def test_optimizer_groups_embeddings_with_own_rate():
    model = GPT(
        GPTConfig(
            block_size=8,
            vocab_size=11,
            n_layer=1,
            n_head=2,
            n_embd=16,
            ngram=3,
            ngram_rows=50,
            tie_weights=False,
        )
    )
    config = SimpleNamespace(
        **BASE | {'optimizer': 'muon', 'weight_decay': 0.1, 'embedding_learning_rate': 0.5}
    )
    rates = {
        id(p): (group['initial_lr'], group['weight_decay'])
        for group in make_optimizer(model, config).param_groups
        for p in group['params']
    }
    parts = model.transformer
    assert rates[id(parts.wte.weight)] == rates[id(parts.ngram.tables.weight)] == (0.5, 0.0)
    assert rates[id(model.lm_head.weight)] == rates[id(parts.wpe.weight)] == (1e-3, 0.1)
    assert rates[id(parts.h[0].mlp.c_fc.weight)] == (0.02, 0.1)
    assert len(rates) == len(list(model.parameters()))


def test_muon_uses_float32_without_hardware_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {})
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    y = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    # bfloat16 would be off by 1e-2
    torch.testing.assert_close(orthogonalize(x).double(), y, atol=1e-4, rtol=0)


def test_transformer_2017_config_matches_paper():
    config, _ = read_train_config(['config/transformer_2017.py'])
    assert (
        config.n_layer,
        config.n_embd,
        config.n_head,
        config.dropout,
        config.label_smoothing,
    ) == (6, 512, 8, 0.1, 0.1)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4))
    groups = make_optimizer(model, config).param_groups
    assert all(
        (group['betas'], group['eps'], group['weight_decay']) == ((0.9, 0.98), 1e-9, 0.0)
        for group in groups
    )
    for step in (1, 100, 3999, 4001, 50000):  # section 5.3, which counts from 1
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        lr = config.learning_rate * lr_multiplier(step - 1, config)
        assert lr == pytest.approx(expected, rel=5e-4)


def test_a_step_does_not_import_dynamo():
    """Which takes a second of CPU time, a third of what a run needs to start."""
    code = (
        'import sys, torch, model, optimizer\n'
        'gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9))\n'
        'step = optimizer.adamw(gpt.parameters(), 0.1, 1e-3, (0.9, 0.95))\n'
        'gpt(*torch.zeros(2, 1, 4, dtype=torch.long))[1].backward()\n'
        'step.step()\n'
        'step.zero_grad()\n'
        'step.state_dict()\n'
        'assert "torch._dynamo" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
