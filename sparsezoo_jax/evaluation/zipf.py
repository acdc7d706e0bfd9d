"""The Zipf-Mandelbrot law of features' densities: how fast they fall from the most frequent feature to the rarest.

The densities of a trained autoencoder's features follow `A (r + q)^-s` over their ranks r, but for the rarest ones
(Ayonrinde, arXiv 2411.02124). Feature Choice shares its budget by such a law.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

LEAST = 10
"""Ranks without which nothing is fitted."""


@dataclasses.dataclass(frozen=True)
class ZipfFit:
    """`log density = log A - s log(r + q)` through the ranks 1, 2, ... of the features that fire, the densest first."""

    exponent: float
    """s."""
    offset: float
    """q, at least 0."""
    log_scale: float
    """log A; A itself has no bound where densities fall about exponentially, so that s and q are large."""
    r_squared: float
    """Share of the variance of the log densities that the law explains, over the fitted ranks."""
    ranks: int
    """Ranks that were fitted."""

    def __call__(self, rank: ArrayLike) -> np.ndarray:
        """Density at ranks, from 1, float64 of the same shape."""
        return np.exp(self.log_scale - self.exponent * np.log(np.asarray(rank, np.float64) + self.offset))


class _Line(NamedTuple):
    exponent: float
    intercept: float
    error: float
    """Mean squared."""


def zipf_fit(density: ArrayLike, *, share: float = 0.9) -> ZipfFit | None:
    """The law of least squares in log density through the densest features.

    Args:
      density: [F] share of the tokens for which each feature fired; those of 0 have no logarithm and are left out.
      share: of the features that fired, the densest first; the rarest lie below any law, and their densities are the
        least certain.

    Returns:
      The law, or None where fewer than `LEAST` features are left, or all have the same density.
    """
    density_F = np.sort(np.asarray(density, np.float64))[::-1]
    density_F = density_F[density_F > 0]
    log_R = np.log(density_F[: math.floor(share * len(density_F))])
    if len(log_R) < LEAST or np.ptp(log_R) == 0:
        return None
    ranks_R = np.arange(1, len(log_R) + 1)

    def line(offset: float) -> _Line:
        x_R = np.log(ranks_R + offset)
        x_R, y_R = x_R - x_R.mean(), log_R - log_R.mean()
        slope = float(x_R @ y_R / (x_R @ x_R))
        intercept = float(log_R.mean() - slope * np.log(ranks_R + offset).mean())
        return _Line(-slope, intercept, float(np.mean(np.square(y_R - slope * x_R))))

    # The offset has one minimum at most beside 0 in practice; a grid finds its place, a bracketed search its digits.
    grid = np.concatenate([[0.0], np.geomspace(1e-2, 10.0 * len(log_R), 60)])
    best = int(np.argmin([line(float(q)).error for q in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(lambda q: line(float(q)).error, bounds=(low, high), method="bounded")
    candidates: list[float] = [float(grid[best]), float(getattr(found, "x"))]  # noqa: B009
    offset = min(candidates, key=lambda q: line(q).error)
    law = line(offset)
    return ZipfFit(law.exponent, offset, law.intercept, 1 - law.error / float(np.var(log_R)), len(log_R))
