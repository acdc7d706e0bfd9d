"""The output projection of a routed part of the final state, laid out for decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax.inference.matrices import Rows, WeightFormat, few_tokens
from sparsezoo_jax.models.mohd import MoHDConfig, routed_blocks
from sparsezoo_jax.pallas_kernels.grouped_linear import from_blocks
from sparsezoo_jax.pallas_kernels.grouped_linear.rows import from_blocks_rows


class RoutedRows(Rows):
    """W [D, V] by rows of inputs: a few tokens read the slabs of their active blocks only."""

    def __init__(self, weight_DV: jax.Array, config: MoHDConfig, form: WeightFormat, dtype: jnp.dtype):
        super().__init__(weight_DV, form, dtype, (None, "vocab"))
        self.config = config

    def product(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """`x W` for states [B, T, D] that a `RoutedHead` made: [B, T, V]."""
        config, (w, scale), rows = self.config, self.arrays, few_tokens(x)
        routed_BTK = routed_blocks(x, config)
        if rows is None:
            form = config.implementation
            return from_blocks(x, routed_BTK, super().restored(), config.cut, dtype=dtype, implementation=form)
        y = from_blocks_rows(rows, routed_BTK.reshape(len(rows), -1), w, config.cut, scale, dtype=dtype)
        return y.reshape(*x.shape[:2], -1)

    def restored(self) -> jax.Array:
        """W^T, [V, D], in the activations' dtype, as those of other models are."""
        return super().restored().T

    @property
    def bytes_read(self) -> float:
        """For one token."""
        return self.config.delta * self.nbytes
