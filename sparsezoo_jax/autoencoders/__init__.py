"""Sparse autoencoders over a trained model's activations: dictionaries of features to compare sparse models with."""

from sparsezoo_jax.autoencoders.config import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    SAEConfig,
    SAETrainConfig,
    StandardSAE,
    TopKSAE,
)
from sparsezoo_jax.autoencoders.model import Encoder, SparseAutoencoder
from sparsezoo_jax.autoencoders.store import SAERun, load_sae, save_sae
from sparsezoo_jax.autoencoders.training import Trainer

__all__ = [
    "GBASAE",
    "BatchTopKSAE",
    "Encoder",
    "FeatureChoiceSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "SAEConfig",
    "SAERun",
    "SAETrainConfig",
    "SparseAutoencoder",
    "StandardSAE",
    "TopKSAE",
    "Trainer",
    "load_sae",
    "save_sae",
]
