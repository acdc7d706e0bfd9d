"""Expert feed-forward over tokens sorted by expert: each expert sees its own tokens, none is dropped.

Shapes: N tokens, k experts of a token, A = N k assignments, D model width, E experts, W width of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.grouped_ffn.channels import Masked, Reads, count_nonzero, unmasked
from sparsezoo_jax.pallas_kernels.grouped_ffn.reference import Activation, hidden_of
from sparsezoo_jax.pallas_kernels.ragged import ragged_matmul
from sparsezoo_jax.pallas_kernels.tiles import TILE, Tiles, rows, tiled

Experts = tuple[jax.Array, jax.Array, jax.Array | None, Mapping[str, Any]]
"""Up [E, D, W], down [E, W, D], for gated experts gate [E, D, W], and `Channels.of_maps`."""


def ragged(
    x_ND: jax.Array,
    experts_NK: jax.Array,
    weights_NK: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    of_maps: Mapping[str, Any],
    *,
    activation: Activation,
    masked: Masked = unmasked,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sort the assignments by expert, multiply by `ragged_matmul`, put the rows back and add them up.

    Returns the sums [N, D] and counts of each assignment by name, float32 [N, k]: "hidden", the units that are not 0,
    and what the maps of `of_maps` read.
    """
    k = experts_NK.shape[1]
    order_A = jnp.argsort(experts_NK.reshape(-1), stable=True)
    sizes_E = jnp.bincount(experts_NK.reshape(-1), length=up_EDW.shape[0])
    x_AD = x_ND[order_A // k]
    sorted_A = experts_NK.reshape(-1)[order_A]
    reads = Reads(masked, jax.tree.map(lambda own: own[sorted_A], dict(of_maps)))
    hidden_AW = hidden_of(x_AD, up_EDW, gate_EDW, activation, reads, lambda x, w: ragged_matmul(x, w, sizes_E))
    counts = {"hidden": count_nonzero(hidden_AW)}
    hidden_AW = reads("down", hidden_AW)
    back_A = jnp.argsort(order_A)
    counts = {name: count_A[back_A].reshape(-1, k) for name, count_A in (counts | reads.counts).items()}
    hidden_AW = hidden_AW * weights_NK.reshape(-1)[order_A][:, None].astype(hidden_AW.dtype)
    y_AD = ragged_matmul(hidden_AW, down_EWD, sizes_E)
    return jnp.sum(y_AD[back_A].reshape(-1, k, x_ND.shape[1]), axis=1), counts


def _expert(
    form: tuple[Activation, Masked],
    x_TD: jax.Array,
    weights_T: jax.Array,
    up_DW: jax.Array,
    down_WD: jax.Array,
    gate_DW: jax.Array | None,
    of_maps: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    activation, masked = form
    reads = Reads(masked, of_maps)
    hidden_TW = hidden_of(x_TD, up_DW, gate_DW, activation, reads)
    counts = {"hidden": count_nonzero(hidden_TW)}
    hidden_TW = reads("down", hidden_TW) * weights_T[:, None].astype(hidden_TW.dtype)
    return hidden_TW @ down_WD, counts | reads.counts


def _weights_of(tiles: Tiles, weights_NK: jax.Array) -> jax.Array:
    empty = jnp.zeros(tiles.token_S.shape, weights_NK.dtype)
    return empty.at[tiles.slot_NK.reshape(-1)].set(weights_NK.reshape(-1))


def loop(
    x_ND: jax.Array,
    experts_NK: jax.Array,
    weights_NK: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    of_maps: Mapping[str, Any],
    *,
    activation: Activation,
    masked: Masked = unmasked,
    tile: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sort the assignments into tiles of one expert each and loop over the tiles that are in use.

    Returns the sums [N, D] and counts as of `ragged`.

    The backward pass is a second such loop that computes the hidden layer of each tile again: a loop of so many rounds
    as the routing asks for has no derivative of its own. Gathers, not scatters, carry rows there and back.
    """
    # No expert gets more rows than there are tokens: few tokens, as in decoding, don't fill up a whole tile.
    tile = min(TILE, x_ND.shape[0]) if tile is None else tile
    maps = (up_EDW, down_EWD, gate_EDW, dict(of_maps))
    result: Any = _loop(x_ND, weights_NK, maps, experts_NK, (activation, masked), tile)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loop(x_ND, weights_NK, weights: Experts, experts_NK, form: tuple[Activation, Masked], tile: int):
    return _loop_forward(x_ND, weights_NK, weights, experts_NK, form, tile)[0]


def _loop_forward(x_ND, weights_NK, weights: Experts, experts_NK, form: tuple[Activation, Masked], tile: int):
    tiles = tiled(experts_NK, weights[0].shape[0], tile)
    x_SD, weights_S = x_ND[tiles.token_S], _weights_of(tiles, weights_NK)

    def body(i, carry):
        y_SD, counts_S = carry
        own = jax.tree.map(lambda w: w[tiles.expert_M[i]], weights)
        y, counts = _expert(form, rows(x_SD, i, tile), rows(weights_S, i, tile), *own)

        def put(all_S: jax.Array, own_T: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(all_S, own_T, i * tile, axis=0)

        return put(y_SD, y), jax.tree.map(put, counts_S, counts)

    counts_S = {name: jnp.zeros(tiles.token_S.shape, jnp.float32) for name in ("hidden", *weights[3])}
    y_SD, counts_S = jax.lax.fori_loop(0, tiles.count, body, (jnp.zeros_like(x_SD), counts_S))
    result = jnp.sum(y_SD[tiles.slot_NK], axis=1), {name: count_S[tiles.slot_NK] for name, count_S in counts_S.items()}
    return result, (x_ND, weights_NK, weights, tiles)


def _loop_backward(form: tuple[Activation, Masked], tile: int, residuals, cotangents):
    g_ND, _ = cotangents  # counts have no gradient
    x_ND, weights_NK, weights, tiles = residuals
    x_SD, weights_S = x_ND[tiles.token_S], _weights_of(tiles, weights_NK)
    # Slots without a token have weight 0, but their own weight's gradient would not be 0.
    g_SD = jnp.where(tiles.filled_S[:, None], g_ND[tiles.token_S], 0)

    def body(i, carry):
        dx_SD, dweights_S, sums = carry
        expert = tiles.expert_M[i]
        own = jax.tree.map(lambda w: w[expert], weights)
        given = (rows(x_SD, i, tile), rows(weights_S, i, tile))
        _, pullback, _ = jax.vjp(partial(_expert, form), *given, *own, has_aux=True)
        dx, dweight, *dexpert = pullback(rows(g_SD, i, tile))
        return (
            jax.lax.dynamic_update_slice_in_dim(dx_SD, dx, i * tile, axis=0),
            jax.lax.dynamic_update_slice_in_dim(dweights_S, dweight, i * tile, axis=0),
            jax.tree.map(lambda total, d: total.at[expert].add(d.astype(total.dtype)), sums, tuple(dexpert)),
        )

    # Sums over many tiles are float32 at least, also for bfloat16 parameters.
    sums = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), weights)
    start = (jnp.zeros_like(x_SD), jnp.zeros_like(weights_S), sums)
    dx_SD, dweights_S, sums = jax.lax.fori_loop(0, tiles.count, body, start)
    dx_ND = jnp.sum(dx_SD[tiles.slot_NK], axis=1).astype(x_ND.dtype)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), sums, weights)
    return dx_ND, dweights_S[tiles.slot_NK].astype(weights_NK.dtype), dweights, None


_loop.defvjp(_loop_forward, _loop_backward)
