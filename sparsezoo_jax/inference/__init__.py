"""Decoding: sampling, the token loop, verification of drafts."""

from sparsezoo_jax.inference.cost import read_per_token
from sparsezoo_jax.inference.generation import Engine, Generation, GenerationStats, generate_tokens
from sparsezoo_jax.inference.prompt_lookup import PromptLookup
from sparsezoo_jax.inference.sampling import Sampling, sample

__all__ = [
    "Engine",
    "Generation",
    "GenerationStats",
    "PromptLookup",
    "Sampling",
    "generate_tokens",
    "read_per_token",
    "sample",
]
