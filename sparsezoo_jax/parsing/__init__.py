"""Model parsing: what the gradients of a decoder tell about it (after arXiv 2303.07474, which asks it of attacks)."""

from sparsezoo_jax.parsing.gradients import Trained, gradient_statistics, probe, statistics, train_decoders
from sparsezoo_jax.parsing.intervals import Share, share_of

__all__ = ["Share", "Trained", "gradient_statistics", "probe", "share_of", "statistics", "train_decoders"]
