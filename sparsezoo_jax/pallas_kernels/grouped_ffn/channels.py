"""Channels that the maps of experts leave out of what they read, where activations were made sparse after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Masked = Callable[[jax.Array, Any], jax.Array]
"""From what a map reads [..., I], and what `Channels.of_maps` has of the expert, to the same with zeros in channels
that are left out."""


class Channels(NamedTuple):
    """Which channels the maps of each expert read; everything by the token's input of the map and the expert."""

    masked: Masked
    of_maps: Mapping[str, Any]
    """For each of the maps up, gate, down and neurons that leaves channels out a tree of arrays [E, 1] or [E, I], which
    have no gradient. "neurons" is what the gate makes, after its non-linearity."""
    by_row: bool = False
    """Whether `masked` looks at all channels at once: devices that share an expert's neurons can't know them."""
    whole: jax.Array | None = None
    """bool [...], which tokens read everything; None: none do."""

    @property
    def open(self) -> Channels:
        """The same for tokens that read everything."""
        return Channels(unmasked, self.of_maps)


def unmasked(x: jax.Array, own: Any = None) -> jax.Array:
    """`x` [..., I]: a map that reads all channels."""
    del own
    return x


class Reads:
    """What the maps of an expert read: `inputs` by name, before anything is left out.

    `counts` says how many channels are not 0 in what maps with masks read.
    """

    def __init__(self, masked: Masked = unmasked, of_maps: Mapping[str, Any] = MappingProxyType({})):
        """`of_maps`: of one expert, or of the expert of each row, [..., 1] or [..., I]; none reads all channels."""
        self.masked, self.of_maps = masked, of_maps
        self.counts: dict[str, jax.Array] = {}
        self.inputs: dict[str, jax.Array] = {}

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """`x` [..., I], the input of the map called `name`, with zeros for what it leaves out."""
        self.inputs[name] = x
        if name not in self.of_maps:
            return x
        x = self.masked(x, self.of_maps[name])
        self.counts[name] = count_nonzero(x)
        return x


def count_nonzero(x: jax.Array) -> jax.Array:
    """Number of non-zero entries along the last axis, float32."""
    return jnp.sum(x != 0, axis=-1, dtype=jnp.float32)


def of_tokens(apply: Callable[[Channels | None], Any], channels: Channels | None) -> Any:
    """`apply(channels)`, an array [..., D] and counts by name [..., k], but nothing left out for `channels.whole`.

    Where there are such tokens, all are computed in both ways.
    """
    if channels is None or channels.whole is None:
        return apply(channels)
    whole = channels.whole[..., None]
    return jax.tree.map(
        lambda every, some: jnp.where(whole, every, some), apply(channels.open), apply(channels._replace(whole=None))
    )
