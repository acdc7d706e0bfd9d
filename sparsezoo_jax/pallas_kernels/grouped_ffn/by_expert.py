"""Expert feed-forward over tokens sorted by expert: each expert sees its own tokens, none is dropped.

Shapes: N tokens, k experts of a token, A = N k assignments, D model width, E experts, W width of one expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.grouped_ffn.reference import Activation, count_nonzero
from sparsezoo_jax.pallas_kernels.ragged import ragged_matmul
from sparsezoo_jax.pallas_kernels.tiles import TILE, Tiles, rows, tiled

Experts = tuple[jax.Array, jax.Array, jax.Array | None]
"""Up [E, D, W], down [E, W, D] and, for gated experts, gate [E, D, W]."""


def ragged(
    x_ND: jax.Array,
    experts_NK: jax.Array,
    weights_NK: jax.Array,
    up_EDW: jax.Array,
    down_EWD: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
) -> tuple[jax.Array, jax.Array]:
    """Sort the assignments by expert, multiply by `ragged_matmul`, put the rows back and add them up.

    Returns the sums [N, D] and the number of non-zero hidden units of each assignment, float32 [N, k].
    """
    k = experts_NK.shape[1]
    order_A = jnp.argsort(experts_NK.reshape(-1), stable=True)
    sizes_E = jnp.bincount(experts_NK.reshape(-1), length=up_EDW.shape[0])
    x_AD = x_ND[order_A // k]
    hidden_AW = ragged_matmul(x_AD, up_EDW, sizes_E)
    if gate_EDW is None:
        hidden_AW = activation(hidden_AW)
    else:
        hidden_AW = activation(ragged_matmul(x_AD, gate_EDW, sizes_E)) * hidden_AW
    back_A = jnp.argsort(order_A)
    active_NK = count_nonzero(hidden_AW)[back_A].reshape(-1, k)
    hidden_AW = hidden_AW * weights_NK.reshape(-1)[order_A][:, None].astype(hidden_AW.dtype)
    y_AD = ragged_matmul(hidden_AW, down_EWD, sizes_E)
    return jnp.sum(y_AD[back_A].reshape(-1, k, x_ND.shape[1]), axis=1), active_NK


def _expert(
    activation: Activation, x_TD: jax.Array, weights_T: jax.Array, up_DW, down_WD, gate_DW: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    hidden_TW = x_TD @ up_DW
    hidden_TW = activation(hidden_TW) if gate_DW is None else activation(x_TD @ gate_DW) * hidden_TW
    return (hidden_TW * weights_T[:, None].astype(hidden_TW.dtype)) @ down_WD, count_nonzero(hidden_TW)


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
    activation: Activation,
    tile: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sort the assignments into tiles of one expert each and loop over the tiles that are in use.

    Returns the sums [N, D] and the number of non-zero hidden units of each assignment, float32 [N, k].

    The backward pass is a second such loop that computes the hidden layer of each tile again: a loop of so many rounds
    as the routing asks for has no derivative of its own. Gathers, not scatters, carry rows there and back.
    """
    # No expert gets more rows than there are tokens: few tokens, as in decoding, don't fill up a whole tile.
    tile = min(TILE, x_ND.shape[0]) if tile is None else tile
    result: Any = _loop(x_ND, weights_NK, (up_EDW, down_EWD, gate_EDW), experts_NK, activation, tile)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loop(x_ND, weights_NK, weights: Experts, experts_NK, activation: Activation, tile: int):
    return _loop_forward(x_ND, weights_NK, weights, experts_NK, activation, tile)[0]


def _loop_forward(x_ND, weights_NK, weights: Experts, experts_NK, activation: Activation, tile: int):
    tiles = tiled(experts_NK, weights[0].shape[0], tile)
    x_SD, weights_S = x_ND[tiles.token_S], _weights_of(tiles, weights_NK)

    def body(i, carry):
        y_SD, active_S = carry
        own = jax.tree.map(lambda w: w[tiles.expert_M[i]], weights)
        y, active = _expert(activation, rows(x_SD, i, tile), rows(weights_S, i, tile), *own)
        return (
            jax.lax.dynamic_update_slice_in_dim(y_SD, y, i * tile, axis=0),
            jax.lax.dynamic_update_slice_in_dim(active_S, active, i * tile, axis=0),
        )

    start = (jnp.zeros_like(x_SD), jnp.zeros(tiles.token_S.shape, jnp.float32))
    y_SD, active_S = jax.lax.fori_loop(0, tiles.count, body, start)
    result = jnp.sum(y_SD[tiles.slot_NK], axis=1), active_S[tiles.slot_NK]
    return result, (x_ND, weights_NK, weights, tiles)


def _loop_backward(activation: Activation, tile: int, residuals, cotangents):
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
        _, pullback, _ = jax.vjp(partial(_expert, activation), *given, *own, has_aux=True)
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
