"""The supervised contrastive loss, and the vote of the nearest kept examples.

Shapes: N examples, M kept ones, D numbers of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def normalised(x_ND: jax.Array) -> jax.Array:
    """Rows of length 1; those of zeros stay."""
    return x_ND * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_ND), axis=-1, keepdims=True), 1e-12))


def contrastive_loss(x_ND: jax.Array, labels_N: jax.Array, temperature: float) -> jax.Array:
    """How far examples of one class are from each other, and near those of others.

    Mean over examples i that have others P(i) of their class of
    `-1/|P(i)| sum_{p in P(i)} log( exp(z_i z_p / temperature) / sum_{a != i} exp(z_i z_a / temperature) )`, where z are
    the examples at length 1. 0 where none has another.

    Source: "Supervised Contrastive Learning" (arXiv 2004.11362), equation 2.
    """
    z_ND = normalised(x_ND)
    alike_NN = z_ND @ z_ND.T / temperature
    itself_NN = jnp.eye(len(z_ND), dtype=bool)
    log_NN = alike_NN - jax.nn.logsumexp(alike_NN, axis=1, where=~itself_NN, keepdims=True)
    of_class_NN = (labels_N[:, None] == labels_N) & ~itself_NN
    count_N = jnp.sum(of_class_NN, axis=1)
    mean_N = -jnp.sum(jnp.where(of_class_NN, log_NN, 0), axis=1) / jnp.maximum(count_N, 1)
    return jnp.sum(jnp.where(count_N > 0, mean_N, 0)) / jnp.maximum(jnp.sum(count_N > 0), 1)


def nearest_vote(
    x_ND: np.ndarray, kept_MD: np.ndarray, kept_labels_M: np.ndarray, units_D: np.ndarray, neighbours: int
) -> np.ndarray:
    """The class of most of the `neighbours` nearest kept examples, by the cosine over `units_D`; int [N].

    Of classes with equally many votes that of the nearest example is taken.
    """
    query, kept = (np.asarray(normalised(jnp.asarray(x)[:, units_D])) for x in (x_ND, kept_MD))
    order = np.argsort(-(query @ kept.T), axis=1, kind="stable")[:, :neighbours]
    votes = kept_labels_M[order]
    count = np.sum(votes[:, :, None] == votes[:, None, :], axis=2)
    return votes[np.arange(len(votes)), np.argmax(count, axis=1)]
