"""Names of the arrays that rematerialisation may keep for the backward pass (`jax.ad_checkpoint.checkpoint_name`).

A checkpoint policy sees no matrix product inside a `jax.custom_vjp` or a kernel, so results carry names, given to them
after the call or among the residuals of its forward rule. `DecoderConfig.remat` chooses among these.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"
"""What attention mixed for each query, before the output projection, and statistics of its rows that the backward pass
needs: without both the forward kernel runs again."""
PRODUCT = "product"
"""A product of activations with a weight matrix: attention's projections, feed-forward maps, routers, fusions. Of forms
that compute their hidden units again by themselves (experts sorted by group), the result only."""
STATISTICS = "statistics"
"""Two numbers a row, mean and deviation of a feed-forward network's scores: without them the backward pass reads all
scores once more."""


def product(y: jax.Array) -> jax.Array:
    """`y`, which a checkpoint policy then knows as the product of a weight matrix."""
    return checkpoint_name(y, PRODUCT)
