"""What gradients tell of the decoder that they are of: statistics of those parameters that all decoders share.

A decoder's own FFN is left out: its gradients have other shapes, and rows of zeros where its neurons were idle, so that
nothing would be left to ask. The gradients of the embedding and of attention say it, if at all, indirectly.

Shapes: S seeds, N sequences, T tokens, F statistics, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.evaluation.cross_entropy import token_loss
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.training.state import ModelTemplate, flatten

STATISTICS = ("log rms", "log mean of magnitudes over rms", "log largest over rms", "log kurtosis")
_TINY = 1e-30


def statistics(gradient: jax.Array) -> jax.Array:
    """`STATISTICS` of the entries g of one gradient, float32 [4].

    With m_p the mean of |g|^p: log sqrt(m_2), log(m_1 / sqrt(m_2)), log(max |g| / sqrt(m_2)), log(m_4 / m_2^2).
    """
    magnitude = jnp.abs(gradient.astype(jnp.float32)).reshape(-1)
    rms = jnp.sqrt(jnp.mean(jnp.square(magnitude))) + _TINY
    ratio = magnitude / rms  # first, for fourth powers of small gradients are 0 in float32
    found = [rms, jnp.mean(ratio) + _TINY, jnp.max(ratio) + _TINY, jnp.mean(ratio**4) + _TINY]
    return jnp.log(jnp.stack(found))


def _loss(template: ModelTemplate, params: Any, variables: Any, tokens_NT: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next tokens of sequences."""
    logits = template.merge(params, variables)(tokens_NT[:, :-1]).logits
    out = token_loss(logits, tokens_NT[:, 1:], jnp.ones_like(tokens_NT[:, 1:], bool))
    return out.cross_entropy_sum / out.count


class Trained(NamedTuple):
    """Decoders of one configuration."""

    template: ModelTemplate
    params: Any
    """Parameters, each [S, ...]."""
    variables: Any
    """What else they have, [S, ...]."""
    losses: np.ndarray
    """Of the last step, [S]."""


def train_decoders(
    config: DecoderConfig,
    seeds: Sequence[int],
    text_NT: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> Trained:
    """A decoder for each seed of its start and of the order of its sequences, trained with Adam."""
    template = ModelTemplate(lambda rngs: Decoder(config, rngs=rngs))

    def start(seed: jax.Array) -> Any:
        return template.split(Decoder(config, rngs=nnx.Rngs(jax.random.key(seed))))

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    text = jnp.asarray(text_NT)

    def one(seed: jax.Array) -> Any:
        params, variables = start(seed)

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, moments = carry
            chosen = text[jax.random.randint(key, (batch_size,), 0, len(text))]
            loss, gradients = jax.value_and_grad(partial(_loss, template))(params, variables, chosen)
            updates, moments = optimizer.update(gradients, moments)
            return (optax.apply_updates(params, updates), moments), loss

        keys = jax.random.split(jax.random.key(seed), steps)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, variables, losses[-1]

    params, variables, losses = jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.asarray(seeds))
    return Trained(template, params, variables, np.asarray(losses))


def shared_paths(template: ModelTemplate) -> tuple[str, ...]:
    """Paths of the parameters that are no FFN's, sorted."""
    return tuple(sorted(path for path in template.parameters if "ffn" not in path.split("/")))


def gradient_statistics(trained: Trained, tokens_NT: np.ndarray) -> np.ndarray:
    """Statistics of the gradient of each sequence's loss, of each parameter of `shared_paths`: float32 [S, N, F]."""
    template, paths = trained.template, shared_paths(trained.template)

    def one(model: tuple[Any, Any]) -> jax.Array:
        params, variables = model

        def of_sequence(tokens_T: jax.Array) -> jax.Array:
            flat = flatten(jax.grad(partial(_loss, template))(params, variables, tokens_T[None]))
            return jnp.concatenate([statistics(flat[path]) for path in paths])

        return jax.lax.map(of_sequence, jnp.asarray(tokens_NT))

    return np.asarray(jax.jit(lambda models: jax.lax.map(one, models))((trained.params, trained.variables)))


def probe(
    x_NF: np.ndarray, labels_N: np.ndarray, test_MF: np.ndarray, *, decay: float = 1e-3, steps: int = 500
) -> np.ndarray:
    """The likeliest classes int [M] by a softmax regression on standardised statistics, with a penalty `decay` / 2 on
    the sum of squared weights.
    """
    mean_F, scale_F = x_NF.mean(0), x_NF.std(0) + 1e-6
    x, test = ((values - mean_F) / scale_F for values in (x_NF, test_MF))
    optimizer = optax.adam(0.05)

    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        logits_NK = x @ weights["map"] + weights["bias"]
        fit = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_NK, jnp.asarray(labels_N)))
        return fit + decay / 2 * jnp.sum(jnp.square(weights["map"]))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        weights, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(weights), moments)
        return (optax.apply_updates(weights, updates), moments), None

    classes = int(labels_N.max()) + 1
    weights = {"map": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    (weights, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((weights, optimizer.init(weights)))
    return np.argmax(test @ np.asarray(weights["map"]) + np.asarray(weights["bias"]), axis=1)
