"""What a generation had to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.inference.generation import GenerationStats
from sparsezoo_jax.inference.packing import Formats
from sparsezoo_jax.models import Decoder, DecoderConfig, Sparsity
from sparsezoo_jax.models.accounting import reads_per_token


def read_per_token(model: Decoder, stats: GenerationStats) -> float:
    """Bytes of weights and cache that one token of a generation needed, by the sparsity that it had.

    The output projection is counted; rows of a batch are counted as if each were alone. Factors of int8 rows are not.
    Needs a generation of more than one token.
    """
    formats = getattr(model, "formats", None) or Formats()
    return bytes_read(model.config, formats, round(np.mean(stats.contexts)), stats.layer_means())


def bytes_read(config: DecoderConfig, formats: Formats, context: int, stats: Mapping[str, Any]) -> float:
    """Bytes that the token which sees `context` tokens reads, of a model in `formats` with these layer statistics."""
    widths = [spec.ffn.d_ff for spec in config.layer_specs()]
    density, attended = (np.asarray(stats[name], np.float64) for name in ("ffn_density", "attended_keys"))
    sparsity = Sparsity(
        tuple(None if np.isnan(share) else float(share) * width for share, width in zip(density, widths, strict=True)),
        tuple(None if np.isnan(keys) else float(keys) for keys in attended),
    )
    reads = reads_per_token(config, context, sparsity=sparsity)
    predictor = sum(getattr(spec.ffn, "r", 0) * spec.ffn.d_ff for spec in config.layer_specs())

    def size(form: str) -> int:
        return jnp.dtype(config.dtype if form == "model" else form).itemsize

    return (
        (reads.weights - predictor) * size(formats.weights)
        + predictor * size(formats.predictor or formats.weights)
        + reads.head * size(formats.head or formats.weights)
        + reads.cache * size("model")
    )
