"""The scaling law L(N, D) = E + A / N^a + B / D^b, fitted to the losses of finished runs.

N: parameters in matrix products, D: training tokens. The form is Hoffmann et al. 2022's (approach
3). For given exponents the law is linear in E, A and B, so the fit searches over two numbers only:
variable projection (Golub & Pereyra 1973), which needs no start value and cannot end in a local
minimum between grid points, unlike a search over all five (Besiroglu et al. 2024).
"""
from itertools import combinations
from typing import NamedTuple

import numpy as np

EXPONENTS = np.linspace(0.04, 2, 25)  # the first grid, for a and b
PRECISION = 2e-5  # of the exponents
N_BOOTSTRAP = 300
N_FREE = 5  # E, A, a, B, b


class Law(NamedTuple):
    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, n, d):
        """Nats per token; n, d: numbers or arrays."""
        return self.E + self.A * np.power(n, -self.a) + self.B * np.power(d, -self.b)


def fit(n, d, losses):
    """The Law that minimizes the squared relative errors at parameters n, tokens d (arrays), with
    E, A, B >= 0. At least 5 runs determine it."""
    n, d, losses = (np.asarray(values, dtype=float) for values in (n, d, losses))
    center = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # keeps the columns near 1
    grid_a = grid_b = EXPONENTS
    step = EXPONENTS[1] - EXPONENTS[0]
    for _ in range(100):
        errors, coefficients = project(n / center[0], d / center[1], losses, grid_a, grid_b)
        i, j = np.unravel_index(errors.argmin(), errors.shape)
        a, b = grid_a[i], grid_b[j]
        if step < PRECISION:
            break
        if not at_edge(grid_a, i) and not at_edge(grid_b, j):
            step /= 3
        # else the valley leads out of the grid: follow it
        grid_a, grid_b = grid_around(a, step), grid_around(b, step)
    E, A, B = coefficients[i, j]
    return Law(*map(float, (E, A * center[0]**a, a, B * center[1]**b, b)))


def at_edge(grid, i):
    """Whether grid[i] is its first or last number, but not the first or last of EXPONENTS."""
    return i in (0, len(grid) - 1) and EXPONENTS[0] < grid[i] < EXPONENTS[-1]


def grid_around(exponent, step):
    grid = exponent + step * np.arange(-6, 7)
    return np.unique(grid.clip(EXPONENTS[0], EXPONENTS[-1]))


def project(n, d, losses, grid_a, grid_b):
    """(sum of squared relative errors (a, b), [E, A, B] (a, b, 3)) of the best non-negative E, A, B
    for each pair of exponents."""
    columns = np.empty((len(grid_a), len(grid_b), len(losses), 3))
    columns[..., 0] = 1
    columns[..., 1] = n ** -grid_a[:, None, None]
    columns[..., 2] = d ** -grid_b[:, None]
    columns /= losses[:, None]  # relative errors: the target becomes 1
    gram = columns.mT @ columns  # (a, b, 3, 3)
    moments = columns.sum(-2)  # (a, b, 3)
    best = np.full(gram.shape[:2], np.inf)
    coefficients = np.zeros((*best.shape, 3))
    # non-negative least squares: the best feasible solution with some coefficients at 0
    for free in (c for size in (3, 2, 1) for c in combinations(range(3), size)):
        free = list(free)
        ridge = 1e-13 * np.eye(len(free))  # a = b over equal ladders of N and D: singular
        solution = np.linalg.solve(gram[..., free, :][..., free] + ridge,
                                   moments[..., free, None])[..., 0]
        errors = len(losses) - (solution * moments[..., free]).sum(-1)
        better = (solution >= 0).all(-1) & (errors < best)
        best[better] = errors[better]
        full = np.zeros_like(coefficients)
        full[..., free] = solution
        coefficients[better] = full[better]
        if len(free) == 3 and better.all():  # none needs a 0
            break
    return best, coefficients


def why_not(n, d, held_out=False):
    """Why runs of these sizes and tokens cannot carry a prediction, in words; '' if they can.
    held_out: they are to predict a run that is known, so that a wrong law shows."""
    if len(n) < 6:
        return f'{len(n)} finished runs are too few for a law with {N_FREE} constants: 6 at least'
    if len(set(n)) < 3 or len(set(d)) < 3:
        return f'{len(set(n))} sizes at {len(set(d))} token counts are too few: 3 of each at least'
    if max(n) < 8 * min(n) and not held_out:
        return (f'the sizes are too close: the largest has {max(n) / min(n):.1f} times the '
                f'parameters of the smallest, 8 at least')
    return ''


def residuals(law, n, d, losses):
    """Logarithms of the losses over the law's."""
    return np.log(losses / law.loss(n, d))


def noise(law, n, d, losses):
    """Standard deviation of the residuals, for the degrees of freedom that the fit leaves."""
    left = max(len(n) - N_FREE, 1)
    return float(np.sqrt((residuals(law, n, d, losses)**2).sum() / left))


class Bootstrap(NamedTuple):
    """What other ladders of the same shape might have given."""
    law: Law  # of the runs themselves
    laws: list  # of the other ladders
    sigmas: np.ndarray  # their noise (count,)
    draws: np.ndarray  # residuals of their runs (count, runs)


def bootstrap(n, d, losses, count=N_BOOTSTRAP):
    """The Bootstrap of a ladder: laws fitted to the losses of its law with new noise (parametric:
    Efron 1979). The size of the noise is uncertain, too: without that, 90% intervals held 83% of
    the true losses on synthetic ladders of 16 runs, with it 89%. The same for the same runs, as the
    seed is fixed."""
    law, random = fit(n, d, losses), np.random.default_rng(0)
    left = max(len(n) - N_FREE, 1)
    sigmas = noise(law, n, d, losses) * np.sqrt(left / random.chisquare(left, count))
    draws = sigmas[:, None] * random.normal(size=(count, len(n)))
    expected = law.loss(n, d)
    laws = [fit(n, d, expected * np.exp(draw)) for draw in np.clip(draws, -1, 1)]
    return Bootstrap(law, laws, sigmas, draws)


def interval(values):
    """The middle 90%."""
    return tuple(float(x) for x in np.quantile(values, (0.05, 0.95)))


def predict(ladder, n, d):
    """(loss of a run with n parameters and d tokens, its 90% interval) by a Bootstrap: the law may
    be another, and one run has noise."""
    own = ladder.sigmas * np.random.default_rng(1).normal(size=len(ladder.laws))
    values = [law.loss(n, d) for law in ladder.laws] * np.exp(own)
    return float(ladder.law.loss(n, d)), interval(values)


def multiplier(law, n, d, losses):
    """The factors on compute at which the law reaches these losses, n and d growing alike from each
    run's own: up to e^20, for losses near or below E, which no compute reaches."""
    low, high = np.full(len(n), -20.0), np.full(len(n), 20.0)  # logarithms
    for _ in range(60):
        middle = (low + high) / 2
        root = np.exp(middle / 2)
        above = law.loss(n * root, d * root) > losses
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.exp(low)


def speedup(ladder, losses, others, pairs):
    """(factor, its 90% interval): the compute with which a ladder reaches the losses of other runs,
    over theirs, as a geometric mean.

    ladder: its Bootstrap, losses: its runs' (runs,), others: n, d, losses of the other runs. pairs:
    for each of them the number of the ladder's run with the same depth and tokens, -1 if it has
    none. In a pair the difference of the two losses counts, not how well the law fits there.
    """
    n, d, other_losses = others
    paired = pairs >= 0
    ratios = np.log(other_losses / np.where(paired, losses[pairs], ladder.law.loss(n, d)))

    def mean(law, ratios):
        factors = multiplier(law, n, d, law.loss(n, d) * np.exp(ratios))
        return float(np.exp(np.log(factors).mean()))

    random, values = np.random.default_rng(1), []
    for law, sigma, draw in zip(*ladder[1:]):
        change = sigma * random.normal(size=len(n)) - np.where(paired, draw[pairs], 0)
        values.append(mean(law, ratios + change))
    return mean(ladder.law, ratios), interval(values)
