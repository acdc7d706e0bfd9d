"""Features of a layer over sequences of a corpus: their activations, densities and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation.features import Features

Batch = Mapping[str, Any]


class Contexts(NamedTuple):
    """Sequences that were read, and the activations of chosen features."""

    tokens_CT: np.ndarray
    chosen_G: np.ndarray
    """Numbers of the features."""
    activations_CTG: np.ndarray
    """Their activations, float32."""
    density_F: np.ndarray
    """Share of the tokens that activate each feature (of all)."""
    l0: float
    """Features of a token, mean."""


def read_contexts(
    features: Features,
    batches: Callable[[], Iterable[Batch]],
    *,
    count: int,
    most: int,
    window: int,
    min_active: int,
    min_silent: int,
    rng: np.random.Generator,
) -> Contexts:
    """Read `count` sequences without padding twice: to find out which features are active, and for some of those.

    Up to `most` features are drawn from those active in at least `min_active` windows and silent in `min_silent`.

    Args:
      features: the features.
      batches: makes an iterator over batches of the split, the same every time.

    Raises:
      DataError: no whole sequence, or no feature that is active often enough.
    """
    windows = tokens = 0
    active_F: Any = 0
    fires_F: Any = 0
    whole: list[tuple[np.ndarray, np.ndarray]] = []
    for tokens_BT, segments_BT in _whole_sequences(batches(), count):
        codes = np.asarray(features(tokens_BT, segments_BT)) > 0
        fires_F = fires_F + codes.sum((0, 1))
        each = tokens_BT.shape[1] // window
        parts = codes[:, : each * window].reshape(-1, window, codes.shape[-1])
        active_F = active_F + parts.any(1).sum(0)
        windows, tokens = windows + len(parts), tokens + tokens_BT.size
        whole.append((tokens_BT, segments_BT))
    if not whole:
        raise DataError("the split has no sequence without padding")
    eligible = np.flatnonzero((active_F >= min_active) & (active_F <= windows - min_silent))
    if len(eligible) == 0:
        raise DataError(
            f"no feature is active in at least interpret.min_windows={min_active} of {windows} windows and silent in "
            "enough others; read more contexts or ask for fewer windows"
        )
    chosen_G = np.sort(rng.permutation(eligible)[:most])
    activations = [np.asarray(features(*batch)[..., chosen_G], np.float32) for batch in whole]
    return Contexts(
        np.concatenate([tokens for tokens, _ in whole]),
        chosen_G,
        np.concatenate(activations),
        fires_F / tokens,
        float(fires_F.sum() / tokens),
    )


def _whole_sequences(batches: Iterable[Batch], count: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Tokens and segments [B, T] of batches without padding, until `count` sequences are together."""
    left = count
    for batch in batches:
        tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
        if (segments > 0).all():
            yield tokens, segments
            left -= len(tokens)
            if left <= 0:
                return


def token_figures(tokens_CT: np.ndarray, activations_CT: np.ndarray) -> tuple[float, float]:
    """Of one feature's activation by token: entropy in nats, and the share of the most activating token."""
    mass = np.bincount(tokens_CT.reshape(-1), weights=np.maximum(activations_CT, 0).reshape(-1))
    p = mass[mass > 0] / mass.sum()
    return float(-np.sum(p * np.log(p))), float(p.max())
