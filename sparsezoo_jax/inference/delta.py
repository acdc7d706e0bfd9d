"""Delta feed-forward networks laid out for decoding: of a map a token reads the rows of channels that changed.

With `Q_s` the rounded input of a map for some earlier token s, and `y_s = Q_s W`, kept in float32:

    Q_t W = y_s + (Q_t - Q_s) W

Rows that did not change add nothing and are not read. The identity holds whatever token s is, so padding, drafts that
were rejected and the end of a document need no care. Where a token has no more channels that are not 0 than channels
that changed, its product is made anew, which reads less.

Shapes: M tokens, C channels of a map's input, O of its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import Rows, WeightFormat, assign, few_tokens
from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.delta_ffn import DeltaFFN
from sparsezoo_jax.pallas_kernels.active_rows import active_rows

#: Sums after which a product is made anew. What rounding adds up grows with the root of their number: to a few
#: millionths of the product after a thousand (docs/delta.md), which then costs a thousandth more rows.
REFRESH = 1024
#: Names of the statistics of what decoding read: shares of the rows of the second map, and of the first one.
READ, READ_INPUTS = "read_density", "input_read_density"


class Reference(NamedTuple):
    """What is kept of one token a sequence for one map."""

    axes = ("batch", None)

    input_BC: jax.Array
    """Rounded input of the map."""
    product_BO: jax.Array
    """Its product, float32."""
    sums_B1: jax.Array
    """How many sums it is made of beyond the first, int32."""

    @classmethod
    def empty(cls, batch: int, rows: Rows) -> Reference:
        """Zeros, whose product is 0: what follows is made anew."""
        channels, outputs = rows.rows.shape
        product_BO = jnp.zeros((batch, outputs), jnp.float32)
        return cls(jnp.zeros((batch, channels), rows.dtype), product_BO, jnp.zeros((batch, 1), jnp.int32))


class FFNReference(NamedTuple):
    """What a network keeps; None for a map whose input is not rounded."""

    axes = ("batch", None)

    inputs: Reference | None
    hidden: Reference | None


def product_by_changes(
    x_BTC: jax.Array, rows: Rows, kept: Reference, valid_BT: jax.Array, *, refresh: int = REFRESH
) -> tuple[jax.Array, Reference, jax.Array]:
    """`x W` in float32 [B, T, O], what to keep, and the share of the rows that was read, a scalar.

    After `refresh` sums a product is made anew. More tokens than the operations of few take are multiplied as those of
    a prompt, and keep nothing.
    """
    if few_tokens(x_BTC) is None:
        y_BTO = rows.combination(x_BTC, jnp.dtype(jnp.float32))
        return y_BTO, Reference.empty(len(x_BTC), rows), jnp.float32(1)
    x_BTC, kept_B1C = x_BTC.astype(jnp.float32), kept.input_BC.astype(jnp.float32)[:, None]
    # Compared, too: a compiler fuses the product of counts and steps into the difference, with the digits that rounding
    # cuts off, and then no channel would ever be the same.
    changes_BTC = jnp.where(x_BTC == kept_B1C, 0, x_BTC - kept_B1C)
    fewer_BT = jnp.count_nonzero(x_BTC, axis=-1) <= jnp.count_nonzero(changes_BTC, axis=-1)
    anew_BT1 = (fewer_BT | (kept.sums_B1 >= refresh))[..., None]
    added_BTC = jnp.where(anew_BT1, x_BTC, changes_BTC)
    sums_BTO = active_rows(added_BTC.reshape(-1, x_BTC.shape[-1]), *rows.arrays).reshape(*x_BTC.shape[:2], -1)
    y_BTO = jnp.where(anew_BT1, 0, kept.product_BO[:, None]) + sums_BTO
    # The last token that is no padding; of none, whichever it is.
    length = x_BTC.shape[1]
    last_B11 = jnp.max(jnp.where(valid_BT, jnp.arange(length), 0), axis=1)[:, None, None]

    def at_last(of_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(of_BT, last_B11, axis=1)[:, 0]

    sums_B1 = jnp.where(at_last(anew_BT1), 0, kept.sums_B1 + 1)
    kept = Reference(at_last(x_BTC).astype(kept.input_BC.dtype), at_last(y_BTO), sums_B1)
    return y_BTO, kept, jnp.mean(jnp.any(added_BTC != 0, axis=(0, 1)), dtype=jnp.float32)


class PackedDeltaFFN(DeltaFFN, DecodingLayout):
    """`DeltaFFN` with rows of the channels that are rounded, and those of the neurons."""

    def __init__(self, source: DeltaFFN, form: WeightFormat):
        self.config, self.dtype, self.summed_layers = source.config, source.dtype, source.summed_layers
        self.input_step, self.hidden_step = source.input_step, source.hidden_step
        maps = (source.up_DF,) if source.gate_DF is None else (source.gate_DF, source.up_DF)
        inner_DF = jnp.concatenate([each[...] for each in maps], axis=-1)
        # The axis of the rows that are summed up over is the one that tensor parallelism splits.
        if self.input_step is None:
            self.inner_rows = Rows(inner_DF.T, form, source.dtype, ("ffn", "embed"))
        else:
            self.inner_rows = Rows(inner_DF, form, source.dtype, ("ffn", None))
        self.down = Rows(source.down_FD[...], form, source.dtype, ("ffn", "embed"))

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down.restored()

    def restore(self, source: DeltaFFN) -> None:
        """Put the weights back into `source`."""
        rows = self.inner_rows.restored()
        *gate, up_DF = jnp.split(rows.T if self.input_step is None else rows, self.config.inner_maps, axis=-1)
        if source.gate_DF is not None:
            assign(source.gate_DF, gate[0])
        assign(source.up_DF, up_DF)
        assign(source.down_FD, self.down.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that a token reads by itself with this share of the neurons active."""
        return self._steps() + self.inner_rows.nbytes + density * self.down.nbytes

    def bytes_of(self, stats: Mapping[str, float]) -> float:
        """Bytes of weights that a token with these statistics read."""
        if READ not in stats:
            return self.bytes_read(stats["ffn_density"])
        return self._steps() + stats.get(READ_INPUTS, 1) * self.inner_rows.nbytes + stats[READ] * self.down.nbytes

    def _steps(self) -> int:
        return sum(step[...].nbytes for step in (self.input_step, self.hidden_step) if step is not None)

    def empty_cache(self, batch: int) -> FFNReference:
        """A reference for each map whose input is rounded."""
        inputs = None if self.input_step is None else Reference.empty(batch, self.inner_rows)
        return FFNReference(inputs, None if self.hidden_step is None else Reference.empty(batch, self.down))

    def inner(self, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        """As in `DeltaFFN`, all rows read."""
        rows = self.inner_rows
        return self._split(rows.product(x_BTD) if self.input_step is None else rows.combination(x_BTD))

    def output(self, hidden_BTF: jax.Array) -> jax.Array:
        """As in `DeltaFFN`, all rows read."""
        return self._rows_of_units(hidden_BTF)[0]

    def decode(
        self, x_BTD: jax.Array, ctx: CallContext, cache: FFNReference
    ) -> tuple[jax.Array, LayerAux, FFNReference]:
        """As the call, by what changed."""
        x_BTD = self.rounded(x_BTD, self.input_step)
        if cache.inputs is None:
            inner, inputs, read = self.inner(x_BTD), None, {}
        else:
            inner_BTO, inputs, share = product_by_changes(x_BTD, self.inner_rows, cache.inputs, ctx.valid_BT)
            inner, read = self._split(inner_BTO.astype(self.dtype)), {READ_INPUTS: share}
        scores, hidden = self.hidden(*inner)
        if cache.hidden is None:
            y_BTD, share, after = *self._rows_of_units(hidden), None
        else:
            y_BTD, after, share = product_by_changes(hidden, self.down, cache.hidden, ctx.valid_BT)
        aux = self.found(x_BTD, scores, hidden, ctx)
        aux = aux._replace(stats={**aux.stats, READ: share, **read})
        return y_BTD.astype(self.dtype), aux, FFNReference(inputs, after)

    def _split(self, inner_BTO: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(inner_BTO, self.config.inner_maps, axis=-1))

    def _rows_of_units(self, hidden_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The map back to the stream, and the share of its rows that was read: those of units that are not 0."""
        units = few_tokens(hidden_BTF)
        if units is None:
            return self.down.combination(hidden_BTF), jnp.float32(1)
        y_BTD = active_rows(units, *self.down.arrays).reshape(*hidden_BTF.shape[:2], -1)
        return y_BTD, jnp.mean(jnp.any(units != 0, axis=0), dtype=jnp.float32)


@packs(DeltaFFN)
def _delta(source: DeltaFFN, formats: Formats, active: float | None) -> PackedDeltaFFN:
    return PackedDeltaFFN(source, formats.weights)
