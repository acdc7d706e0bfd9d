"""One decoder, composed of attention kinds, FFN kinds and residual kinds."""

from sparsezoo_jax.models.accounting import (
    ActivatedCount,
    ParameterCount,
    Sparsity,
    activated_parameters,
    bytes_per_token,
    count_parameters,
    dense_twin,
    flops_per_token,
)
from sparsezoo_jax.models.config import DecoderConfig
from sparsezoo_jax.models.decoder import Decoder, Output

__all__ = [
    "ActivatedCount",
    "Decoder",
    "DecoderConfig",
    "Output",
    "ParameterCount",
    "Sparsity",
    "activated_parameters",
    "bytes_per_token",
    "count_parameters",
    "dense_twin",
    "flops_per_token",
]
