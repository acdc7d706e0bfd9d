"""Transformers that are sparse from the first training step, in JAX and Flax NNX."""

__version__ = "0.1.0"
