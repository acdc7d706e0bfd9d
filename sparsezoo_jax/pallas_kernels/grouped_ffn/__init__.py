"""The feed-forward layer of a mixture of experts, without capacity: no token is ever dropped."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import Implementation, dispatch
from sparsezoo_jax.pallas_kernels.grouped_ffn import by_expert, reference
from sparsezoo_jax.pallas_kernels.grouped_ffn.reference import Activation, hidden_units, pre_activations, spread
from sparsezoo_jax.sharding import shard_map, sum_shards

Dispatch = Literal["dense", "ragged", "loop"]

__all__ = ["Dispatch", "grouped_ffn", "hidden_units", "pre_activations", "spread", "weighted_ffn"]


def grouped_ffn(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    *,
    activation: Activation = jax.nn.silu,
    return_active: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`sum_j weights[..., j] * down_e act(up_e x)` with e = experts[..., j]; differentiable but for `experts`.

    With `gate`, `act(gate_e x) * (up_e x)` takes the place of `act(up_e x)`.

    Args:
      x: [..., D], usually [B, T, D].
      experts: int [..., k], the experts of each token, in [0, E).
      weights: [..., k], their weights.
      up: [E, D, W].
      down: [E, W, D].
      gate: [E, D, W], or None for experts without a gate.
      activation: pointwise.
      return_active: also return how many hidden units of each chosen expert are not 0.
      implementation: "dense" computes every expert for every token and is the definition; "ragged" sorts the tokens by
        expert and multiplies by `jax.lax.ragged_dot`; "loop" sorts them into tiles of one expert and loops over these.
        None: "loop" where the program is lowered for a CPU, "ragged" elsewhere, both computing the hidden layer again
        in the backward pass. On a mesh the sorting two sort each device's tokens by themselves; each device has all
        experts, but of W only its part where the mesh splits FFN neurons, and the parts of the sum are added up.

    Returns:
      [..., D] in the dtype of x, or that and float32 [..., k].

    Raises:
      ConfigError: shapes that don't fit each other, or no such implementation.

    Source: dropless experts as in MegaBlocks (arXiv 2211.15841).
    """
    _check(x, up, down, gate)
    require(
        experts.shape == weights.shape and experts.shape[:-1] == x.shape[:-1],
        "grouped_ffn.experts",
        experts.shape,
        f"must be that of weights {weights.shape}, and but for its end that of x {x.shape}",
    )
    implementations = [
        Implementation("dense", partial(reference.grouped_ffn, activation=activation), default=False),
        Implementation("ragged", partial(by_expert.ragged, activation=activation)),
        Implementation("loop", partial(by_expert.loop, activation=activation), "cpu"),
    ]
    # The hidden units are the largest arrays of the layer: a choice between two must not keep those of both.
    apply = dispatch("grouped_ffn", implementation, implementations, recompute=True)
    if implementation == "dense":
        y, active = apply(x, experts, weights, up, down, gate)
        return (y, active) if return_active else y

    def on_shards(x, experts, weights, up, down, *rest):
        *gates, split = rest
        k, d = experts.shape[-1], x.shape[-1]
        parts = apply(x.reshape(-1, d), experts.reshape(-1, k), weights.reshape(-1, k), up, down, *(gates or [None]))
        total: Any = sum_shards(parts, split["ffn"])
        y, active = total
        return y.reshape(x.shape), active.reshape(experts.shape)

    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), None)
    arrays = [x, experts, weights, up, down, *([] if gate is None else [gate])]
    columns, rows = (None, None, "ffn"), (None, "ffn", None)
    maps = [columns, rows, *([] if gate is None else [columns])]
    y, active = shard_map(on_shards, arrays, [*[names] * 3, *maps], (names, names))
    y = product(y)
    return (y, active) if return_active else y


def weighted_ffn(
    x: jax.Array,
    weights: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    *,
    activation: Activation = jax.nn.silu,
) -> jax.Array:
    """`sum_e weights[..., e] * down_e act(up_e x)`: any number of experts a token, those of weight 0 computed too.

    The form for routers whose number of experts differs from token to token. Arguments as in `grouped_ffn`, but for
    `weights` [..., E].

    Raises:
      ConfigError: shapes that don't fit each other.
    """
    _check(x, up, down, gate)
    expected = (*x.shape[:-1], up.shape[0])
    require(weights.shape == expected, "weighted_ffn.weights", weights.shape, f"must be {expected}")
    return reference.weighted_ffn(x, weights, up, down, gate, activation)


def _check(x: jax.Array, up: jax.Array, down: jax.Array, gate: jax.Array | None) -> None:
    count, d, width = up.shape
    require(x.shape[-1] == d, "grouped_ffn.up", up.shape, f"must have {x.shape[-1]} as its second size, for x")
    require(down.shape == (count, width, d), "grouped_ffn.down", down.shape, f"must be {(count, width, d)} for up")
    require(
        gate is None or gate.shape == up.shape,
        "grouped_ffn.gate",
        None if gate is None else gate.shape,
        f"must be {up.shape}",
    )
