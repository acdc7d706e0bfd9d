"""Shares of channels by map: TEAL's greedy allocation within each layer (arXiv 2408.14690, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.contract import MapSize
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
    weights: Mapping[str, float],
    target: float,
    step: float,
    error: Callable[[dict[str, float]], float],
    unread: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Shares of a layer's maps by which a token needs `target` less of their weights.

    Each starts at what is not read anyway. In each step every map is tried `step / size` further, and the one with the
    least error stays so. No share exceeds 1, and the last step is as long as is left.

    Args:
      weights: size of each map.
      target: of what is read of all, in [0, 1).
      step: for a map of size 1.
      error: of a layer with these shares.
      unread: shares of maps that are not read without masks either; 0 where it has none.
    """
    shares = {name: unread.get(name, 0.0) for name in weights}
    total = sum(size * (1 - shares[name]) for name, size in weights.items())
    left = target * total
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


def masked_maps(block: Block, d_model: int) -> dict[str, MapSize]:
    """The maps that a sparsified layer masks."""
    found: dict[str, MapSize] = {}
    for sublayer in ("attention", "ffn"):
        masks = getattr(getattr(block, sublayer), "masks", None)
        if isinstance(masks, Masks):
            maps = getattr(block.spec, sublayer).of.linear_maps(d_model)
            found |= {name: maps[name] for name in masks.names}
    return found


def sizes_of(maps: Mapping[str, MapSize], d_model: int) -> tuple[dict[str, float], dict[str, float]]:
    """Weights of each map, as multiples of d_model^2, and the share of its channels that is not read anyway.

    What a layer is sparse in by itself (Spark's neurons) saves nothing where it is left out once more.
    """
    sizes = {name: map.channels * map.weights / d_model**2 for name, map in maps.items()}
    return sizes, {name: 1 - map.read / map.channels for name, map in maps.items()}


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
      target: the share of what is read of each layer's weights.
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

        maps = masked_maps(block, model.config.d_model)
        sizes, unread = sizes_of(maps, model.config.d_model)
        shares = greedy_shares(sizes, target, config.step, error, unread)
        return outputs, {name: np.asarray(share) for name, share in shares.items()}

    layers = layer_by_layer(model, batches, visit, stage)
    found = {name: np.full(model.config.layers, math.nan) for name in calibration.maps}
    for layer, shares in enumerate(layers):
        for name, share in shares.items():
            found[name][layer] = float(share)
    return found
