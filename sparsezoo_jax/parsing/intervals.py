"""Accuracies with intervals, where examples come in groups: those of one victim are right or wrong together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """A share of examples, and its 95 % interval."""

    value: float
    low: float
    high: float
    groups: int
    """Groups that it is over."""


def share_of(right_N: np.ndarray, groups_N: np.ndarray, *, draws: int = 2000, seed: int = 0) -> Share:
    """The share of `right_N` and the percentiles 2.5 and 97.5 of its bootstrap over whole groups.

    Args:
      right_N: bool [N].
      groups_N: the group of each, any integers [N].
      draws: of as many groups, with replacement.
    """
    names, numbers_N = np.unique(groups_N, return_inverse=True)
    right_G = np.bincount(numbers_N, weights=right_N.astype(float))
    size_G = np.bincount(numbers_N)
    chosen_DG = np.random.default_rng(seed).integers(0, len(names), (draws, len(names)))
    shares_D = right_G[chosen_DG].sum(1) / size_G[chosen_DG].sum(1)
    low, high = np.percentile(shares_D, [2.5, 97.5])
    return Share(float(np.mean(right_N)), float(low), float(high), len(names))
