"""lib/scaling.py: the law is recovered from synthetic losses, and says what it does not know."""

import numpy as np
import pytest
import torch

from lib import scaling

# Hoffmann et al. 2022, appendix D.3
HOFFMANN = scaling.Law(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)


def ladder(depths, horizons):
    """(parameters, tokens) of tools/scale.py's runs with a vocabulary of 2048: 20 tokens per
    parameter of the blocks, times each horizon."""
    n = [49152 * depth**3 + 131072 * depth for depth in depths for _ in horizons]
    d = [20 * 49152 * depth**3 * share for depth in depths for share in horizons]
    return np.array(n, dtype=float), np.array(d, dtype=float)


def measured(n, d, noise, seed, law=HOFFMANN):
    """Losses of the law with noise, relative to them."""
    return law.loss(n, d) * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))


def errors(law, truth=HOFFMANN):
    """Relative errors of E and of both exponents."""
    return [abs(getattr(law, name) / getattr(truth, name) - 1) for name in ('E', 'a', 'b')]


def test_a_law_without_noise_is_recovered():
    for law in (HOFFMANN, HOFFMANN._replace(a=0.5, B=3e4, b=0.6),
                HOFFMANN._replace(E=0.0, A=60, a=0.2)):
        n, d = ladder((1, 2, 3, 4), (0.25, 0.5, 1))
        found = scaling.fit(n, d, law.loss(n, d))
        assert tuple(found) == pytest.approx(tuple(law), rel=2e-3, abs=2e-3)


# what it takes: 24 runs whose parameters span a factor of 130, and 80 with 3,800
@pytest.mark.parametrize('noise, depths, horizons', [
    (0.001, (2, 3, 4, 6, 8, 12), (1 / 8, 1 / 4, 1 / 2, 1)),
    (0.005, (1, 2, 3, 4, 6, 8, 12, 16, 20, 24), [2.0**(2 - i) for i in range(8)]),
])
def test_hoffmanns_law_is_recovered_from_noisy_losses(noise, depths, horizons):
    n, d = ladder(depths, horizons)
    for seed in range(20):
        E, a, b = errors(scaling.fit(n, d, measured(n, d, noise, seed)))
        assert E < 0.02 and a < 0.1 and b < 0.1, seed


def test_the_fit_is_at_least_as_good_as_that_of_lbfgs_over_all_five_numbers():
    """As Hoffmann et al. fit, but with squared errors; from the best start there is: the truth."""
    n, d = ladder((1, 2, 3, 4), (1 / 8, 1 / 4, 1 / 2, 1))
    losses = measured(n, d, 0.003, seed=0)

    def objective(law):
        return float(((law.loss(n, d) / losses - 1)**2).sum())

    log_n, log_d, target = (torch.tensor(np.log(values)) for values in (n, d, losses))
    E, A, a, B, b = HOFFMANN
    x = torch.tensor([np.log(E), np.log(A), a, np.log(B), b], requires_grad=True)
    optimizer = torch.optim.LBFGS([x], max_iter=100, line_search_fn='strong_wolfe',
                                  tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        terms = torch.stack([x[0].expand(len(n)), x[1] - x[2] * log_n, x[3] - x[4] * log_d])
        error = ((torch.logsumexp(terms, 0) - target).exp() - 1).square().sum()
        error.backward()
        return error

    optimizer.step(closure)
    E, A, a, B, b = x.tolist()
    theirs = scaling.Law(np.exp(E), np.exp(A), a, np.exp(B), b)
    ours = scaling.fit(n, d, losses)
    assert objective(theirs) < objective(HOFFMANN)
    assert objective(ours) <= objective(theirs) * (1 + 1e-6)


def test_constants_are_never_negative():
    n, d = ladder((1, 2, 3, 4), (0.25, 0.5, 1))
    for seed in range(20):
        law = scaling.fit(n, d, measured(n, d, 0.1, seed))
        assert min(law) >= 0


def test_bootstrap_is_a_pure_function():
    n, d = ladder((1, 2, 3, 4), (0.5, 1))
    losses = measured(n, d, 0.003, seed=0)
    first, second = (scaling.bootstrap(n, d, losses, count=5) for _ in range(2))
    assert first.laws == second.laws
    assert scaling.predict(first, 2e7, 1e9) == scaling.predict(second, 2e7, 1e9)


@pytest.mark.slow
def test_intervals_hold_the_loss_of_a_larger_run():
    """90% intervals, 60 ladders, a run with 12 times the compute of the largest: 48 to 59 hold."""
    n, d = ladder((1, 2, 3, 4), (1 / 8, 1 / 4, 1 / 2, 1))
    (target_n,), (target_d,) = ladder((6,), (1,))
    held = 0
    for seed in range(60):
        found = scaling.bootstrap(n, d, measured(n, d, 0.003, seed), count=60)
        _, (low, high) = scaling.predict(found, target_n, target_d)
        truth = measured(np.array([target_n]), target_d, 0.003, seed + 1000)
        held += low <= truth.item() <= high
    assert 48 <= held <= 59


def test_a_setting_that_saves_compute_is_worth_that_much():
    n, d = ladder((1, 2, 3, 4), (1 / 8, 1 / 4, 1 / 2, 1))
    losses = measured(n, d, 0.001, seed=0)
    found = scaling.bootstrap(n, d, losses, count=40)
    # as if with 1.3 times the compute, shared between n and d
    better = HOFFMANN.loss(n * 1.3**0.5, d * 1.3**0.5) / HOFFMANN.loss(n, d)
    alone, pairs = np.full(len(n), -1), np.arange(len(n))
    for others, places in (((n, d, losses * better), pairs),
                           ((n, d, measured(n, d, 0.001, 1) * better), pairs),
                           ((n, d, measured(n, d, 0.001, 1) * better), alone)):
        factor, (low, high) = scaling.speedup(found, losses, others, places)
        assert low < factor < high < 1.1 * low
        assert factor == pytest.approx(1.3, rel=0.02)
    factor, (low, high) = scaling.speedup(found, losses, (n, d, losses), pairs)
    assert factor == pytest.approx(1) and low < 1 < high
    # a loss below E, which no compute reaches, is no error
    factor, _ = scaling.speedup(found, losses, (n[:1], d[:1], losses[:1] / 10), alone[:1])
    assert factor > 1e6


@pytest.mark.parametrize('depths, horizons, says', [
    ((1, 4), (0.5, 1), '4 finished runs are too few'),
    ((1, 4), (0.25, 0.5, 1), '2 sizes at 6 token counts are too few'),
    ((3, 4, 5), (0.5, 1), 'too close: the largest has 4.0 times'),
    ((1, 2, 4), (0.5, 1), ''),
])
def test_too_few_or_too_close(depths, horizons, says):
    reason = scaling.why_not(*ladder(depths, horizons))
    assert says in reason and bool(says) == bool(reason)
