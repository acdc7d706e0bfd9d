"""95 % intervals of scores: of shares of windows by Wilson's formula, of means over features by the bootstrap.

Both stay within [0, 1], where a normal interval of scores near 1 does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Quantile of the normal distribution that 95 % lie within on both sides."""
RESAMPLES = 10_000


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval of a share of which `right` of `count` > 0 were seen (Wilson, 1927)."""
    share, z2 = right / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def balanced(right: Sequence[int], counts: Sequence[int]) -> tuple[float, float]:
    """The interval of the mean of independent shares, from Wilson's of each (Newcombe's square-and-add, 1998)."""
    shares = [r / n for r, n in zip(right, counts, strict=True)]
    bounds = [wilson(r, n) for r, n in zip(right, counts, strict=True)]
    mean = sum(shares) / len(shares)
    below = math.sqrt(sum((share - low) ** 2 for share, (low, _) in zip(shares, bounds, strict=True)))
    above = math.sqrt(sum((high - share) ** 2 for share, (_, high) in zip(shares, bounds, strict=True)))
    return max(mean - below / len(shares), 0.0), min(mean + above / len(shares), 1.0)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of `values` if as many were drawn again: percentiles of resampled means."""
    found = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.percentile(found[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
