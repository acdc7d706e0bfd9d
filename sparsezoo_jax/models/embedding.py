"""The token embedding and the output projection: lookups of rows, logits, and both tables gathered for them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.models.contract import Head
from sparsezoo_jax.sharding import constrain, shard_map, sum_shards


class Tables(NamedTuple):
    """Copies of the tables for the devices that have tokens of their own; see `sharding.gather_copies`."""

    embedding: jax.Array
    """[n, V, D]."""
    output: jax.Array | None
    """[n, D, V]; None: the embedding, tied."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, rows: str = "words") -> jax.Array:
    """Rows [B, T, D] of a table [V, D] in `dtype`; their gradient is summed in the table's own precision.

    `rows` is the logical name of the table's first axis.

    The width of a table that is split over devices is gathered first, in `dtype`. Looking up pieces of rows would
    leave activations that are split by width, and the compiler knows no better way from there to activations split by
    batch than to collect them whole.
    """
    return constrain(table_VD.astype(dtype), (rows, None))[tokens_BT]


def _forward(table_VD, tokens_BT, dtype, rows):
    # An empty array carries the table's type; its height and width are those of the gradient.
    return lookup(table_VD, tokens_BT, dtype, rows), (tokens_BT, table_VD[:0], table_VD.shape[0])


def _backward(dtype, rows, residuals, g_BTD):
    tokens_BT, empty, height = residuals
    zeros = constrain(jnp.zeros((height, empty.shape[1]), empty.dtype), (rows, None))
    return zeros.at[tokens_BT].add(g_BTD.astype(empty.dtype)), None


lookup.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup_and_pass(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> Any:
    """`lookup`, and the table for its other uses, onto whose gradient that of the rows is added in place."""
    return table_VD.astype(dtype)[tokens_BT], table_VD


def _pass_forward(table_VD, tokens_BT, dtype):
    return _lookup_and_pass(table_VD, tokens_BT, dtype), tokens_BT


def _pass_backward(dtype, tokens_BT, cotangents):
    g_BTD, g_VD = cotangents
    return g_VD.at[tokens_BT].add(g_BTD.astype(g_VD.dtype)), None


_lookup_and_pass.defvjp(_pass_forward, _pass_backward)


def lookup_in_copies(tables: Tables, tokens_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, Tables]:
    """Rows [B, T, D] of each device's tokens in its own copy, and the tables as logits are to use them.

    So a tied table has one gradient, which lookups and logits share, before devices sum it.
    """

    def on_shards(copy_1VD: jax.Array, tokens_BT: jax.Array, split: dict[str, tuple[str, ...]]) -> Any:
        if not split["words"]:
            found: Any = _lookup_and_pass(copy_1VD[0], tokens_BT, dtype)
            return found[0], found[1][None]
        # Of the devices that split the rows, one has a token's row; the others add 0.
        places_BT = tokens_BT - jax.lax.axis_index(split["words"]) * copy_1VD.shape[1]
        own_BT = (places_BT >= 0) & (places_BT < copy_1VD.shape[1])
        found = _lookup_and_pass(copy_1VD[0], jnp.where(own_BT, places_BT, 0), dtype)
        return sum_shards(jnp.where(own_BT[..., None], found[0], 0), split["words"]), found[1][None]

    names, copies = ("batch", "length"), ("copies", "words", None)
    x_BTD, embedding = shard_map(on_shards, [tables.embedding, tokens_BT], [copies, names], ((*names, None), copies))
    return x_BTD, tables._replace(embedding=embedding)


def project_on_copies(tables: Tables, hidden_BTD: jax.Array, head: Head) -> jax.Array:
    """Logits [B, T, V], float32, of each device's states by its own copy of the output projection."""
    tied = tables.output is None
    copies = tables.embedding if tables.output is None else tables.output

    def on_shards(hidden_BTD: jax.Array, copy: jax.Array, split: dict[str, tuple[str, ...]]) -> jax.Array:
        weight = copy[0].astype(hidden_BTD.dtype)
        return head.project(hidden_BTD, weight.T if tied else weight, jnp.dtype(jnp.float32))

    hidden, logits = ("batch", "length", None), ("batch", "length", "words")
    names = ("copies", "words", None) if tied else ("copies", None, "words")
    return shard_map(on_shards, [hidden_BTD, copies], [hidden, names], logits)
