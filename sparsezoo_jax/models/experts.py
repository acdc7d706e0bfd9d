"""What kinds with experts share for sparsity after training: sizes of their maps, and what these read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.contract import MapSize
from sparsezoo_jax.models.width import AllChannels, Weight, Width
from sparsezoo_jax.pallas_kernels.grouped_ffn import (
    Activation,
    Channels,
    Reads,
    hidden_of,
    hidden_units,
    of_tokens,
    unmasked,
)
from sparsezoo_jax.pallas_kernels.matmul import matmul

SHARED = "shared_"
"""In front of the names of the maps of an expert that all tokens take."""


def network_maps(d_model: int, width: int, active: float, *, gated: bool, prefix: str = "") -> dict[str, MapSize]:
    """The maps of networks of this width, of which a token's have `active` neurons together."""
    networks = active / width
    maps = {"up": MapSize(d_model, active, d_model)}
    if gated:
        maps = {"gate": maps["up"], **maps, "neurons": MapSize(width, 2 * d_model * networks, width)}
    maps["down"] = MapSize(width, d_model * networks, width)
    return {prefix + name: size for name, size in maps.items()}


def channels_of_matrices(maps: Mapping[str, MapSize]) -> dict[str, int]:
    """By map with a matrix, the channels of its input."""
    return {name: size.channels for name, size in maps.items() if not name.endswith("neurons")}


def expert_channels(
    width: Width, up_EDW: jax.Array, down_EWD: jax.Array, gate_EDW: jax.Array | None = None
) -> Channels | None:
    """Which channels the maps of these experts leave out."""
    weights: dict[str, Weight | None] = {"up": lambda: up_EDW, "down": lambda: down_EWD}
    if gate_EDW is not None:
        weights |= {"gate": lambda: gate_EDW, "neurons": None}
    return width.of_experts(up_EDW.shape[0], weights)


def show_experts(
    x_BTD: jax.Array,
    up_EDW: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
    active_BTE: jax.Array,
    channels: Channels | None,
    counts: Mapping[str, jax.Array],
    ctx: CallContext,
) -> None:
    """Tell `ctx.width` what the maps of experts read.

    Args:
      x_BTD: their input.
      up_EDW: of all experts, as are their gates `gate_EDW`, if they have some.
      activation: their non-linearity.
      active_BTE: bool, which tokens take them.
      channels: which channels they leave out.
      counts: how many were read, by map [B, T, K], of a token's experts, or [B, T, E].
      ctx: of the call.
    """
    names = ("up", "down") if gate_EDW is None else ("gate", "up", "neurons", "down")
    masked, of_maps = (unmasked, {}) if channels is None else (channels.masked, dict(channels.of_maps))

    def read(name: str, e: jax.Array) -> jax.Array:
        reads = Reads(masked, jax.tree.map(lambda own: own[e], of_maps))
        gate_DW = None if gate_EDW is None else gate_EDW[e]
        reads("down", hidden_of(x_BTD, up_EDW[e], gate_DW, activation, reads, matmul))
        return reads.inputs[name]

    sizes = {"down": up_EDW.shape[2], "neurons": up_EDW.shape[2]}
    for name in names:
        ctx.width.experts(name, partial(read, name), active_BTE & ctx.valid_BT[..., None])
        if name in counts:
            count_BTK = counts[name]
            taken_BTK = active_BTE if count_BTK.shape == active_BTE.shape else jnp.ones(count_BTK.shape, bool)
            ctx.width.experts_read(name, count_BTK / sizes.get(name, x_BTD.shape[-1]), taken_BTK)


def hidden_read(
    x: jax.Array,
    weights: jax.Array,
    up_EDW: jax.Array,
    gate_EDW: jax.Array | None,
    activation: Activation,
    channels: Channels | None,
    *,
    whole: bool = False,
) -> jax.Array:
    """Hidden units of all experts as their down maps read them, times the experts' weights [..., E]: [..., F].

    `whole`: with what masks on these units leave out, of what masks before them leave.
    """
    if whole and channels is not None:
        before = {name: own for name, own in channels.of_maps.items() if name in ("gate", "up")}
        channels = channels._replace(of_maps=before)

    def made(channels: Channels | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        reads = Reads() if channels is None else Reads(channels.masked, channels.of_maps)
        hidden = reads("down", hidden_units(x, up_EDW, gate_EDW, activation, reads))
        return (hidden * weights[..., None].astype(hidden.dtype)).reshape(*x.shape[:-1], -1), {}

    return of_tokens(made, channels)[0]


class Named(AllChannels):
    """A width whose maps have names of their own, for a network within another one."""

    def __init__(self, prefix: str, width: Width):
        self.prefix, self.width = prefix, width

    def channels(self, name: str, x: jax.Array, weight: Weight | None = None) -> jax.Array:
        return self.width.channels(self.prefix + name, x, weight)

    def added(self, name: str, y: jax.Array) -> jax.Array:
        return self.width.added(self.prefix + name, y)

    def of_experts(self, experts: int, weights: Mapping[str, Weight | None]) -> Channels | None:
        channels = self.width.of_experts(experts, {self.prefix + name: weight for name, weight in weights.items()})
        if channels is None:
            return None
        return channels._replace(of_maps={n.removeprefix(self.prefix): own for n, own in channels.of_maps.items()})

    def experts_read(self, name: str, shares_BTK: jax.Array, taken_BTK: jax.Array) -> None:
        self.width.experts_read(self.prefix + name, shares_BTK, taken_BTK)

    def read(self, x_BTD: jax.Array, weight_DO: jax.Array) -> jax.Array:
        return self.width.read(x_BTD, weight_DO)

    def write(self, y: jax.Array, weight: jax.Array) -> jax.Array:
        return self.width.write(y, weight)
