"""Laying out a trained model for decoding, once: `model = packed(model)`, then as before.

Kinds that have no layout of their own (latent attention, mixtures other than BlockFFN's, layers with a routed width,
sparse gates of gated FFNs) stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.inference.attention import PackedGQA, PackedSparkAttention
from sparsezoo_jax.inference.ffn import PackedBlockFFN, PackedGatedFFN, PackedSparkFFN
from sparsezoo_jax.inference.matrices import Rows, WeightFormat
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.attention import GQA
from sparsezoo_jax.models.blockffn import BlockFFN
from sparsezoo_jax.models.ffn import GatedFFN
from sparsezoo_jax.models.residual import PreNormConfig
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
    whole_width = isinstance(model.config.residual, PreNormConfig)
    for period in result.segments:
        for block in period.blocks:
            if whole_width:
                block.attention = _attention(block.attention, formats)
                block.ffn = _ffn(block.ffn, formats)
    result.formats = formats
    if result.head is None:
        dtype, form = jnp.dtype(model.config.dtype), formats.head or formats.weights
        rows_VD = result.embedding_VD[...] if result.output_DV is None else result.output_DV[...].T
        result.output_rows = nnx.data(Rows(rows_VD, form, dtype))
        result.output_DV = None
        # Rows of it are only looked up, in the activations' dtype.
        stored = result.output_rows.arrays[0]
        shared = rows_VD is not None and model.output_DV is None and stored.dtype == dtype
        table = stored if shared else result.embedding_VD[...].astype(dtype)
        result.embedding_VD = nnx.Param(table, axes=("vocab", "embed"))
    return result


def restored(model: Decoder, like: Decoder) -> None:
    """Write the weights of a `packed` model back into `like`, a model of the same configuration, unstacked.

    The inverse of `packed`: exact where formats hold the weights exactly.
    """
    for period, source in zip(model.segments, like.segments, strict=True):
        blocks: Any = zip(period.blocks, source.blocks, strict=True)
        for block, target in blocks:
            if isinstance(block.attention, PackedGQA | PackedSparkAttention):
                block.attention.projections.restore(target.attention.projections)
            if hasattr(block.ffn, "restore"):
                block.ffn.restore(target.ffn)
    if model.output_rows is not None:
        rows_VD = model.output_rows.restored()
        if like.output_DV is None:
            like.embedding_VD[...] = rows_VD
        else:
            like.output_DV[...], like.embedding_VD[...] = rows_VD.T, model.embedding_VD[...]


def _attention(source: Any, formats: Formats) -> Any:
    if type(source) is GQA:
        return PackedGQA(source, formats.weights)
    if type(source) is SparkAttention:
        return PackedSparkAttention(source, formats.weights)
    return source


def _ffn(source: Any, formats: Formats) -> Any:
    if type(source) is GatedFFN and PackedGatedFFN.takes(source):
        return PackedGatedFFN(source, formats.weights)
    if type(source) is SparkFFN and PackedSparkFFN.takes(source):
        return PackedSparkFFN(source, formats.weights, formats.predictor or formats.weights)
    if type(source) is BlockFFN:
        return PackedBlockFFN(source, formats.weights)
    return source
