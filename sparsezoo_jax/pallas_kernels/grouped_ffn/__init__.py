"""The feed-forward layer of a mixture of experts, without capacity: no token is ever dropped."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import Implementation, dispatch, native_cpu
from sparsezoo_jax.pallas_kernels.grouped_ffn import by_expert, by_token, reference
from sparsezoo_jax.pallas_kernels.grouped_ffn.channels import Channels, Reads, of_tokens, unmasked
from sparsezoo_jax.pallas_kernels.grouped_ffn.exchange import exchanged, sends_fewer_bytes
from sparsezoo_jax.pallas_kernels.grouped_ffn.reference import (
    Activation,
    hidden_of,
    hidden_units,
    pre_activations,
    spread,
)
from sparsezoo_jax.pallas_kernels.ragged import native_refusal
from sparsezoo_jax.sharding import num_shards, shard_map, sum_shards

Dispatch = Literal["dense", "ragged", "loop", "native"]
Moved = Literal["weights", "tokens"]

__all__ = [
    "Activation",
    "Channels",
    "Dispatch",
    "Moved",
    "Reads",
    "grouped_ffn",
    "hidden_of",
    "hidden_units",
    "move_and_why",
    "of_tokens",
    "pre_activations",
    "spread",
    "unmasked",
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
    channels: Channels | None = None,
) -> Any:
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
        expert and multiplies by `ragged_matmul`; "loop" sorts them into tiles of one expert and loops over these;
        "native" gathers and adds up rows within products of each expert. None: for a CPU "native" in float32 and
        "loop" otherwise, "ragged" elsewhere, all computing the hidden layer again in the backward pass. On a mesh all
        but "dense" see each device's tokens by themselves. Each device has of W only its part where the mesh splits
        FFN neurons, and the parts of the sum are added up.
      moved: what devices that split the experts send each other, for all but "dense": "weights" gathers all experts to
        each device's tokens; "tokens" sends these to their experts' devices and back (`exchange.exchanged`). None:
        whichever are fewer bytes (`exchange.sends_fewer_bytes`).
      channels: which channels of their inputs the maps leave out. A mask that needs all channels of a row lets devices
        that split FFN neurons compute the same; otherwise each has its own neurons' part.

    Returns:
      [..., D] in the dtype of x, with `return_active` also float32 [..., k], and with `channels` a dict of float32
      [..., k] in its place: "hidden", which is the same, and for each map that leaves channels out, how many of what it
      reads are not 0.

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
    apply = partial(
        _grouped, x, experts, weights, up, down, gate, activation=activation, implementation=implementation, moved=moved
    )
    y, counts = of_tokens(apply, channels)
    if channels is not None:
        return y, counts
    return (y, counts["hidden"]) if return_active else y


def _grouped(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None,
    channels: Channels | None,
    *,
    activation: Activation,
    implementation: str | None,
    moved: Moved | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sums, and counts by name; `channels.whole` is not looked at."""
    channels = Channels(unmasked, {}) if channels is None else channels
    form: Any = {"activation": activation, "masked": channels.masked}
    implementations = [
        Implementation("dense", partial(reference.grouped_ffn, **form), default=False),
        Implementation("ragged", partial(by_expert.ragged, **form)),
        Implementation("loop", partial(by_expert.loop, **form), "cpu"),
        native_cpu(partial(by_token.unsorted, **form), native_refusal(x, up, None), sharded=True),
    ]
    # The hidden units are the largest arrays of the layer: a choice between two must not keep those of both.
    apply = dispatch("grouped_ffn", implementation, implementations, recompute=True)
    of_maps = dict(channels.of_maps)
    if implementation == "dense":
        return apply(x, experts, weights, up, down, gate, of_maps)

    moved = chosen_move(x.shape, experts.shape[-1], up.shape, 2 if gate is None else 3)[0] if moved is None else moved
    # Without devices that split the experts there is nothing to send.
    sends = moved == "tokens" and num_shards("experts", up.shape[0]) > 1
    own, tree = jax.tree.flatten(of_maps)

    def on_shards(x, experts, weights, up, down, gate, *rest):
        *own, split = rest
        k, d = experts.shape[-1], x.shape[-1]
        tokens = (x.reshape(-1, d), experts.reshape(-1, k), weights.reshape(-1, k))
        maps = (up, down, gate, jax.tree.unflatten(tree, own))
        sums, counts = exchanged(*tokens, maps, apply, split["experts"][0]) if sends else apply(*tokens, *maps)
        # Every device with a part of the neurons reads the whole stream: that counts once.
        parts = math.prod(jax.lax.axis_size(axis) for axis in split.get("ffn", ()))
        counts |= {map: counts[map] / parts for map in ("up", "gate") if map in counts}
        total: Any = sum_shards((sums, counts), split.get("ffn", ()))
        y, counts = total
        return y.reshape(x.shape), {map: count.reshape(experts.shape) for map, count in counts.items()}

    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), None)
    name, neurons = "experts" if sends else None, None if channels.by_row else "ffn"
    columns, rows = (name, None, neurons), (name, neurons, None)
    # Numbers of neurons lie where these do; those of the stream's dimensions, and single ones, on all devices.
    own_axes = [
        (name, neurons if map in ("down", "neurons") and array.shape[1] > 1 else None)
        for map, arrays in sorted(of_maps.items())
        for array in jax.tree.leaves(arrays)
    ]
    y, counts = shard_map(
        on_shards,
        [x, experts, weights, up, down, gate, *own],
        [*[names] * 3, columns, rows, columns, *own_axes],
        (names, dict.fromkeys(("hidden", *of_maps), names)),
    )
    return product(y), counts


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
    channels: Channels | None = None,
) -> Any:
    """`sum_e weights[..., e] * down_e act(up_e x)`: any number of experts a token, those of weight 0 computed too.

    The form for routers whose number of experts differs from token to token. Arguments as in `grouped_ffn`, but for
    `weights` [..., E], and with `channels` the same result, but for counts [..., E]: inputs of their own are then made
    for all experts, [..., E, D].

    Raises:
      ConfigError: shapes that don't fit each other.
    """
    _check(x, up, down, gate)
    expected = (*x.shape[:-1], up.shape[0])
    require(weights.shape == expected, "weighted_ffn.weights", weights.shape, f"must be {expected}")
    y, counts = of_tokens(partial(reference.weighted_ffn, x, weights, up, down, gate, activation), channels)
    return y if channels is None else (y, counts)


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
