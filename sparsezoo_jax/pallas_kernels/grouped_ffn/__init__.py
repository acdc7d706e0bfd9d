"""The feed-forward layer of a mixture of experts, without capacity: no token is ever dropped."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import Implementation, dispatch
from sparsezoo_jax.pallas_kernels.grouped_ffn import by_expert, reference
from sparsezoo_jax.pallas_kernels.grouped_ffn.exchange import exchanged, sends_fewer_bytes
from sparsezoo_jax.pallas_kernels.grouped_ffn.reference import Activation, hidden_units, pre_activations, spread
from sparsezoo_jax.sharding import num_shards, shard_map, sum_shards

Dispatch = Literal["dense", "ragged", "loop"]
Moved = Literal["weights", "tokens"]

__all__ = [
    "Dispatch",
    "Moved",
    "grouped_ffn",
    "hidden_units",
    "move_and_why",
    "pre_activations",
    "spread",
    "weighted_ffn",
]


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
    moved: Moved | None = None,
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
        expert and multiplies by `ragged_matmul`; "loop" sorts them into tiles of one expert and loops over these.
        None: "loop" where the program is lowered for a CPU, "ragged" elsewhere, both computing the hidden layer again
        in the backward pass. On a mesh the sorting two sort each device's tokens by themselves. Each device has of W
        only its part where the mesh splits FFN neurons, and the parts of the sum are added up.
      moved: what devices that split the experts send each other, for the sorting two: "weights" gathers all experts to
        each device's tokens; "tokens" sends these to their experts' devices and back (`exchange.exchanged`). None:
        whichever are fewer bytes (`exchange.sends_fewer_bytes`).

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

    moved = chosen_move(x.shape, experts.shape[-1], up.shape, 2 if gate is None else 3)[0] if moved is None else moved
    # Without devices that split the experts there is nothing to send.
    sends = moved == "tokens" and num_shards("experts", up.shape[0]) > 1

    def on_shards(x, experts, weights, up, down, *rest):
        *gates, split = rest
        k, d = experts.shape[-1], x.shape[-1]
        tokens, maps = (
            (x.reshape(-1, d), experts.reshape(-1, k), weights.reshape(-1, k)),
            (up, down, *(gates or [None])),
        )
        parts = exchanged(*tokens, maps, apply, split["experts"][0]) if sends else apply(*tokens, *maps)
        total: Any = sum_shards(parts, split["ffn"])
        y, active = total
        return y.reshape(x.shape), active.reshape(experts.shape)

    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), None)
    arrays = [x, experts, weights, up, down, *([] if gate is None else [gate])]
    name = "experts" if sends else None
    columns, rows = (name, None, "ffn"), (name, "ffn", None)
    maps = [columns, rows, *([] if gate is None else [columns])]
    y, active = shard_map(on_shards, arrays, [*[names] * 3, *maps], (names, names))
    y = product(y)
    return (y, active) if return_active else y


def move_and_why(moved: Moved | None, x: tuple[int, ...], k: int, up: tuple[int, ...], maps: int) -> str | None:
    """One line on what the devices of the active mesh that split experts send; None where they don't. See below."""
    if num_shards("experts", up[0]) == 1:
        return None
    choice, why = (moved, "as asked for") if moved is not None else chosen_move(x, k, up, maps)
    return f"experts: mesh.expert sends {choice} ({why})"


def chosen_move(x: tuple[int, ...], k: int, up: tuple[int, ...], maps: int) -> tuple[Moved, str]:
    """What a mesh moves if nothing is said, and why, for x, up and so many maps an expert of these shapes."""
    devices = num_shards("experts", up[0])
    if devices == 1:
        return "weights", "no mesh axis splits the experts"
    split = math.prod(num_shards(name, size) for name, size in zip(("batch", "length"), x[:-1], strict=False))
    tokens, width = math.prod(x[:-1]) // split, up[2] // num_shards("ffn", up[2])
    why = sends_fewer_bytes(tokens, k, up[0], width, maps, devices, "expert")
    return ("weights", "fewer bytes than tokens") if why is None else ("tokens", why)


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
