"""How sublayers read from and write to the residual stream: all of its width, or the part that a residual kind routes.

A sublayer that takes its maps through `CallContext.width` says so by `partial_width = True` in its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.grouped_ffn import Channels
from sparsezoo_jax.pallas_kernels.matmul import from_stream, to_stream
from sparsezoo_jax.sharding import gather_axis

Weight = Callable[[], jax.Array]


class Width(Protocol):
    """The maps between the stream's width and a sublayer."""

    def channels(self, name: str, x: jax.Array, weight: Weight | None = None) -> jax.Array:
        """`x` [B, T, ...], the input of the map called `name`, as that map reads it: 0 in channels that it leaves out.

        Names are those of the kind's `linear_maps`. `weight` makes the map's matrix [..., O], which has the axes of a
        token's input, one or two, in its front.
        """
        ...

    def added(self, name: str, y: jax.Array) -> jax.Array:
        """`y` [B, T, ...], the output of the map called `name`, with what stands in for channels that it left out.

        Called once after each call of `channels` for a map with a matrix, before anything is made of the output.
        """
        ...

    def of_experts(self, experts: int, weights: Mapping[str, Weight | None]) -> Channels | None:
        """Which channels maps of experts leave out, as `grouped_ffn` takes it; None: none.

        `weights` makes by map the matrices of all experts [E, I, O], and is None for "neurons".
        """
        ...

    def experts(
        self,
        name: str,
        read: Callable[[jax.Array], jax.Array],
        taken_BTE: jax.Array,
        norms_EI: jax.Array | None = None,
    ) -> None:
        """Called with what the map called `name` of each expert reads, [B, T, I] by the expert's number, and bool
        [B, T, E], which tokens take it. Nothing is left out of that.

        `norms_EI`: by which the channels' magnitudes are multiplied where they are scored; None: by nothing.
        """
        ...

    def experts_read(self, name: str, shares_BTK: jax.Array, taken_BTK: jax.Array) -> None:
        """Called with the shares of the channels that are not 0 in what the map called `name` reads, of the experts of
        each token or of all experts, and bool, which of these it takes.
        """
        ...

    def read(self, x_BTD: jax.Array, weight_DO: jax.Array) -> jax.Array:
        """`x W`, [B, T, O]."""
        ...

    def write(self, y: jax.Array, weight: jax.Array) -> jax.Array:
        """`y W`, [B, T, D], for y [B, T, ...] and a weight [..., D] with the same axes in its front (one or two)."""
        ...


class AllChannels:
    """Maps read every channel of their inputs."""

    def channels(self, name: str, x: jax.Array, weight: Weight | None = None) -> jax.Array:
        return x

    def added(self, name: str, y: jax.Array) -> jax.Array:
        return y

    def of_experts(self, experts: int, weights: Mapping[str, Weight | None]) -> Channels | None:
        return None

    def experts(
        self,
        name: str,
        read: Callable[[jax.Array], jax.Array],
        taken_BTE: jax.Array,
        norms_EI: jax.Array | None = None,
    ) -> None:
        pass

    def experts_read(self, name: str, shares_BTK: jax.Array, taken_BTK: jax.Array) -> None:
        pass


class WholeWidth(AllChannels):
    """Every dimension takes part."""

    def read(self, x_BTD: jax.Array, weight_DO: jax.Array) -> jax.Array:
        return from_stream(x_BTD, weight_DO)

    def write(self, y: jax.Array, weight: jax.Array) -> jax.Array:
        if weight.ndim == 2:
            return to_stream(y, weight)
        weight = gather_axis(weight, -1) if y.shape[1] > 1 else weight
        return product(jnp.einsum("btnh,nhd->btd", y, weight))


WHOLE = WholeWidth()
