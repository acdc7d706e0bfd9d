"""Choice of the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import require

#: Stands for a token where there are no probabilities to draw it from.
NO_TOKEN = -1
#: Below this temperature the likeliest token is all but certain, and logits divided by it may not be finite.
_GREEDY = 1e-4


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; filters apply in the order temperature, top-k, top-p, min-p.

    `temperature` 0, and what is close to it, is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        require(self.temperature >= 0, "--temperature", self.temperature, "must be 0 or above")
        require(self.top_k >= 0, "--top-k", self.top_k, "must be 0 (off) or above")
        require(0 < self.top_p <= 1, "--top-p", self.top_p, "must be above 0 and at most 1 (off)")
        require(0 <= self.min_p < 1, "--min-p", self.min_p, "must be at least 0 (off) and below 1")

    def form(self) -> Sampling:
        """What a program has to know: filters that are on have any number, which `numbers` gives it when it runs."""
        temperature = 0.0 if self.temperature < _GREEDY else 1.0
        return Sampling(temperature, self.top_k, 0.5 if self.top_p < 1 else 1.0, 0.5 if self.min_p > 0 else 0.0)

    def numbers(self) -> np.ndarray:
        """Temperature, top-p and min-p, float32 [3]."""
        return np.array([self.temperature, self.top_p, self.min_p], np.float32)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, numbers: jax.Array | None = None) -> jax.Array:
    """Draw tokens int32 [B] from logits [B, V], each row with its own key; `NO_TOKEN` where these are not finite.

    With `numbers` (see `Sampling.numbers`) those of `sampling` only say which filters are on.
    """
    largest_B = jnp.max(logits_BV, axis=-1)  # NaN if one is
    return jnp.where(jnp.isfinite(largest_B), _sample(logits_BV, keys_B, sampling, numbers), NO_TOKEN)


def likeliest(logits: jax.Array) -> jax.Array:
    """The likeliest token, int32 [...] of logits [..., V]; `NO_TOKEN` where these are not finite."""
    found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), found, NO_TOKEN)


def _sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, numbers: jax.Array | None) -> jax.Array:
    if sampling.temperature < _GREEDY:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    temperature, top_p, min_p = sampling.numbers() if numbers is None else numbers
    logits_BV = logits_BV / temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays when the tokens before it do not make up top_p yet: the first one always stays.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= lowest, logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        # Ratios of probabilities are differences of logits, whatever was filtered out before.
        lowest = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
        logits_BV = jnp.where(logits_BV >= lowest, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
