"""WINA's transformation (arXiv 2505.19427): sublayers read the stream in a basis in which channels matter unlike.

The basis Q of a sublayer are the directions of its input by which one of its matrices, k or gate (up in a plain
network), maps it most: the left singular vectors of W [D, O] after the gains of the norm before it are folded in. Its
rows in that basis are orthogonal, so that the error of leaving channels out is exactly that of their scores. With
R = diag(1 / g) Q before the maps and Q^T diag(g) W in their place, a layer that leaves nothing out computes the same.

The authors rotate the residual stream itself, by a product of D x D matrices at each of its additions; the products
are as many here, and the stream stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.masks import STREAM_MAPS
from sparsezoo_jax.models.matrices import SUBLAYERS, find
from sparsezoo_jax.sparsification.placement import like

_REFERENCES = ("k", "gate", "up")


def basis(weight_DO: np.ndarray, gain_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R and its inverse, float64 [D, D], for the matrix by which directions are told apart.

    Gains that are (nearly) 0 count as 1, for a channel can't be had back from what they leave of it.
    """
    gain_D = np.where(np.abs(gain_D) > 1e-6 * np.max(np.abs(gain_D)), gain_D, 1.0).astype(np.float64)
    q_DD, _, _ = np.linalg.svd(gain_D[:, None] * weight_DO.astype(np.float64), full_matrices=True)
    return q_DD / gain_D[:, None], q_DD.T * gain_D


def rotate(model: Decoder) -> None:
    """Give the layers of a sparsified model their bases; those of `wrapped` are identities."""
    for segment in model.segments:
        for block in segment.blocks:
            for sublayer in SUBLAYERS:
                part: Any = getattr(block, sublayer)
                if getattr(part, "rotation", None) is not None:
                    _rotate(part, getattr(getattr(block, f"{sublayer}_residual"), "pre", None), model.config.d_model)


def _rotate(part: Any, norm: Any, d_model: int) -> None:
    """Rotate one sublayer, stacked layers each by their own basis."""
    params = {name: find(part.inner, path) for name, path in part.inner.matrices.items() if name in STREAM_MAPS}
    reference = next(name for name in _REFERENCES if name in params)
    rotation = np.asarray(part.rotation.rotation_DD[...], np.float64)
    layers = len(rotation)
    gains_LD = np.ones((layers, d_model))
    if norm is not None:
        gains_LD = np.asarray(norm.scale[...], np.float64) + (1 if norm.config.zero_centered else 0)
    weights = {name: np.asarray(param[...]) for name, param in params.items()}
    rotated = {name: np.empty_like(weight) for name, weight in weights.items()}
    for layer in range(layers):
        forth_DD, back_DD = basis(weights[reference][layer].reshape(d_model, -1), gains_LD[layer])
        rotation[layer] = forth_DD
        for name, weight in weights.items():
            own = back_DD @ weight[layer].reshape(d_model, -1).astype(np.float64)
            rotated[name][layer] = own.reshape(weight[layer].shape)
    part.rotation.rotation_DD[...] = like(rotation, part.rotation.rotation_DD[...])
    for name, param in params.items():
        param[...] = like(rotated[name], param[...])
