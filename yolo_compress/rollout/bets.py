"""Sequential tests by betting: the test can be evaluated after every value, and the error rate does not rise.

A gambler bets against the hypothesis "the mean of values in 0..1 is at most m". At step t his wealth is multiplied by
1 + lambda_t (x_t - m), where lambda_t depends on earlier values only. If the hypothesis is true, his expected wealth does not grow.
By Ville's inequality, the probability that his wealth ever reaches 1/alpha is then at most alpha. So the hypothesis is rejected once
the wealth reaches 1/alpha, and the test may be evaluated and stopped at any time. Source: Waudby-Smith and Ramdas, "Estimating means
of bounded random variables by betting", arXiv 2010.09686, section 4. Quantiles are as in Howard and Ramdas, arXiv 1906.09712.

The hypothesis is about the mean of each value, given the values before it. Correlated values, such as the frames of one second, count
as more evidence than they are. So the caller passes values that are far enough apart.

Shape suffix: T values in the order of time.
"""

from __future__ import annotations

import math

import numpy as np

_MAX_BET = 0.75  # as a fraction of the bet that can lose all wealth; arXiv 2010.09686 uses 1/2 to 3/4


def above(values_T: np.ndarray, mean: float, alpha: float) -> bool:
    """Return whether values in 0..1 show that their mean is above `mean`.

    `alpha` is the error probability over all evaluations together, if the test is repeated as values arrive.
    """
    return float(log_wealth(values_T, mean, alpha).max(initial=0.0)) >= math.log(1 / alpha)


def below(values_T: np.ndarray, mean: float, alpha: float) -> bool:
    """Return whether values in 0..1 show that their mean is below `mean`, with error probability `alpha`.

    Only the wealth after the last value counts, even if it was higher before.
    """
    wealth_T = log_wealth(1 - values_T, 1 - mean, alpha)
    return bool(len(wealth_T)) and float(wealth_T[-1]) >= math.log(1 / alpha)


def log_wealth(values_T: np.ndarray, mean: float, alpha: float, variance: float | None = None) -> np.ndarray:
    """Return the logarithm of the gambler's wealth after each value, for bets that the mean is above `mean`.

    Args:
        values_T: Values in 0..1.
        mean: Mean of the hypothesis, above 0 and below 1.
        alpha: Level for which the bets are chosen. The wealth is valid at any level.
        variance: Variance for which the bets are chosen. Default: an estimate from earlier values (arXiv 2010.09686,
            equation 26).

    Raises:
        ValueError: A value or the mean is outside its range.
    """
    values_T = np.asarray(values_T, np.float64)
    if not 0 < mean < 1 or not (np.isfinite(values_T).all() and (values_T >= 0).all() and (values_T <= 1).all()):
        raise ValueError(f"mean {mean} and values must be in 0..1")
    time_T = np.arange(1, len(values_T) + 1)
    before_T = _variance_before(values_T) if variance is None else np.full(len(values_T), variance)
    bets_T = np.sqrt(2 * math.log(1 / alpha) / (before_T * time_T * np.log(time_T + 1)))
    gains_T: np.ndarray = np.log1p(np.minimum(bets_T, _MAX_BET / mean) * (values_T - mean))
    return np.cumsum(gains_T)


def _variance_before(values_T: np.ndarray) -> np.ndarray:
    """Return for each value the variance of the values before it. The estimate starts at mean 1/2 and variance 1/4."""
    time_T = np.arange(1, len(values_T) + 1)
    means_T = (0.5 + np.cumsum(values_T)) / (time_T + 1)
    variances_T = (0.25 + np.cumsum((values_T - means_T) ** 2)) / (time_T + 1)
    shifted_T: np.ndarray = np.concatenate([[0.25], variances_T[:-1]])
    return shifted_T


def mean_bounds(values_T: np.ndarray, alpha: float) -> tuple[float, float]:
    """Return the lower and upper bound of the mean, to within 1e-4. Each bound is wrong with probability `alpha`."""
    low = _largest(lambda mean: above(values_T, mean, alpha))
    high = 1 - _largest(lambda mean: above(1 - values_T, mean, alpha))
    return low, high


def _largest(true_at: object) -> float:
    """Return the largest number in 0..1 at which `true_at` is true, by bisection, within 1e-4."""
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if true_at(middle) else (low, middle)  # type: ignore[operator]
    return low


def quantile_bounds(values_T: np.ndarray, share: float, alpha: float) -> tuple[float, float]:
    """Return the lower and upper bound of a quantile. Each bound is wrong with probability `alpha` over all evaluations.

    The values may have any range. The bets do not depend on the values, so the wealth falls monotonically with the threshold. A
    binary search therefore finds the outermost threshold that is rejected.

    Args:
        values_T: Values in the order of time.
        share: Which quantile: 0.5 is the median, 0.99 is p99.
        alpha: Error probability of each bound.

    Returns:
        The bounds; (-inf, inf) while there are too few values.
    """
    ordered_T = np.sort(values_T)

    def quantile_is_above(threshold: float) -> bool:
        """Return whether the values show that less than `share` of them are at or below the threshold."""
        return _rejected((values_T > threshold).astype(np.float64), 1 - share, alpha)

    def quantile_is_below(threshold: float) -> bool:
        """Return whether the values show that more than `share` of them are below the threshold."""
        return _rejected((values_T < threshold).astype(np.float64), share, alpha)

    n_below, n_above = 0, 0  # number of smallest values below the quantile, and of largest values above it
    step = 1 << max(len(values_T).bit_length(), 1)
    while step:
        if n_below + step <= len(ordered_T) and quantile_is_above(float(ordered_T[n_below + step - 1])):
            n_below += step
        if n_above + step <= len(ordered_T) and quantile_is_below(float(ordered_T[-n_above - step])):
            n_above += step
        step >>= 1
    low = float(ordered_T[n_below - 1]) if n_below else -math.inf
    high = float(ordered_T[-n_above]) if n_above else math.inf
    return low, high


def _rejected(indicator_T: np.ndarray, mean: float, alpha: float) -> bool:
    """Return whether the hypothesis "the mean of the indicator is at most `mean`" is rejected."""
    wealth_T = log_wealth(indicator_T, mean, alpha, variance=mean * (1 - mean))
    return float(wealth_T.max(initial=0.0)) >= math.log(1 / alpha)
