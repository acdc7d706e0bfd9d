"""Group bias adaptation (arXiv 2506.14002): biases that move until features fire as often as their group should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def target_frequencies(groups: int, highest: float, lowest: float) -> np.ndarray:
    """Target activation frequencies of the groups, falling geometrically from `highest` to `lowest`; float64."""
    return np.geomspace(highest, lowest, groups)


def assign_groups(features: int, groups: int, seed: int) -> np.ndarray:
    """The group of each feature, int [F]: groups of equal size, or one more, drawn once."""
    return np.random.default_rng(seed).permutation(np.arange(features) * groups // features)


def adapted_biases(
    bias_F: jax.Array,
    frequency_F: jax.Array,
    largest_F: jax.Array,
    group_F: jax.Array,
    target_G: jax.Array,
    *,
    decrease: float = 0.01,
    increase: float = 0.01,
    silent: float = 1e-6,
) -> jax.Array:
    """Biases after one adaptation, in [-1, 0].

    A feature that fires more often than its group's target gets `b - decrease * r`, at least -1, one that never fires
    `b + increase * R`, at most 0; the others keep theirs.

    Args:
      bias_F: the biases.
      frequency_F: share of the samples for which each feature fired (pre-activation above 0).
      largest_F: r, the largest pre-activation of each, at least 0.
      group_F: group of each feature.
      target_G: target frequency of each group.
      silent: frequency below which a feature never fires.

    Source: arXiv 2506.14002, algorithm 1, with the bounds that keep b in [-1, 0]. R is the mean of r over those of the
    group's features with r > 0, and 0 without any.
    """
    groups = target_G.shape[0]
    live_F = largest_F > 0
    total_G = jnp.zeros(groups).at[group_F].add(jnp.where(live_F, largest_F, 0))
    count_G = jnp.zeros(groups).at[group_F].add(live_F.astype(jnp.float32))
    mean_G = total_G / jnp.maximum(count_G, 1)
    lower_F = jnp.maximum(bias_F - decrease * largest_F, -1)
    higher_F = jnp.minimum(bias_F + increase * mean_G[group_F], 0)
    too_often_F = frequency_F > target_G[group_F]
    return jnp.where(too_often_F, lower_F, jnp.where(frequency_F < silent, higher_F, bias_F))
