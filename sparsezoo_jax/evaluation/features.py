"""Features to score or to explain: any function from tokens to activations; here those of a decoder's FFN."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.records import FFN_GATE


class Features(Protocol):
    """Features of every token. A sparse autoencoder is one by its encoder's output."""

    def __call__(self, tokens_BT: Any, segment_ids_BT: Any, /) -> Any:
        """Activations [B, T, F] of token ids int32 [B, T]; segment ids are 0 for padding."""
        ...


def default_layer(layers: int) -> int:
    """The layer at three quarters of the depth, from 1: 6 of 8, as in the MoE-X paper (arXiv 2503.07639, Fig. 11)."""
    return max(1, round(0.75 * layers))


def ffn_features(model: Decoder, layer: int | None = None, *, field: str = "layer") -> Features:
    """The hidden units of a layer's FFN after the non-linearity (of experts: times their gates).

    Args:
      model: the decoder.
      layer: from 1; None is `default_layer`.
      field: what errors call the layer.

    Raises:
      ConfigError: no such layer, or one whose FFN has no hidden units to show.
    """
    layers = model.config.layers
    layer = default_layer(layers) if layer is None else layer
    require(1 <= layer <= layers, field, layer, f"must be from 1 to {layers}")
    # Unrolled, so that the arrays of other layers are never made.
    graphdef, state = nnx.split(model.unstacked())

    @jax.jit
    def read(state, tokens_BT, segment_ids_BT):
        out = nnx.merge(graphdef, state)(tokens_BT, segment_ids=segment_ids_BT, logits=False, record={FFN_GATE})
        return out.records[FFN_GATE][layer - 1] if FFN_GATE in out.records else None

    def features(tokens_BT: Any, segment_ids_BT: Any) -> Any:
        hidden_BTF = read(state, jnp.asarray(tokens_BT), jnp.asarray(segment_ids_BT))
        require(hidden_BTF is not None, field, layer, "its FFN records no hidden units (ffn_gate)")
        return hidden_BTF

    return features
