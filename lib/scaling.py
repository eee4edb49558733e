"""The scaling law L(N, D) = E + A / N^a + B / D^b, fitted to the losses of finished runs.

N: parameters in matrix products, D: training tokens. The form is Hoffmann et al. 2022's (approach
3). For given exponents the law is linear in E, A and B, so the fit searches over two numbers only:
variable projection (Golub & Pereyra 1973), which needs no start value and cannot end in a local
minimum between grid points, unlike a search over all five (Besiroglu et al. 2024).
"""
from itertools import combinations
from typing import NamedTuple

import numpy as np

EXPONENTS = np.linspace(0.04, 2, 50)  # the first grid, for a and b
N_ZOOMS = 12  # each on a third of the grid before it
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
    grid_a, grid_b = EXPONENTS, EXPONENTS
    for _ in range(N_ZOOMS + 1):
        errors, coefficients = project(n / center[0], d / center[1], losses, grid_a, grid_b)
        i, j = np.unravel_index(errors.argmin(), errors.shape)
        a, b = grid_a[i], grid_b[j]
        E, A, B = coefficients[i, j]
        best = Law(E, A * center[0]**a, a, B * center[1]**b, b)
        grid_a, grid_b = zoom(grid_a, a), zoom(grid_b, b)
    return Law(*map(float, best))


def zoom(grid, best):
    """A grid of 13 exponents around the best one, a third as wide as this one at most."""
    width = min(2 * (grid[1] - grid[0]), (grid[-1] - grid[0]) / 6)
    return np.linspace(max(best - width, EXPONENTS[0]), min(best + width, EXPONENTS[-1]), 13)


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


def bootstrap(n, d, losses, count=N_BOOTSTRAP):
    """(laws fitted to the law's own losses with resampled residuals, the residuals resampled
    (count, runs)): what other runs of the same ladder might have given (Efron 1979). The same for
    the same runs: the generator's seed is fixed."""
    law = fit(n, d, losses)
    errors = residuals(law, n, d, losses)
    errors = errors - errors.mean()
    errors *= noise(law, n, d, losses) / max(errors.std(), 1e-12)
    draws = errors[np.random.default_rng(0).integers(len(errors), size=(count, len(errors)))]
    return [fit(n, d, law.loss(n, d) * np.exp(draw)) for draw in draws], draws


def interval(values):
    """The middle 90%."""
    return tuple(float(x) for x in np.quantile(values, (0.05, 0.95)))


def predict(n, d, losses, target_n, target_d):
    """(loss of a run with target_n parameters and target_d tokens, its 90% interval): uncertainty
    of the law and the noise of one run."""
    laws, draws = bootstrap(n, d, losses)
    values = [law.loss(target_n, target_d) * np.exp(draw[0]) for law, draw in zip(laws, draws)]
    return float(fit(n, d, losses).loss(target_n, target_d)), interval(values)


def hold_out_largest(n, d, losses):
    """(which runs are of the largest size (runs,), their losses by the law of the others)."""
    largest = n == n.max()
    law = fit(n[~largest], d[~largest], losses[~largest])
    return largest, law.loss(n[largest], d[largest])


def multiplier(law, n, d, losses):
    """The factors on compute at which the law reaches these losses, n and d growing alike from each
    run's own: infinite below E, which no compute reaches."""
    low, high = np.full(len(n), -20.0), np.full(len(n), 20.0)  # logarithms
    for _ in range(60):
        middle = (low + high) / 2
        root = np.exp(middle / 2)
        above = law.loss(n * root, d * root) > losses
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(losses <= law.E, np.inf, np.exp(low))


def speedup(baseline, others, pairs):
    """(factor, its 90% interval): the compute of the baseline that reaches the losses of the
    others, over theirs, as a geometric mean. baseline, others: n, d, losses (arrays). pairs: for
    each other run the index of the baseline's run with the same depth and tokens, -1 if there is
    none. With a pair only the difference of the two counts, not how well the law fits."""
    law = fit(*baseline)
    n, d, losses = others
    paired = pairs >= 0
    ratios = np.log(losses / np.where(paired, baseline[2][pairs], law.loss(n, d)))

    def mean_of(law, ratios):
        return np.exp(np.log(multiplier(law, n, d, law.loss(n, d) * np.exp(ratios))).mean())

    factor = mean_of(law, ratios)
    laws, draws = bootstrap(*baseline)
    random, values = np.random.default_rng(1), []
    for other, draw in zip(laws, draws):
        own = random.choice(draws.ravel(), len(n))
        values.append(mean_of(other, ratios + own - np.where(paired, draw[pairs], 0)))
    return float(factor), interval(values)
