"""Tests that may be looked at after every frame: the wealth of a bet against a hypothesis, which cannot grow while it is true.

Whoever bets lambda_t (x_t - m) at each step on values in 0..1, with a lambda_t that depends on the past alone, has an expected
wealth of at most what he started with as long as the mean is at most m (at least m, for bets downwards). By Ville's inequality his
wealth then ever reaches 1/alpha with probability alpha at most: at any time, under any stopping, so that peeking is free. Waudby-Smith
and Ramdas, "Estimating means of bounded random variables by betting", arXiv 2010.09686, section 4; quantiles as in Howard and Ramdas,
arXiv 1906.09712.

The hypothesis is about the mean of each value given those before it. Values that hang together (the frames of a second) look like
more evidence than they are: the caller takes them far enough apart.

Shape suffixes: T values in the order of time.
"""

from __future__ import annotations

import math

import numpy as np

_MOST = 0.75  # of the largest bet that cannot lose everything: arXiv 2010.09686 has 1/2 to 3/4


def above(values_T: np.ndarray, mean: float, alpha: float) -> bool:
    """Whether the mean of values in 0..1 is above `mean`, wrongly so with probability `alpha` over all looks together."""
    return float(log_wealth(values_T, mean, alpha).max(initial=0.0)) >= math.log(1 / alpha)


def below(values_T: np.ndarray, mean: float, alpha: float) -> bool:
    """Whether the mean is below `mean`; what was known once and is not supported any more does not count."""
    wealth_T = log_wealth(1 - values_T, 1 - mean, alpha)
    return bool(len(wealth_T)) and float(wealth_T[-1]) >= math.log(1 / alpha)


def log_wealth(values_T: np.ndarray, mean: float, alpha: float, variance: float | None = None) -> np.ndarray:
    """Logarithm of the wealth after each value, of bets that the mean is above `mean`.

    Args:
        values_T: in 0..1.
        mean: of the hypothesis, strictly inside 0..1.
        alpha: the level that the bets are made for; any level may be read from the wealth.
        variance: that the bets go by; default an estimate from the values before (equation 26 of arXiv 2010.09686).

    Raises:
        ValueError: a value or the mean outside.
    """
    values_T = np.asarray(values_T, np.float64)
    if not 0 < mean < 1 or not (np.isfinite(values_T).all() and (values_T >= 0).all() and (values_T <= 1).all()):
        raise ValueError(f"mean {mean} and values have to lie in 0..1")
    time_T = np.arange(1, len(values_T) + 1)
    before_T = _variance_before(values_T) if variance is None else np.full(len(values_T), variance)
    bets_T = np.sqrt(2 * math.log(1 / alpha) / (before_T * time_T * np.log(time_T + 1)))
    gains_T: np.ndarray = np.log1p(np.minimum(bets_T, _MOST / mean) * (values_T - mean))
    return np.cumsum(gains_T)


def _variance_before(values_T: np.ndarray) -> np.ndarray:
    """Of the values before each, as if one of 1/2 with variance 1/4 had come first."""
    time_T = np.arange(1, len(values_T) + 1)
    means_T = (0.5 + np.cumsum(values_T)) / (time_T + 1)
    variances_T = (0.25 + np.cumsum((values_T - means_T) ** 2)) / (time_T + 1)
    shifted_T: np.ndarray = np.concatenate([[0.25], variances_T[:-1]])
    return shifted_T


def mean_bounds(values_T: np.ndarray, alpha: float) -> tuple[float, float]:
    """What `above` and `below` can say: the largest mean it is above, the smallest it is below, each at `alpha`; within 1e-4."""
    low = _largest(lambda mean: above(values_T, mean, alpha))
    high = 1 - _largest(lambda mean: above(1 - values_T, mean, alpha))
    return low, high


def _largest(true_at: object) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if true_at(middle) else (low, middle)  # type: ignore[operator]
    return low


def quantile_bounds(values_T: np.ndarray, share: float, alpha: float) -> tuple[float, float]:
    """Lower and upper bound of the quantile at `share`, of any values, each wrong with probability `alpha` over all looks.

    The bets depend on the time alone, so that the wealth falls as the threshold rises, and the largest threshold at which "no more
    than `share` lies below" is refuted may be searched for.

    Returns:
        (-inf, inf) as long as nothing is known.
    """
    ordered_T = np.sort(values_T)

    def surely_under(threshold: float) -> bool:
        """The quantile is above the threshold: surely less than `share` lie at or under it."""
        return _refuted((values_T > threshold).astype(np.float64), 1 - share, alpha)

    def surely_over(threshold: float) -> bool:
        return _refuted((values_T < threshold).astype(np.float64), share, alpha)

    below_it, above_it = 0, 0  # how many of the smallest are surely under the quantile, of the largest surely over
    step = 1 << max(len(values_T).bit_length(), 1)
    while step:
        if below_it + step <= len(ordered_T) and surely_under(float(ordered_T[below_it + step - 1])):
            below_it += step
        if above_it + step <= len(ordered_T) and surely_over(float(ordered_T[-above_it - step])):
            above_it += step
        step >>= 1
    low = float(ordered_T[below_it - 1]) if below_it else -math.inf
    high = float(ordered_T[-above_it]) if above_it else math.inf
    return low, high


def _refuted(indicator_T: np.ndarray, mean: float, alpha: float) -> bool:
    wealth_T = log_wealth(indicator_T, mean, alpha, variance=mean * (1 - mean))
    return float(wealth_T.max(initial=0.0)) >= math.log(1 / alpha)
