"""Shares of channels by map: TEAL's greedy allocation within each layer (arXiv 2408.14690, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.decoder import call_context
from sparsezoo_jax.models.layers import Block, Passed
from sparsezoo_jax.models.masks import Masks
from sparsezoo_jax.sparsification.calibration import Calibration
from sparsezoo_jax.sparsification.config import AllocationConfig
from sparsezoo_jax.sparsification.layers import Place, layer_by_layer
from sparsezoo_jax.sparsification.progress import Arrays, Stage


@partial(jax.jit, static_argnums=(0, 1))
def _output(
    config: DecoderConfig, graphdef: Any, state: Any, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
    ctx = call_context(config, batch["tokens"], batch["segment_ids"], batch["positions"])
    return nnx.merge(graphdef, state)(Passed(x_BTD), ctx, None)[0].x


@partial(jax.jit, static_argnums=0)
def _distance(last: float, dense_BTD: jax.Array, sparse_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Norms over the last tokens of each sequence of what changed, summed over sequences and dimensions."""
    length = segments_BT.shape[1]
    counted_BT1 = ((segments_BT > 0) & (jnp.arange(length) >= length - max(round(last * length), 1)))[..., None]
    change_BTD = jnp.where(counted_BT1, dense_BTD.astype(jnp.float32) - sparse_BTD.astype(jnp.float32), 0)
    return jnp.sum(jnp.linalg.norm(change_BTD, axis=1))


def greedy_shares(
    weights: Mapping[str, float], target: float, step: float, error: Callable[[dict[str, float]], float]
) -> dict[str, float]:
    """Shares of a layer's maps whose mean, weighted by the maps' sizes, is `target`.

    All start at 0. In each step every map is tried `step / size` further, and the one with the least error stays so.
    No share exceeds 1, and the last step is as long as is left.

    Args:
      weights: size of each map.
      target: of the whole, in [0, 1).
      step: for a map of size 1.
      error: of a layer with these shares.
    """
    shares = dict.fromkeys(weights, 0.0)
    total, left = sum(weights.values()), target * sum(weights.values())
    while left > 1e-9 * total:
        tried = {}
        for name, size in weights.items():
            further = min(step / size, 1 - shares[name], left / size)
            if further > 1e-9:
                tried[name] = {**shares, name: shares[name] + further}
        best = min(tried, key=lambda name: error(tried[name]))
        left -= (tried[best][best] - shares[best]) * weights[best]
        shares = tried[best]
    return shares


def map_sizes(block: Block, d_model: int) -> dict[str, float]:
    """Weights of each map that a sparsified layer masks, as multiples of d_model^2."""
    sizes: dict[str, float] = {}
    for sublayer in ("attention", "ffn"):
        masks = getattr(getattr(block, sublayer), "masks", None)
        if isinstance(masks, Masks):
            maps = getattr(block.spec, sublayer).of.linear_maps(d_model)
            sizes |= {name: maps[name].channels * maps[name].weights / d_model**2 for name in masks.names}
    return sizes


def set_cuts(block: Block, cuts: Mapping[str, float]) -> None:
    """Set the cuts of one sparsified layer."""
    for part in (block.attention, block.ffn):
        masks = getattr(part, "masks", None)
        if isinstance(masks, Masks):
            masks.cut_P[...] = jnp.asarray([cuts[name] for name in masks.names], jnp.float32)


def greedy(
    model: Decoder,
    calibration: Calibration,
    batches: Iterable[Mapping[str, Any]],
    target: float,
    config: AllocationConfig,
    threshold: Callable[[np.ndarray, float], float] | None,
    stage: Stage | None = None,
) -> dict[str, np.ndarray]:
    """Shares of the channels that maps leave out, by map [L]; NaN where a layer does not have the map.

    Each layer for itself: its output for what the dense layers below make is compared with its own dense one.

    Args:
      model: sparsified layers with cuts of 0.
      calibration: its histograms.
      batches: of the sequences that are looked at.
      target: the share of each layer's weights.
      config: step, and which tokens count.
      threshold: of a histogram and a share; None: the shares are what cuts are (top_k).
      stage: where what is found is kept (`layers.layer_by_layer`).
    """

    def visit(
        place: Place, block: Block, streams: list[jax.Array], held: list[dict[str, jax.Array]]
    ) -> tuple[list[jax.Array], Arrays]:
        graphdef, state = nnx.split(block)
        outputs = []
        for x_BTD, batch in zip(streams, held, strict=True):
            outputs.append(jax.block_until_ready(_output(model.config, graphdef, state, x_BTD, batch)))
        counts = {
            name: map.counts[map.layers.index(place.layer)]
            for name, map in calibration.maps.items()
            if place.layer in map.layers
        }

        def error(shares: dict[str, float]) -> float:
            cuts = shares if threshold is None else {name: threshold(counts[name], s) for name, s in shares.items()}
            set_cuts(block, cuts)
            graphdef, state = nnx.split(block)
            distance = 0.0
            for x_BTD, dense_BTD, batch in zip(streams, outputs, held, strict=True):
                sparse_BTD = _output(model.config, graphdef, state, x_BTD, batch)
                distance += float(_distance(config.last, dense_BTD, sparse_BTD, batch["segment_ids"]))
            return distance

        shares = greedy_shares(map_sizes(block, model.config.d_model), target, config.step, error)
        return outputs, {name: np.asarray(share) for name, share in shares.items()}

    layers = layer_by_layer(model, batches, visit, stage)
    found = {name: np.full(model.config.layers, math.nan) for name in calibration.maps}
    for layer, shares in enumerate(layers):
        for name, share in shares.items():
            found[name][layer] = float(share)
    return found
