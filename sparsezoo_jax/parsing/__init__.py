"""Model parsing (after arXiv 2303.07474): what attacks tell of a classifier of images, and gradients of a decoder."""

from sparsezoo_jax.parsing.attacks import ATTACKS, AttackConfig, perturbations
from sparsezoo_jax.parsing.gradients import Trained, gradient_statistics, probe, statistics, train_decoders
from sparsezoo_jax.parsing.intervals import Share, share_of
from sparsezoo_jax.parsing.parser import TrainedParser, train_parser
from sparsezoo_jax.parsing.victims import Victims, train_victims

__all__ = [
    "ATTACKS",
    "AttackConfig",
    "Share",
    "Trained",
    "TrainedParser",
    "Victims",
    "gradient_statistics",
    "perturbations",
    "probe",
    "share_of",
    "statistics",
    "train_decoders",
    "train_parser",
    "train_victims",
]
