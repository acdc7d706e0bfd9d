"""Laying out a trained model for decoding, once: `model = packed(model)`, then as before.

Every module of the decoder that reads matrices gets one that takes its place; docs/decode.md lists what each reads for
a token. Only Spark FFNs that select by another than the statistical rule stay as trained.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.inference.attention import PackedGQA, PackedMLA, PackedSparkAttention
from sparsezoo_jax.inference.experts import PackedBlockFFN, PackedMoEFFN, PackedMoEXFFN
from sparsezoo_jax.inference.ffn import MappedGatedFFN, MappedPlainFFN, PackedGatedFFN, PackedSparkFFN
from sparsezoo_jax.inference.matrices import Rows, WeightFormat, put
from sparsezoo_jax.inference.routed_head import RoutedRows
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.attention import GQA
from sparsezoo_jax.models.blockffn import BlockFFN
from sparsezoo_jax.models.ffn import GatedFFN, PlainFFN
from sparsezoo_jax.models.mla import MLA
from sparsezoo_jax.models.moe import MoEFFN
from sparsezoo_jax.models.moex import MoEXFFN
from sparsezoo_jax.models.mohd import MoHD
from sparsezoo_jax.models.spark import SparkAttention, SparkFFN

FORMATS = ("model", "float32", "bfloat16", "int8")


class Formats(NamedTuple):
    """Number formats of the weights; "model" is the activations' dtype, None is that of `weights`."""

    weights: WeightFormat = "model"
    predictor: WeightFormat | None = None
    """Of the predictors of Spark FFNs, all of which are read for every token."""
    head: WeightFormat | None = None
    """Of the output projection."""


def packed(model: Decoder, formats: Formats | WeightFormat = "model") -> Decoder:
    """A decoder that computes the same from weights laid out for decoding; see `docs/decode.md`.

    It keeps its own copy of the weights, unless it needs none: the given model is not changed and may be deleted. No
    gradients, no records of attention. int8 has a factor for each row (output or neuron), chosen by its largest weight.

    Raises:
      ConfigError: an unknown number format.
    """
    formats = formats if isinstance(formats, Formats) else Formats(formats)
    for name, form in formats._asdict().items():
        require(form is None or form in FORMATS, f"--{name}", form, f"must be one of {', '.join(FORMATS)}")
    graphdef, state = nnx.split(model.unstacked())
    result = nnx.merge(graphdef, state)
    for period in result.segments:
        for block in period.blocks:
            block.attention = _attention(block.attention, formats, _active(block.attention_residual))
            block.ffn = _ffn(block.ffn, formats, _active(block.ffn_residual))
    result.formats = formats
    dtype, form = jnp.dtype(model.config.dtype), formats.head or formats.weights
    output_VD = result.embedding_VD[...] if result.output_DV is None else result.output_DV[...].T
    head = result.head
    if head is not None and head.config.grouped:
        rows = RoutedRows(output_VD.T, head.config, form, dtype)
    else:
        rows = Rows(output_VD, form, dtype)
    result.output_rows = nnx.data(rows)
    # Rows of the embedding are only looked up, in the activations' dtype.
    stored = rows.arrays[0]
    shared = result.output_DV is None and stored.dtype == dtype and not isinstance(rows, RoutedRows)
    table = stored if shared else result.embedding_VD[...].astype(dtype)
    result.embedding_VD = nnx.Param(table, axes=("vocab", "embed"))
    result.output_DV = None
    return result


def restore(model: Decoder, like: Decoder) -> None:
    """Write the weights of a `packed` model back into `like`, a model of the same configuration, unstacked.

    The inverse of `packed`: exact where formats hold the weights exactly.
    """
    # What has no layout of its own, norms and routers for example, is at the same place in both.
    found, target = (dict(nnx.to_flat_state(nnx.state(part, nnx.Param))) for part in (model, like))
    kept = {path: target[path].replace(found[path][...].astype(target[path].dtype)) for path in found.keys() & target}
    nnx.update(like, nnx.from_flat_state(kept))
    for period, source in zip(model.segments, like.segments, strict=True):
        blocks: Any = zip(period.blocks, source.blocks, strict=True)
        for block, target in blocks:
            for name in ("attention", "ffn"):
                if hasattr(getattr(block, name), "restore"):
                    getattr(block, name).restore(getattr(target, name))
    rows_VD = model.output_rows.restored()
    if like.output_DV is None:
        put(like.embedding_VD, rows_VD)
    else:
        put(like.output_DV, rows_VD.T)


def _active(residual: Any) -> float | None:
    """The share of the width that a connection's sublayer computes; None: all of it."""
    return residual.config.delta if isinstance(residual, MoHD) and residual.config.grouped else None


def _attention(source: Any, formats: Formats, active: float | None) -> Any:
    if type(source) is GQA:
        return PackedGQA(source, formats.weights, active)
    if type(source) is SparkAttention:
        return PackedSparkAttention(source, formats.weights)
    if type(source) is MLA:
        return PackedMLA(source, formats.weights)
    return source


def _ffn(source: Any, formats: Formats, active: float | None) -> Any:
    form = formats.weights
    if type(source) is GatedFFN:
        whole = active is None and PackedGatedFFN.takes(source)
        return PackedGatedFFN(source, form) if whole else MappedGatedFFN(source, form, active)
    if type(source) is PlainFFN:
        return MappedPlainFFN(source, form, active)
    if type(source) is SparkFFN and PackedSparkFFN.takes(source):
        return PackedSparkFFN(source, form, formats.predictor or form)
    layouts: dict[Any, Any] = {BlockFFN: PackedBlockFFN, MoEFFN: PackedMoEFFN, MoEXFFN: PackedMoEXFFN}
    layout = layouts.get(type(source))
    return source if layout is None else layout(source, form)
