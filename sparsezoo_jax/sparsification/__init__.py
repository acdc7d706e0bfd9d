"""Sparsity after training: a trained model, some text, and a model that leaves out what matters least in it."""

from sparsezoo_jax.sparsification.calibration import Calibration, calibrate, thresholds
from sparsezoo_jax.sparsification.conversion import is_sparsified, sparsified_config, with_cuts, wrapped
from sparsezoo_jax.sparsification.methods import METHODS, Method

__all__ = [
    "METHODS",
    "Calibration",
    "Method",
    "calibrate",
    "is_sparsified",
    "sparsified_config",
    "thresholds",
    "with_cuts",
    "wrapped",
]
