"""Laying out a trained model for decoding, once: `model = packed(model)`, then as before.

Every module of the decoder that reads matrices gets one that takes its place; docs/decode.md lists what each reads for
a token. The layouts of attention and feed-forward networks are registered for their classes, see `inference.layouts`.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import SparsezooWarning
from sparsezoo_jax.inference import (  # noqa: F401  # register the layouts of the package's kinds
    attention,
    delta,
    experts,
    ffn,
    sparsified,
    sparsified_attention,
)
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, laid_out
from sparsezoo_jax.inference.matrices import Packed, Rows, WeightFormat, assign
from sparsezoo_jax.inference.routed_head import RoutedRows
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.embedding import Tables
from sparsezoo_jax.models.mohd import RoutedHead


class PackedDecoder(Decoder):
    """A decoder whose output projection is laid out by rows, and whose layers are those of `packed`."""

    def __init__(self, source: Decoder, formats: Formats):
        """Take over the modules of `source`, an unstacked model that is not used any more."""
        self.config, self.deterministic, self.formats = source.config, source.deterministic, formats
        self.positions_PD, self.segments, self.noise = source.positions_PD, source.segments, source.noise
        self.final_norm, self.head = source.final_norm, source.head
        self.per_layer, self.altup, self.pre_gate = source.per_layer, source.altup, source.pre_gate
        self.mtp = nnx.List([])  # for training only
        dtype, form = jnp.dtype(source.config.dtype), formats.head or formats.weights
        embedding_VD = source.embedding_VD[: source.config.vocab_size]
        output_VD = embedding_VD if source.output_DV is None else source.output_DV[:, : source.config.vocab_size].T
        head = source.head
        if isinstance(head, RoutedHead) and head.config.grouped:
            rows = RoutedRows(output_VD.T, head.config, form, dtype)
        else:
            rows = Rows(output_VD, form, dtype, ("vocab", "embed"))
        self.output_rows = rows
        # Rows of the embedding are only looked up, in the activations' dtype.
        shared = source.output_DV is None and rows.rows.dtype == dtype and not isinstance(rows, RoutedRows)
        self.embedding_VD = rows.rows if shared else Packed(embedding_VD.astype(dtype), axes=("vocab", "embed"))
        self.output_DV = None

    def _project(self, hidden_BTD: jax.Array, tables: Tables | None) -> jax.Array:
        # Whatever head made these states, `Head.project` is the product with the whole matrix.
        return self.output_rows.product(hidden_BTD, jnp.dtype(jnp.float32))


def packed(model: Decoder, formats: Formats | WeightFormat = "model") -> PackedDecoder:
    """A decoder that computes the same from weights laid out for decoding; see `docs/decode.md`.

    It keeps its own copy of the weights, unless it needs none: the given model is not changed and may be deleted. No
    gradients, no records of attention. int8 has a factor for each row (output or neuron), chosen by its largest weight.
    A layer whose kind has no layout decodes as it was trained, in the model's own format; a warning names the kind.

    Raises:
      ConfigError: an unknown number format.
    """
    formats = formats if isinstance(formats, Formats) else Formats(formats)
    formats.check()
    graphdef, state = nnx.split(model.unstacked())
    copy = nnx.merge(graphdef, state)
    unpacked: dict[str, int] = {}
    for segment in copy.segments:
        for block in segment.blocks:
            parts = (("attention", block.attention_residual), ("ffn", block.ffn_residual))
            for name, residual in parts:
                layout = laid_out(getattr(block, name), formats, residual.active_share())
                if layout is None:
                    kind = f"model.{name}.kind={getattr(block.spec, name).kind}"
                    unpacked[kind] = unpacked.get(kind, 0) + 1
                else:
                    setattr(block, name, layout)
    for kind, layers in unpacked.items():
        warnings.warn(
            f"{kind}: no layout for decoding, {layers} layers stay as trained", SparsezooWarning, stacklevel=2
        )
    return PackedDecoder(copy, formats)


def restore(model: PackedDecoder, like: Decoder) -> None:
    """Write the weights of a `packed` model back into `like`, a model of the same configuration, unstacked.

    The inverse of `packed`: exact where formats hold the weights exactly. Modules of multi-token prediction, which are
    not packed, stay as they are.
    """
    # What has no layout of its own, norms and routers for example, is at the same place in both.
    found, target = (dict(nnx.to_flat_state(nnx.state(part, nnx.Param))) for part in (model, like))
    kept = {path: target[path].replace(found[path][...].astype(target[path].dtype)) for path in found.keys() & target}
    nnx.update(like, nnx.from_flat_state(kept))
    for segment, source in zip(model.segments, like.segments, strict=True):
        for block, original in zip(segment.blocks, source.blocks, strict=True):
            for layer, into in ((block.attention, original.attention), (block.ffn, original.ffn)):
                if isinstance(layer, DecodingLayout):
                    layer.restore(into)
    padding = ((0, like.config.vocab_rows - like.config.vocab_size), (0, 0))
    rows_VD = jnp.pad(model.output_rows.restored(), padding)
    if like.output_DV is None:
        assign(like.embedding_VD, rows_VD)
    else:
        assign(like.embedding_VD, jnp.pad(model.embedding_VD[...], padding))
        assign(like.output_DV, rows_VD.T)
