"""The model of a configuration: of words, or of images."""

from __future__ import annotations

from typing import Any

from flax import nnx

from sparsezoo_jax.models.config import DecoderConfig
from sparsezoo_jax.models.decoder import Decoder
from sparsezoo_jax.models.encoder import Encoder


def build_model(config: DecoderConfig, rngs: nnx.Rngs) -> Any:
    """A new `Decoder`, or an `Encoder` where `config.images` has patches; both are called alike."""
    return (Decoder if config.images.patch is None else Encoder)(config, rngs=rngs)
