"""One decoder, composed of attention kinds, FFN kinds and residual kinds."""

from sparsezoo_jax.models import kinds as kinds  # registers the package's own kinds
from sparsezoo_jax.models.accounting import (
    ActivatedCount,
    ParameterCount,
    Sparsity,
    TrainFlops,
    activated_parameters,
    bytes_per_token,
    count_parameters,
    dense_twin,
    flops_per_token,
    train_flops_per_token,
)
from sparsezoo_jax.models.building import build_model
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.config import DecoderConfig
from sparsezoo_jax.models.contract import (
    ATTENTION_KINDS,
    FFN,
    FFN_KINDS,
    RESIDUAL_KINDS,
    Attention,
    AttentionKind,
    FFNKind,
    Head,
    Residual,
    ResidualKind,
    register_attention,
    register_ffn,
    register_residual,
)
from sparsezoo_jax.models.decoder import Decoder, Output
from sparsezoo_jax.models.encoder import Encoder

__all__ = [
    "ATTENTION_KINDS",
    "FFN",
    "FFN_KINDS",
    "RESIDUAL_KINDS",
    "ActivatedCount",
    "Attention",
    "AttentionKind",
    "BuildContext",
    "CallContext",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "FFNKind",
    "Head",
    "LayerAux",
    "Output",
    "ParameterCount",
    "Residual",
    "ResidualKind",
    "Sparsity",
    "TrainFlops",
    "activated_parameters",
    "build_model",
    "bytes_per_token",
    "count_parameters",
    "dense_twin",
    "flops_per_token",
    "register_attention",
    "register_ffn",
    "register_residual",
    "train_flops_per_token",
]
