"""Expert feed-forward by the native library: what each token chose stays in the order of the tokens.

Shapes: N tokens, k experts of a token, A = N k assignments, D model width, E experts, W width of one expert. Float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.grouped_ffn.channels import Masked, Reads, count_nonzero, unmasked
from sparsezoo_jax.pallas_kernels.grouped_ffn.reference import Activation, hidden_of
from sparsezoo_jax.pallas_kernels.ragged.chosen import products_by_expert, sum_of_experts


def unsorted(
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
    """As `by_expert.ragged`, without sorting: rows are gathered and added up within the products."""
    k, experts_NK = experts_NK.shape[1], experts_NK.astype(jnp.int32)
    experts_A1 = experts_NK.reshape(-1, 1)
    reads = Reads(masked, jax.tree.map(lambda own: own[experts_A1[:, 0]], dict(of_maps)))

    def multiply(x: jax.Array, w_EDW: jax.Array) -> jax.Array:
        return products_by_expert(x, experts_NK if x is x_ND else experts_A1, w_EDW)

    # With masks every assignment reads something else of its token.
    x = jnp.repeat(x_ND, k, axis=0) if {"up", "gate"} & set(of_maps) else x_ND
    hidden_AW = hidden_of(x, up_EDW, gate_EDW, activation, reads, multiply)
    counts = {"hidden": count_nonzero(hidden_AW)}
    hidden_AW = reads("down", hidden_AW) * weights_NK.reshape(-1, 1).astype(hidden_AW.dtype)
    y_ND = sum_of_experts(hidden_AW, experts_NK, down_EWD)
    return y_ND, {name: count_A.reshape(-1, k) for name, count_A in (counts | reads.counts).items()}
