"""Assignments of tokens to groups (experts, blocks of weights), sorted into tiles of one group each.

Shapes: N tokens, K groups of a token, A = N K assignments, E groups, M tiles, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 256
"""Rows of a tile, at most: the fastest of 64, 128 and 256 on a CPU (docs/moe.md)."""


class Tiles(NamedTuple):
    """Assignments of tokens to groups, laid out in tiles of equal height that each belong to one group.

    A slot is a row of a tile. The last tile of a group may have empty slots, and tiles from `count` on are not used.
    """

    count: jax.Array
    """How many tiles are in use; these come first."""
    expert_M: jax.Array
    """The group that each tile belongs to."""
    token_S: jax.Array
    """The token in each slot; 0 where the slot is empty."""
    filled_S: jax.Array
    """True where a slot holds an assignment."""
    slot_NK: jax.Array
    """The slot of each assignment, by token and place among its groups."""


def tiled(experts_NK: jax.Array, count: int, tile: int) -> Tiles:
    """Lay out the assignments of tokens to groups [N, K], numbers in [0, count), in tiles of `tile` rows."""
    tokens, k = experts_NK.shape
    total = tokens * k
    # The slots that a group leaves empty are fewer than one tile has.
    most = -(-total // tile) + min(count, total)
    flat_A = experts_NK.reshape(-1)
    sizes_E = jnp.bincount(flat_A, length=count)
    tiles_E = -(-sizes_E // tile)
    end_E = jnp.cumsum(tiles_E)
    order_A = jnp.argsort(flat_A, stable=True)
    sorted_A = flat_A[order_A]
    within_A = jnp.arange(total) - (jnp.cumsum(sizes_E) - sizes_E)[sorted_A]
    place_A = (end_E - tiles_E)[sorted_A] * tile + within_A
    slots = most * tile
    return Tiles(
        count=end_E[-1],
        expert_M=jnp.minimum(jnp.searchsorted(end_E, jnp.arange(most), side="right"), count - 1),
        token_S=jnp.zeros((slots,), jnp.int32).at[place_A].set((order_A // k).astype(jnp.int32)),
        filled_S=jnp.zeros((slots,), bool).at[place_A].set(True),
        slot_NK=jnp.zeros((total,), jnp.int32).at[order_A].set(place_A.astype(jnp.int32)).reshape(tokens, k),
    )


def rows(array_S: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    """The rows of tile `i` of an array over slots."""
    return jax.lax.dynamic_slice_in_dim(array_S, i * tile, tile)
