"""Choice of the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; filters apply in the order temperature, top-k, top-p.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        require(self.temperature >= 0, "--temperature", self.temperature, "must be 0 or above")
        require(self.top_k >= 0, "--top-k", self.top_k, "must be 0 (off) or above")
        require(0 < self.top_p <= 1, "--top-p", self.top_p, "must be above 0 and at most 1 (off)")


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw tokens int32 [B] from logits [B, V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays when the tokens before it do not make up top_p yet: the first one always stays.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= lowest, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
