"""Decoding: sampling and the token loop."""

from sparsezoo_jax.inference.generation import generate_tokens
from sparsezoo_jax.inference.sampling import Sampling, sample

__all__ = ["Sampling", "generate_tokens", "sample"]
