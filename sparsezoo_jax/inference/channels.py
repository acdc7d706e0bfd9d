"""Maps that leave out channels of their inputs, laid out for decoding: a few tokens read the rows of the others.

A map with a mask lies by its input channels, and a token's product is the sum of the rows of channels that are not 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.matrices import Packed, Rows, WeightFormat, few_tokens
from sparsezoo_jax.models.masks import Masks, channel_norms
from sparsezoo_jax.models.sparsified import SparsifiedAttention, SparsifiedFFN
from sparsezoo_jax.pallas_kernels.active_rows import active_rows
from sparsezoo_jax.sharding import LogicalAxes


class ChannelMap(nnx.Module):
    """`x W` for x [B, T, I] by rows of inputs, or by rows of outputs for a map that reads all channels."""

    def __init__(self, weight_IO: jax.Array, masked: bool, form: WeightFormat, dtype: jnp.dtype, axes: LogicalAxes):
        self.masked = masked
        laid_out, axes = (weight_IO, axes) if masked else (weight_IO.T, tuple(reversed(axes)))
        self.rows = Rows(laid_out, form, dtype, axes)

    def restored(self) -> jax.Array:
        """W, [I, O], in the activations' dtype."""
        return self.rows.restored() if self.masked else self.rows.restored().T

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """[B, T, O]."""
        if not self.masked:
            return self.rows.product(x_BTI)
        x = few_tokens(x_BTI)
        if x is None:
            return self.rows.combination(x_BTI)
        return active_rows(x, *self.rows.arrays).reshape(*x_BTI.shape[:2], -1)

    def bytes_read(self, target: float) -> float:
        """Bytes that a token reads which leaves out a share `target` of the channels, if this is masked."""
        return self.rows.nbytes * (1 - target if self.masked else 1)


def biased(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`y`, plus the bias if there is one."""
    return y if bias is None else y + bias[...].astype(y.dtype)


def bytes_of(*biases: nnx.Param | None) -> int:
    """Bytes of the biases that there are."""
    return sum(bias[...].nbytes for bias in biases if bias is not None)


def norms_of(masks: Masks, weights: Mapping[str, jax.Array], experts: Collection[str] = ()) -> nnx.Dict:
    """Norms of the weights of channels, by map where scores have them: making them would take as long as a token.

    Of a weight for the output of heads, [N, H, D], the first two axes are channels; of those of `experts`, [E, I, O],
    they are the experts and their channels.
    """

    def of(name: str) -> Packed:
        norms = channel_norms(weights[name], 2 if name == "o" or name in experts else 1)
        norms = norms.reshape(-1) if name == "o" else norms
        return Packed(norms, axes=(None,) * norms.ndim)

    return nnx.Dict({name: of(name) for name in masks.names if name in masks.config.weighted})


def rotation_of(source: SparsifiedFFN | SparsifiedAttention, form: WeightFormat) -> ChannelMap | None:
    """The matrix before the maps, where there is one."""
    if source.rotation is None:
        return None
    weight_DD = source.rotation.rotation_DD[...]
    return ChannelMap(weight_DD, False, form, getattr(source.inner, "dtype", weight_DD.dtype), (None, None))
