"""Whether a difference between runs is more than the noise of their seeds."""
import math
import statistics


def standard_error(values):
    """Of the mean of at least two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def compare(losses, others):
    """(difference of the means, its standard error, p) of two settings: {seed: loss}.

    p: of Student's t-test, two-sided; paired if both have the same seeds, else Welch's. Error and p
    are nan if one of them has a single seed.
    """
    difference = statistics.mean(losses.values()) - statistics.mean(others.values())
    n, m = len(losses), len(others)
    if min(n, m) < 2:
        return difference, math.nan, math.nan
    if losses.keys() == others.keys():
        error, freedom = standard_error([losses[seed] - others[seed] for seed in losses]), n - 1
    else:
        a, b = standard_error(losses.values())**2, standard_error(others.values())**2
        error = math.sqrt(a + b)
        freedom = error and (a + b)**2 / (a**2 / (n - 1) + b**2 / (m - 1))  # Welch 1947
    p = p_value(difference / error, freedom) if error else float(difference == 0)
    return difference, error, p


def p_value(t, freedom):
    """P(|T| > |t|) for Student's T with at least 1 degree of freedom, a real number. With
    x = sqrt(freedom) * tan(angle) the density is a power of a cosine: midpoint rule."""
    start, n = math.atan(abs(t) / math.sqrt(freedom)), 1000
    width = (math.pi / 2 - start) / n
    tail = width * sum(math.cos(start + (i + 0.5) * width)**(freedom - 1) for i in range(n))
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 2 * norm * tail
