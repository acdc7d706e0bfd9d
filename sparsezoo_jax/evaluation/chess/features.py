"""Features to score: any function from tokens to activations; here those of a decoder's FFN."""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.records import FFN_GATE


class Features(Protocol):
    """What is scored: features of every token. A sparse autoencoder is one by its encoder's output."""

    def __call__(self, tokens_BT: np.ndarray, segment_ids_BT: np.ndarray, /) -> np.ndarray:
        """Activations [B, T, F] of token ids int32 [B, T]; segment ids are 1, and 0 for padding behind a game."""
        ...


def default_layer(layers: int) -> int:
    """The layer at three quarters of the depth, from 1: 6 of 8, as in the MoE-X paper (arXiv 2503.07639, Fig. 11)."""
    return max(1, round(0.75 * layers))


def ffn_features(model: Decoder, layer: int | None = None) -> Features:
    """The hidden units of a layer's FFN after the non-linearity (of experts: times their gates).

    Args:
      model: the decoder.
      layer: from 1; None is `default_layer`.

    Raises:
      ConfigError: no such layer, or one whose FFN has no hidden units to show.
    """
    layers = model.config.layers
    layer = default_layer(layers) if layer is None else layer
    require(1 <= layer <= layers, "chess.layer", layer, f"must be from 1 to {layers}")
    # Unrolled, so that the arrays of other layers are never made.
    graphdef, state = nnx.split(model.unstacked())

    @jax.jit
    def read(state, tokens_BT, segment_ids_BT):
        model = nnx.merge(graphdef, state)
        out = model(tokens_BT, segment_ids=segment_ids_BT, logits=False, record={FFN_GATE})
        return out.records[FFN_GATE][layer - 1] if FFN_GATE in out.records else None

    def features(tokens_BT: np.ndarray, segment_ids_BT: np.ndarray) -> np.ndarray:
        hidden_BTF = read(state, tokens_BT, segment_ids_BT)
        require(hidden_BTF is not None, "chess.layer", layer, "its FFN records no hidden units (ffn_gate)")
        return np.asarray(hidden_BTF)

    return features
