"""What is kept of earlier tasks: some examples of each class, of images or of hidden activations in 8 bits."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Kept:
    """Examples of one task."""

    codes: np.ndarray
    """uint8 [N, ...]."""
    labels: np.ndarray
    scale: float | None
    """An activation is a code times this; None: these are images."""

    @property
    def values(self) -> np.ndarray:
        """Images as they are, or activations, float32 [N, F]."""
        return self.codes if self.scale is None else self.codes.astype(np.float32) * np.float32(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.codes.nbytes


def quantised(hidden_NF: np.ndarray) -> tuple[np.ndarray, float]:
    """uint8 codes of activations that are at least 0, and their scale: the largest becomes 255."""
    scale = float(hidden_NF.max()) / 255 or 1.0
    return np.rint(hidden_NF / scale).astype(np.uint8), scale


def drawn_of_each_class(labels: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """Indices of up to `count` examples of each class."""
    found = [draw.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.concatenate(found)


def kept_of(values: np.ndarray, labels: np.ndarray, count: int, draw: np.random.Generator) -> Kept:
    """Up to `count` examples of each class, of images uint8 or of activations."""
    chosen = drawn_of_each_class(labels, count, draw)
    if values.dtype == np.uint8:
        return Kept(values[chosen], labels[chosen], None)
    codes, scale = quantised(values[chosen])
    return Kept(codes, labels[chosen], scale)
