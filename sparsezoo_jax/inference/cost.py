"""What a generation had to read."""

from __future__ import annotations

import numpy as np

from sparsezoo_jax.inference.generation import GenerationStats
from sparsezoo_jax.models import Decoder, Sparsity, bytes_per_token


def read_per_token(model: Decoder, stats: GenerationStats) -> float:
    """Bytes of weights and cache that one token of a generation needed, by the sparsity that it had.

    The output projection is counted; rows of a batch are counted as if each were alone. Needs a generation of more
    than one token.
    """
    config, means = model.config, stats.layer_means()
    density, attended = means["ffn_density"], means["attended_keys"]
    widths = [spec.ffn.d_ff for spec in config.layer_specs()]
    sparsity = Sparsity(
        tuple(None if np.isnan(share) else float(share) * width for share, width in zip(density, widths, strict=True)),
        tuple(None if np.isnan(keys) else float(keys) for keys in attended),
    )
    return bytes_per_token(config, round(np.mean(stats.contexts)), logits=True, sparsity=sparsity)
