"""The backward pass of a sparse feed-forward layer from the few hidden units that are not 0.

Of each token the forward pass stores up to `Storage.neurons` numbers of active neurons with the one or two scores that
make their hidden unit. Tokens with more of them, the first ones of a sequence above all, are stored whole, up to
`Storage.tokens` of a sequence. If even that is too little, anywhere, the backward pass computes the scores of all
tokens again: a step is then slower, never wrong. Either way it continues with the scores as dense arrays, whose entries
are those of the dense form wherever a gradient depends on them, and so gets the dense form's gradients, bit for bit.

Shapes: B batch, T tokens, S shards of the neurons, N neurons of a shard, W numbers stored of a token and shard, R
tokens of a sequence that are stored whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP
from sparsezoo_jax.sharding import num_shards

Parts = tuple[jax.Array, ...]


class Storage(NamedTuple):
    """How much there is room for."""

    neurons: int
    """Active neurons of a token, W."""
    tokens: float
    """Share of the tokens of a sequence that may be stored whole, from 0 to 1."""


class Stored(NamedTuple):
    """What the backward pass unpacks."""

    places: jax.Array
    """Numbers of active neurons within their shard, ascending, uint16 or int32 [B, T, S, W]; N where there is none."""
    values: Parts
    """Their scores, [B, T, S, W] each."""
    rows: jax.Array
    """Tokens that are stored whole, ascending, int32 [B, R]; T where there is none."""
    whole: Parts
    """Their scores, [B, R, F] each."""
    fits: jax.Array
    """Whether that is all, bool scalar."""


def rule(storage: Storage, scores: Callable[..., Parts], output: Callable[..., Any]) -> CustomVJP[Any]:
    """The layer made of `scores(x, gate, up)` and `output(scores, down, where)`, with what `storage` has room for."""

    def forward(x, gate, up, down, where):
        parts = scores(x, gate, up)
        # Named, so that rematerialisation that keeps products keeps these in the place of them.
        kept = jax.tree.map(product, pack(parts, storage))
        return output(parts, down, where)._replace(stored=kept.fits.astype(jnp.float32)), kept

    def backward(arrays, kept: Stored, cotangent):
        x, gate, up, down, where = arrays
        parts = jax.lax.cond(kept.fits, lambda: unpack(kept, up.shape[1]), lambda: scores(x, gate, up))
        _, to_parts = jax.vjp(lambda parts, down: output(parts, down, where)[:2], parts, down)
        d_parts, d_down = to_parts(cotangent[:2])
        _, to_inputs = jax.vjp(scores, x, gate, up)
        return *to_inputs(d_parts), d_down, None

    return CustomVJP(forward, backward)


def pack(parts: Parts, storage: Storage) -> Stored:
    """Store scores [B, T, F] of which the first part says, by being above 0, which neurons are active."""
    batch, length, neurons = parts[0].shape
    shards = num_shards("ffn", neurons)
    width = min(math.ceil(storage.neurons / shards), neurons // shards)
    split = tuple(part.reshape(batch, length, shards, neurons // shards) for part in parts)
    active = split[0] > 0
    places, overflows = _first_true(active, width)
    values = tuple(_taken(part, places) for part in split)
    room = math.ceil(storage.tokens * length)
    rows, too_many = _first_true(jnp.any(overflows, axis=-1), room)
    whole = tuple(jnp.take_along_axis(part, rows[..., None], axis=1, mode="fill", fill_value=0) for part in parts)
    small = jnp.uint16 if neurons // shards < 2**16 else jnp.int32
    return Stored(places.astype(small), values, rows, whole, ~jnp.any(too_many))


def unpack(kept: Stored, neurons: int) -> Parts:
    """Scores [B, T, F], those of inactive neurons 0 in tokens that are not stored whole."""
    batch, length, shards, width = kept.places.shape
    size = neurons // shards
    places = kept.places.astype(jnp.int32)
    # No two places are the same: the ones past the end, which are dropped, are told apart by their slot.
    places = jnp.where(places == size, size + jnp.arange(width), places)
    rows = jnp.where(kept.rows == length, length + jnp.arange(kept.rows.shape[1]), kept.rows)

    def put(into, where, values):
        return into.at[where].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

    of_neurons = jax.vmap(jax.vmap(jax.vmap(put)))
    parts = []
    for values, whole in zip(kept.values, kept.whole, strict=True):
        dense = of_neurons(jnp.zeros((batch, length, shards, size), values.dtype), places, values)
        parts.append(jax.vmap(put)(dense.reshape(batch, length, neurons), rows, whole))
    return tuple(parts)


def _first_true(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Places of the first `count` true entries along the last axis, N past the last one, and whether there are more.

    int32 [..., count] and bool [...] for x [..., N].
    """
    running = jnp.cumsum(x, axis=-1, dtype=jnp.int32)
    # The i-th true entry is where the running count reaches i + 1. A CPU finds it with the least work by bisection; on
    # other devices that would be a dozen programs one after the other.
    ranks = jnp.arange(1, count + 1, dtype=jnp.int32)

    def found(method: str) -> jax.Array:
        search = lambda row: jnp.searchsorted(row, ranks, method=method)  # noqa: E731
        return jax.vmap(search)(running.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], count)

    places = jax.lax.platform_dependent(cpu=lambda: found("scan"), default=lambda: found("compare_all"))
    return places, running[..., -1] > count


def _taken(x: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, places, axis=-1, mode="fill", fill_value=0)
