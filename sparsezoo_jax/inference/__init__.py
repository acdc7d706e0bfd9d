"""Decoding: sampling, the layout of weights, the token loop, verification of drafts."""

from sparsezoo_jax.inference.cost import read_per_token
from sparsezoo_jax.inference.generation import Engine, Generation, GenerationStats, generate_tokens
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.packing import PackedDecoder, packed, restore
from sparsezoo_jax.inference.prompt_lookup import PromptLookup
from sparsezoo_jax.inference.sampling import Sampling, sample

__all__ = [
    "DecodingLayout",
    "Engine",
    "Formats",
    "Generation",
    "GenerationStats",
    "PackedDecoder",
    "PromptLookup",
    "Sampling",
    "generate_tokens",
    "packed",
    "packs",
    "read_per_token",
    "restore",
    "sample",
]
