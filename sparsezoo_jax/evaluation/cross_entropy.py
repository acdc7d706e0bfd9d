"""Cross-entropy of next tokens, whole or a few positions at a time where the logits of all would not fit.

Shape letters: B batch, T position, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require

Batch = Mapping[str, jax.Array]


class TokenLoss(NamedTuple):
    """Sums over target tokens, so that several micro-batches add up to exactly one large batch."""

    cross_entropy_sum: jax.Array
    """Sum of -log p(target), nats, float32 scalar."""
    z_sum: jax.Array
    """Sum of log^2 Z, float32 scalar."""
    count: jax.Array
    """Number of target tokens, float32 scalar."""


class ModelOutput(Protocol):
    """What a model returns."""

    @property
    def logits(self) -> jax.Array:
        """[B, T, V]."""
        ...

    @property
    def losses(self) -> dict[str, jax.Array]:
        """Auxiliary losses, scalars."""
        ...

    @property
    def stats(self) -> dict[str, jax.Array]:
        """Statistics, one value a layer, averaged over tokens."""
        ...


def call_model(model: Any, batch: Batch, **flags: Any) -> ModelOutput:
    """The model's output on a batch as the data pipeline gives it."""
    return model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], **flags)


def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> TokenLoss:
    """Cross-entropy and squared log-partition of the target tokens, in float32.

    Shapes: logits [B, T, V] of any float type, targets int [B, T], mask bool [B, T] (true where there is a target).
    Where the mask is false the target may be any number, and logits that are not finite do no harm.
    """
    # Masked positions are replaced before the logarithm: 0 * nan would put nan into the gradient.
    logits_BTV = jnp.where(mask_BT[..., None], logits_BTV.astype(jnp.float32), 0.0)
    targets_BT = jnp.where(mask_BT, targets_BT, 0)
    weights_BT = mask_BT.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return TokenLoss(
        cross_entropy_sum=jnp.sum((log_z_BT - target_logits_BT) * weights_BT),
        z_sum=jnp.sum(jnp.square(log_z_BT) * weights_BT),
        count=jnp.sum(weights_BT),
    )


def chunked_token_loss(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    chunk: int,
) -> TokenLoss:
    """`token_loss(logits_of(hidden), ...)` with the logits of only `chunk` positions of each sequence at a time.

    The backward pass computes them again. A chunk takes every (T / chunk)-th position, so that a sequence split over
    devices is split in every chunk.

    Raises:
      ConfigError: `chunk` does not divide T.
    """
    length = hidden_BTD.shape[1]
    require(length % chunk == 0, "train.loss_chunk", chunk, f"must divide the sequence length of {length}")

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, length // chunk, *x.shape[2:]), 2, 0)

    def body(total: TokenLoss, piece: tuple[jax.Array, jax.Array, jax.Array]):
        hidden, targets, mask = piece
        return jax.tree.map(jnp.add, total, token_loss(logits_of(hidden), targets, mask)), None

    zero = TokenLoss(*(jnp.float32(0.0) for _ in TokenLoss._fields))
    pieces = (chunks(hidden_BTD), chunks(targets_BT), chunks(mask_BT))
    return jax.lax.scan(jax.checkpoint(body), zero, pieces)[0]


def model_loss(model: Any, batch: Batch, chunk: int | None = None) -> tuple[TokenLoss, ModelOutput]:
    """A model's loss on a batch, and what it returned.

    Args:
      batch: arrays [B, T]: tokens, targets, segment_ids, positions (int) and mask (bool).
      chunk: positions of a sequence whose logits exist at one time; None: all. The model then has to take
        `logits=False`, return its final state as `hidden` and `tables`, and have a method `logits_of` of both.
    """
    if chunk is None:
        out = call_model(model, batch)
        return token_loss(out.logits, batch["targets"], batch["mask"]), out
    out: Any = call_model(model, batch, logits=False)
    logits_of = partial(model.logits_of, tables=out.tables)
    return chunked_token_loss(logits_of, out.hidden, batch["targets"], batch["mask"], chunk), out
