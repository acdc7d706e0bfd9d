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
from sparsezoo_jax.models.mtp import same_document, shifted

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
    log_z_BT, target_logits_BT = _log_z_and_targets(logits_BTV, targets_BT)
    return TokenLoss(
        cross_entropy_sum=jnp.sum((log_z_BT - target_logits_BT) * weights_BT),
        z_sum=jnp.sum(jnp.square(log_z_BT) * weights_BT),
        count=jnp.sum(weights_BT),
    )


@jax.custom_vjp
def _log_z_and_targets(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logarithm of the partition function, and the logit of the target, [B, T] each."""

    def looked_up(logits_BTV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]

    def compared(logits_BTV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0.0), axis=-1)

    # Comparing merges into the pass that sums, where a lookup would have accelerators write the logits down once more.
    # For a CPU a lookup is the faster.
    target_logits_BT = jax.lax.platform_dependent(logits_BTV, cpu=looked_up, default=compared)
    return jax.nn.logsumexp(logits_BTV, axis=-1), target_logits_BT


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _log_z_forward(logits_BTV: jax.Array, targets_BT: jax.Array):
    found = _log_z_and_targets(logits_BTV, targets_BT)
    return found, (logits_BTV, targets_BT, found[0])


def _log_z_backward(residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    logits_BTV, targets_BT, log_z_BT = residuals
    log_z_gradient_BT, target_gradient_BT = cotangents
    gradient_BTV = jnp.exp(logits_BTV - log_z_BT[..., None]) * log_z_gradient_BT[..., None]

    def compared(gradient_BTV: jax.Array, update_BT: jax.Array) -> jax.Array:
        return gradient_BTV + jnp.where(_is_target(gradient_BTV, targets_BT), update_BT[..., None], 0.0)

    def scattered(gradient_BTV: jax.Array, update_BT: jax.Array) -> jax.Array:
        rows = jnp.indices(targets_BT.shape, sparse=True)
        return gradient_BTV.at[(*rows, targets_BT)].add(update_BT)

    # Likewise, products that read the gradient make it themselves. CPUs write it down, and add to few entries faster.
    found = jax.lax.platform_dependent(gradient_BTV, target_gradient_BT, cpu=scattered, default=compared)
    return found, None


_log_z_and_targets.defvjp(_log_z_forward, _log_z_backward)


def chunked_token_loss(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[jax.Array, TokenLoss]:
    """`objective(token_loss(logits_of(hidden), ...))` with the logits of `chunk` positions of each sequence at a time.

    Where a gradient is asked for, that of each chunk is made with its loss, so that no logits are computed twice. A
    chunk takes every (T / chunk)-th position, so that a sequence split over devices is split in every chunk.

    Returns:
      The objective, and the sums that it is made of, which have no gradient.

    Raises:
      ConfigError: `chunk` does not divide T.
    """
    length = hidden_BTD.shape[1]
    require(length % chunk == 0, "train.loss_chunk", chunk, f"must divide the sequence length of {length}")

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, length // chunk, *x.shape[2:]), 2, 0)

    pieces = (chunks(hidden_BTD), chunks(targets_BT), chunks(mask_BT))
    # Weights that `logits_of` holds become arguments, for a custom gradient is one of arguments.
    project, weights = jax.closure_convert(logits_of, pieces[0][0])

    def piece_loss(weights: list[jax.Array], hidden_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array):
        sums = token_loss(project(hidden_BTD, *weights), targets_BT, mask_BT)
        return objective(sums, z_loss), sums

    def add(total: Any, new: Any) -> Any:
        return jax.tree.map(jnp.add, total, new)

    nothing = (jnp.float32(0.0), TokenLoss(*(jnp.float32(0.0) for _ in TokenLoss._fields)))

    @jax.custom_vjp
    def whole(weights: list[jax.Array], pieces: tuple[jax.Array, ...]):
        return jax.lax.scan(lambda total, piece: (add(total, piece_loss(weights, *piece)), None), nothing, pieces)[0]

    def forward(weights: list[jax.Array], pieces: tuple[jax.Array, ...]):
        def body(carry: Any, piece: tuple[jax.Array, ...]):
            new, (weight_gradients, hidden_gradient) = gradient(weights, *piece)
            return add(carry, (new, weight_gradients)), hidden_gradient

        gradient = jax.value_and_grad(piece_loss, argnums=(0, 1), has_aux=True)
        carry = (nothing, jax.tree.map(jnp.zeros_like, weights))
        (total, weight_gradients), hidden_gradients = jax.lax.scan(body, carry, pieces)
        return total, (weight_gradients, hidden_gradients)

    def backward(gradients: Any, cotangents: Any):
        weight_gradients, hidden_gradients = jax.tree.map(lambda x: x * cotangents[0].astype(x.dtype), gradients)
        return weight_gradients, (hidden_gradients, None, None)

    whole.defvjp(forward, backward)
    total, sums = whole(weights, pieces)
    return total, jax.lax.stop_gradient(sums)


def objective(sums: TokenLoss, z_loss: float) -> jax.Array:
    """What is trained on: the sum of cross-entropy and `z_loss` times that of log^2 Z, float32 scalar."""
    return sums.cross_entropy_sum + z_loss * sums.z_sum


def model_loss(
    model: Any,
    batch: Batch,
    chunk: int | None = None,
    z_loss: float = 0.0,
    arguments: Mapping[str, jax.Array] = {},
    further_targets: jax.Array | None = None,
) -> tuple[jax.Array, TokenLoss, ModelOutput]:
    """A model's objective on a batch (`objective`), the sums that it is made of, and what the model returned.

    Only the objective and what the model returned have gradients. A model with a method `loss_sums` of its output and
    the batch may have a loss of its own in place of the cross-entropy: its sum over targets, and their number.

    Args:
      batch: arrays [B, T]: tokens, targets, segment_ids, positions (int) and mask (bool).
      chunk: positions of a sequence whose logits exist at one time; None: all. The model then has to take
        `logits=False`, return its final state as `hidden` and `tables`, and have a method `logits_of` of both.
      arguments: more arguments of the model's call, by name.
      further_targets: float [depths], what the losses of further tokens are divided by; None: `count_further_targets`
        of this batch. For a part of a larger batch: its share of the larger batch's.

    A model that predicts further tokens (`models.mtp`) gets their loss as `mtp`, the mean over the depths: each is the
    mean over the tokens that have a target of their own document, wherever the mask lets that target count.
    """
    ahead = predicts_ahead(model)
    if chunk is None and not ahead:
        out = call_model(model, batch, **arguments)
        own = model.loss_sums(out, batch) if hasattr(model, "loss_sums") else None
        if own is None:
            with jax.named_scope("loss"):
                sums = token_loss(out.logits, batch["targets"], batch["mask"])
        else:
            sums = TokenLoss(cross_entropy_sum=own[0], z_sum=jnp.float32(0.0), count=own[1])
        return objective(sums, z_loss), jax.lax.stop_gradient(sums), out
    out: Any = call_model(model, batch, logits=False, **arguments)
    logits_of = partial(model.logits_of, tables=out.tables)

    def loss(hidden_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, z_loss: float):
        if chunk is not None:
            return chunked_token_loss(logits_of, hidden_BTD, targets_BT, mask_BT, chunk, z_loss)
        sums = token_loss(logits_of(hidden_BTD), targets_BT, mask_BT)
        return objective(sums, z_loss), jax.lax.stop_gradient(sums)

    with jax.named_scope("loss"):
        total, sums = loss(out.hidden, batch["targets"], batch["mask"], z_loss)
    if not ahead:
        return total, sums, out
    if further_targets is None:
        further_targets = count_further_targets(batch, len(out.ahead))
    losses = []
    for depth, (hidden_BTD, valid_BT) in enumerate(out.ahead, 1):
        targets_BT, mask_BT = (shifted(batch[name], depth) for name in ("targets", "mask"))
        own, _ = loss(hidden_BTD, targets_BT, mask_BT & valid_BT, 0.0)
        count = further_targets[depth - 1]
        losses.append(own / jnp.where(count > 0, count, 1))
    return total, sums, out._replace(losses={**out.losses, "mtp": jnp.mean(jnp.stack(losses))})


def count_further_targets(batch: Batch, depths: int) -> jax.Array:
    """Number of tokens of a batch that have a target 1, .. `depths` places after the next token, float32 [depths]."""
    counts = [
        jnp.sum(shifted(batch["mask"], depth) & same_document(batch["segment_ids"], depth), dtype=jnp.float32)
        for depth in range(1, depths + 1)
    ]
    return jnp.stack(counts) if counts else jnp.zeros(0, jnp.float32)


def predicts_ahead(model: Any) -> bool:
    """Whether a call of the model, in the mode that it is in, predicts further tokens."""
    return bool(getattr(model, "mtp", ())) and not model.deterministic
