"""Weights as decoding reads them: a row for each output or neuron, in one of several number formats."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from sparsezoo_jax import native
from sparsezoo_jax.models.width import Width
from sparsezoo_jax.pallas_kernels.gemm import gemm
from sparsezoo_jax.pallas_kernels.grouped_linear.rows import from_blocks_rows, to_blocks_rows
from sparsezoo_jax.pallas_kernels.linear import linear
from sparsezoo_jax.pallas_kernels.rows import MOST_ROWS
from sparsezoo_jax.sharding import LogicalAxes, num_shards

WeightFormat = Literal["model", "float32", "bfloat16", "int8"]


def assign(target: nnx.Variable, value: jax.Array) -> None:
    """Set a variable to `value`, which has as many entries, reshaped and cast to the variable's shape and dtype."""
    target[...] = value.reshape(target.shape).astype(target.dtype)


def few_tokens(x: jax.Array, experts: int = 0) -> jax.Array | None:
    """`x` [..., D] as rows [M, D], or None where they are too many for the operations that read active weights only.

    On a mesh those of one device count; with `experts` that it splits, those of all devices that exchange tokens.
    """
    rows = x.reshape(-1, x.shape[-1])
    on_device = len(rows) // num_shards("batch", len(rows)) * (num_shards("experts", experts) if experts else 1)
    return rows if on_device <= MOST_ROWS else None


def flat(x: jax.Array) -> jax.Array:
    """`x` [..., D] as rows [M, D]."""
    return x.reshape(-1, x.shape[-1])


#: Sequences of a batch from which on weights are multiplied as for a prompt, though each has one token only. Below, and
#: for tokens of bfloat16 where the processor has products of such pairs, reading a row of weights at a time is faster.
MANY_SEQUENCES = 13


def many_sequences(x: jax.Array) -> bool:
    """Whether x [B, ..., D] has so many sequences that few tokens are multiplied like many, where all weights are read.

    A chunk of one sequence never has: checking drafts gives what decoding token by token does.
    """
    if x.ndim < 3 or not native.available():
        return False
    pairs = native.level() == "v4_bf16" and x.dtype == jnp.bfloat16
    return x.shape[0] >= MANY_SEQUENCES and not pairs


class Packed(nnx.Variable):
    """An array laid out for inference: no parameter."""


def quantised(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 values [..., K] and the float32 factor [...] of each row, whose largest entry becomes 127 or -127."""
    rows = rows.astype(jnp.float32)
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.round(rows / scale[..., None]).astype(jnp.int8), scale


class Rows(nnx.Module):
    """A matrix [..., N, K] stored by rows, as int8 with a factor for each row.

    It can also hold two matrices, [N, K] and [N, L], whose rows lie side by side; then there are factors [N, 2]. `axes`
    are the logical names of the dimensions, as a parameter has them; none: a mesh splits nothing.
    """

    def __init__(
        self,
        rows: jax.Array | tuple[jax.Array, jax.Array],
        form: WeightFormat,
        dtype: jnp.dtype,
        axes: LogicalAxes | None = None,
    ):
        parts = rows if isinstance(rows, tuple) else (rows,)
        self.dtype, self.first = dtype, parts[0].shape[-1]
        axes = (None,) * parts[0].ndim if axes is None else axes
        scale = None
        if form == "int8":
            parts, scales = zip(*map(quantised, parts), strict=True)
            scale = Packed(scales[0], axes=axes[:-1])
            if len(scales) == 2:
                scale = Packed(jnp.stack(scales, axis=-1), axes=(*axes[:-1], None))
        self.scale = scale
        stored = jnp.dtype({"model": dtype, "int8": jnp.int8}.get(form, form))
        parts = [part.astype(stored) for part in parts]
        laid_out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        # Rows of active neurons lie far apart: with huge pages fewer of them miss the address translation.
        if not isinstance(laid_out, Tracer) and {device.platform for device in laid_out.devices()} == {"cpu"}:
            native.advise_huge_pages(laid_out)
        self.rows = Packed(laid_out, axes=axes)

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array | None]:
        """The rows as stored, and their factors."""
        return self.rows[...], None if self.scale is None else self.scale[...]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and their factors."""
        return sum(array.nbytes for array in self.arrays if array is not None)

    @property
    def bytes_read(self) -> float:
        """Bytes that one token reads: all."""
        return self.nbytes

    def restored(self) -> jax.Array:
        """The rows of one matrix in the activations' dtype, factors applied."""
        rows, scale = self.arrays
        return (rows if scale is None else rows.astype(jnp.float32) * scale[..., None]).astype(self.dtype)

    def parts(self) -> tuple[jax.Array, jax.Array]:
        """The rows of each of two matrices, as `restored` gives those of one."""
        rows, scale = self.arrays
        pair = [rows[:, : self.first], rows[:, self.first :]]
        if scale is not None:
            pair = [part.astype(jnp.float32) * scale[:, i, None] for i, part in enumerate(pair)]
        return pair[0].astype(self.dtype), pair[1].astype(self.dtype)

    def product(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """`x W^T` of one matrix [N, K]: [..., N] for x [..., K], in `dtype` (None: that of `x`)."""
        flat, out = x.reshape(-1, x.shape[-1]), x.dtype if dtype is None else dtype
        few = len(flat) <= MOST_ROWS and not many_sequences(x)
        y = (linear if few else gemm)(flat, *self.arrays, dtype=out)
        return y.reshape(*x.shape[:-1], -1)

    def combination(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """`x W` of one matrix [N, K]: [..., K] for x [..., N] of many tokens, in `dtype` (None: that of `x`)."""
        y = gemm(x.reshape(-1, x.shape[-1]), *self.arrays, transposed=False, dtype=x.dtype if dtype is None else dtype)
        return y.reshape(*x.shape[:-1], -1)

    def first_product(self, x: jax.Array) -> jax.Array:
        """`x W^T` of the first of two matrices: [..., N] for x [..., K] of many tokens."""
        y = gemm(x.reshape(-1, x.shape[-1]), *self.arrays, columns=(0, self.first))
        return y.reshape(*x.shape[:-1], -1)

    def second_combination(self, x: jax.Array) -> jax.Array:
        """`x W` of the second of two matrices: [..., L] for x [..., N] of many tokens."""
        columns = (self.first, self.rows.shape[-1] - self.first)
        y = gemm(x.reshape(-1, x.shape[-1]), *self.arrays, transposed=False, columns=columns)
        return y.reshape(*x.shape[:-1], -1)


class StreamMap(nnx.Module):
    """A map from the residual stream or back to it, of which a few tokens read the slabs of their active blocks only.

    `active` is the share of the stream's width that a token's sublayer has where a residual connection routes it; None
    is a map of the whole width. `axes` are the logical axes of the rows; a mesh does not split the width of slabs,
    which are read here and there. Of the maps below, `other` is the axis beside the width.
    """

    def __init__(self, rows: jax.Array, active: float | None, form: WeightFormat, dtype: jnp.dtype, axes: LogicalAxes):
        self.active = active
        axes = axes if active is None else tuple(None if name == "embed" else name for name in axes)
        self.rows = Rows(rows, form, dtype, axes)

    @property
    def bytes_read(self) -> float:
        """For one token."""
        return self.rows.nbytes * (1 if self.active is None else self.active)


class InputMap(StreamMap):
    """`x W` for x [B, T, D]: rows of outputs, or rows of inputs where the width is routed."""

    def __init__(self, weight_DO: jax.Array, active: float | None, form: WeightFormat, dtype: jnp.dtype, other: str):
        rows, axes = (weight_DO.T, (other, "embed")) if active is None else (weight_DO, ("embed", other))
        super().__init__(rows, active, form, dtype, axes)

    def restored(self) -> jax.Array:
        """W, [D, O], in the activations' dtype."""
        return self.rows.restored().T if self.active is None else self.rows.restored()

    def __call__(self, x_BTD: jax.Array, stream: Width) -> jax.Array:
        """[B, T, O]."""
        if self.active is None:
            return self.rows.product(x_BTD)
        x = few_tokens(x_BTD)
        if x is None:
            return stream.read(x_BTD, self.restored())
        routed: Any = stream
        w, scale = self.rows.arrays
        y = from_blocks_rows(x, routed.read_BTK.reshape(len(x), -1), w, routed.cut, scale)
        return y.reshape(*x_BTD.shape[:2], -1)


class OutputMap(StreamMap):
    """`y W`, [B, T, D]: rows of outputs."""

    def __init__(self, weight_ID: jax.Array, active: float | None, form: WeightFormat, dtype: jnp.dtype, other: str):
        super().__init__(weight_ID.T, active, form, dtype, ("embed", other))

    def restored(self) -> jax.Array:
        """W, [I, D], in the activations' dtype."""
        return self.rows.restored().T

    def __call__(self, y_BTI: jax.Array, stream: Width) -> jax.Array:
        """[B, T, D]."""
        if self.active is None:
            return self.rows.product(y_BTI)
        y = few_tokens(y_BTI)
        if y is None:
            return stream.write(y_BTI, self.restored())
        routed: Any = stream
        w, scale = self.rows.arrays
        x = to_blocks_rows(y, routed.written_BTK.reshape(len(y), -1), w, routed.cut, scale)
        return x.reshape(*y_BTI.shape[:2], -1)
