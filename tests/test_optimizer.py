"""Learning rates against the formulas of their papers, parameter groups, and AdamW by hand."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import train
from model import GPT, GPTConfig
from optimizer import Muon, adamw, learning_rate_at, load_state, make_optimizer, orthogonalize, state_bytes, step_if

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
}


def rates(**options):
    config = SimpleNamespace(**BASE | options)
    return [learning_rate_at(step, config) for step in range(130)]


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'])
def test_every_schedule_warms_up_to_the_peak(schedule):
    lr = rates(schedule=schedule)
    assert lr[:10] == pytest.approx([1e-3 * (step + 1) / 11 for step in range(10)])  # nanoGPT's warm-up: never 0
    assert lr[10] == pytest.approx(1e-3) == max(lr)
    assert all(a >= b for a, b in zip(lr[10:], lr[11:], strict=False))


def test_schedules_fall_as_their_formulas_say():
    cosine = rates()
    assert cosine[60] == pytest.approx((1e-3 + 1e-4) / 2) and cosine[35] == pytest.approx(
        1e-4 + 0.5 * (1 + math.cos(math.pi / 4)) * 9e-4
    )
    linear = rates(schedule='linear')
    assert linear[60] == pytest.approx((1e-3 + 1e-4) / 2) and linear[35] == pytest.approx(1e-3 - 9e-4 / 4)
    wsd = rates(schedule='wsd')
    assert wsd[10:91] == pytest.approx([1e-3] * 81) and wsd[100] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates(schedule='constant')[10:] == [1e-3] * 120
    noam = rates(schedule='inverse_sqrt')  # d^-0.5 min(s^-0.5, s w^-1.5): ratios do not depend on d
    assert noam[40] / noam[90] == pytest.approx(math.sqrt(90 / 40)) and noam[40] == pytest.approx(1e-3 * math.sqrt(10 / 40))
    for lr in (cosine, linear, wsd):
        assert lr[110:] == [1e-4] * 20


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'])
def test_no_warm_up_and_a_short_run(schedule):
    assert rates(schedule=schedule, warmup_iters=0)[0] == pytest.approx(1e-3)
    assert all(0 < lr <= 1e-3 for lr in rates(schedule=schedule, warmup_iters=50, lr_decay_iters=20))


def test_what_is_left_out_follows_from_the_rest():
    assert rates(min_lr=None, lr_decay_iters=None) == rates()
    assert rates(decay_lr=False) == [1e-3] * 130  # nanoGPT: no warm-up either


def test_matrices_decay_and_gains_and_biases_do_not():
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8))
    decay, rest = adamw(model.parameters(), 0.1, 1e-3, (0.9, 0.95)).param_groups
    assert (decay['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split('.')[-2] for p in decay['params']} == {'wte', 'wpe', 'c_attn', 'c_proj', 'c_fc'}
    assert all(names[id(p)].endswith('bias') or '.ln_' in names[id(p)] for p in rest['params'])
    assert len(decay['params']) + len(rest['params']) == len(names)


def test_a_step_is_adamw():
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8))
    optimizer = adamw(model.parameters(), 0.1, 1e-2, (0.9, 0.95))
    assert all(group['fused'] for group in optimizer.param_groups)
    p = model.transformer.wpe.weight
    before, grad = p.detach().clone(), torch.randn_like(p)
    p.grad = grad.clone()
    optimizer.step()  # the first step: m / (1 - beta1) = g, v / (1 - beta2) = g^2 (Loshchilov & Hutter 2019, algorithm 2)
    torch.testing.assert_close(p.detach(), before * (1 - 1e-2 * 0.1) - 1e-2 * grad / (grad.abs() + 1e-8))


def one_step(name, **options):
    """A small GPT after one step on a random batch: (model, the weights before, its gradients, optimizer)."""
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


def test_muon_takes_orthogonal_steps_with_the_matrices_and_adamw_steps_with_the_rest():
    model, before, gradients, _ = one_step('muon')
    plain, _, _, _ = one_step('adamw')
    for name, p in model.named_parameters():
        if '.h.' in name and p.dim() == 2:
            # the gradient's own directions, each of about the same length (Jordan et al. 2024)
            u, sizes, v = torch.linalg.svd(gradients[name], full_matrices=False)
            scale = 0.02 * max(1, p.size(0) / p.size(1)) ** 0.5
            lengths = (u.T @ (before[name] - p) @ v.T / scale).diagonal()[sizes > 0.05 * sizes.norm()]
            assert len(lengths) > 3 and 0.5 < lengths.min() and lengths.max() < 1.3, (name, lengths)
        else:
            assert torch.equal(p, dict(plain.named_parameters())[name]), name


def test_muon_takes_the_same_step_whether_matrices_are_together_or_alone(monkeypatch):
    together = one_step('muon')[0]
    monkeypatch.setattr('optimizer.MUON_AT_ONCE', 1)
    for p, q in zip(together.parameters(), one_step('muon')[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_the_state_comes_back_and_rates_stay_the_configs(name):
    model, _, _, old = one_step(name)
    _, _, _, new = one_step(name, learning_rate=5e-4, muon_learning_rate=0.01, weight_decay=0.3)
    load_state(new, old.state_dict())
    flat = lambda o: [v for part in getattr(o, 'parts', {'': o}).values() for s in part.state.values() for v in s.values()]  # noqa: E731
    assert len(flat(new)) > 10 and all(torch.equal(a, b) for a, b in zip(flat(old), flat(new), strict=True))
    assert {group['peak_lr'] for group in new.param_groups} == ({5e-4} if name == 'adamw' else {5e-4, 0.01})
    assert {group['weight_decay'] for group in new.param_groups} == {0.0, 0.3}
    assert state_bytes(model, SimpleNamespace(optimizer=name)) == 4 * sum(v.numel() for v in flat(new) if v.dim() > 0)


def test_a_state_that_does_not_fit_is_refused():
    _, _, _, adam = one_step('adamw')
    _, _, _, muon = one_step('muon')
    for optimizer, state in ((adam, muon.state_dict()), (muon, adam.state_dict())):
        with pytest.raises(ValueError, match='it is not the state of optimizer'):
            load_state(optimizer, state)
    state = adam.state_dict()
    state['state'][0]['exp_avg'] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match='shape'):
        load_state(adam, state)


def test_muon_equals_torchs_which_takes_one_matrix_at_a_time():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 8), (8, 24), (24, 8), (16, 16)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1, momentum=0.9)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn='original')
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(a.state[p]['momentum_buffer'], b.state[q]['momentum_buffer'])
        # orthogonalised in bfloat16, of 8 bits: 5 steps of 0.02 * sqrt(3) with entries around 0.3
        torch.testing.assert_close(p, q, atol=5 * 0.035 * 2**-7, rtol=0)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_that_is_not_wanted_changes_nothing_at_all(name):
    model, _, gradients, optimizer = one_step(name)
    same = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    step_if(torch.tensor(False), optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same[0].parameters(), strict=True))
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(optimizer.state_dict()), flat(same[1]), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    for n, p in model.named_parameters():
        p.grad = gradients[n].clone()
    step_if(torch.tensor(True), optimizer)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), same[0].parameters(), strict=True))


def test_embeddings_have_a_rate_of_their_own_and_do_not_decay_where_they_are_tables():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, ngram=3, ngram_rows=50, tie_weights=False))
    config = SimpleNamespace(**BASE | {'optimizer': 'muon', 'weight_decay': 0.1, 'embedding_learning_rate': 0.5})
    rates = {id(p): (group['peak_lr'], group['weight_decay']) for group in make_optimizer(model, config).param_groups
             for p in group['params']}
    parts = model.transformer
    assert rates[id(parts.wte.weight)] == rates[id(parts.ngram.tables.weight)] == (0.5, 0.0)
    assert rates[id(model.lm_head.weight)] == rates[id(parts.wpe.weight)] == (1e-3, 0.1)
    assert rates[id(parts.h[0].mlp.c_fc.weight)] == (0.02, 0.1) and len(rates) == len(list(model.parameters()))


def test_without_bfloat16_in_hardware_muon_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {})
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    y = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    torch.testing.assert_close(orthogonalize(x).double(), y, atol=1e-4, rtol=0)  # bfloat16 would be off by 1e-2


def test_the_recipe_of_2017_is_the_papers():
    config, _ = train.read_command(['config/transformer_2017.py'])
    assert (config.n_layer, config.n_embd, config.n_head, config.dropout, config.label_smoothing) == (6, 512, 8, 0.1, 0.1)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4))
    groups = make_optimizer(model, config).param_groups
    assert all((group['betas'], group['eps'], group['weight_decay']) == ((0.9, 0.98), 1e-9, 0.0) for group in groups)
    for step in (1, 100, 3999, 4001, 50000):  # section 5.3, whose first step is 1
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate_at(step - 1, config) == pytest.approx(expected, rel=5e-4)
