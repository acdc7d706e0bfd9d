"""Calibration: how far a model's probability of its likeliest token is from how often that token is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import DataError, require
from sparsezoo_jax.evaluation.cross_entropy import call_model, token_loss

BINS = 15


class BinSums(NamedTuple):
    """Sums over predictions, and over those in each bin of confidence; those of batches add up."""

    cross_entropy: jax.Array | np.ndarray
    """Sum of -log p(target), nats, float32 scalar."""
    count: jax.Array | np.ndarray
    """Predictions, float32 [bins]."""
    correct: jax.Array | np.ndarray
    """Those that are right, float32 [bins]."""
    confidence: jax.Array | np.ndarray
    """Sum of their confidences, float32 [bins]."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Agreement of confidence and accuracy over some predictions."""

    predictions: int
    loss: float
    """Cross-entropy, nats a token."""
    accuracy: float
    """Share of predictions whose likeliest token is the target."""
    confidence: float
    """Mean probability of the likeliest token."""
    ece: float
    """Expected calibration error: the mean over bins of |accuracy - confidence|, weighted by their predictions."""
    bins: list[int]
    """Predictions in each bin."""
    bin_accuracy: list[float | None]
    """Share of right ones in each bin; None in an empty one."""
    bin_confidence: list[float | None]

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, sums: BinSums) -> Calibration:
        """The figures of summed-up bins.

        Raises:
          DataError: there is no prediction.
        """
        loss, count, correct, confidence = (np.asarray(x, np.float64) for x in sums)
        total = count.sum()
        if total == 0:
            raise DataError("the split to evaluate on has no token to predict")

        def means(sums: np.ndarray) -> list[float | None]:
            return [float(x / n) if n else None for x, n in zip(sums, count, strict=True)]

        return cls(
            predictions=int(total),
            loss=float(loss / total),
            accuracy=float(correct.sum() / total),
            confidence=float(confidence.sum() / total),
            ece=float(np.abs(correct - confidence).sum() / total),
            bins=[int(n) for n in count],
            bin_accuracy=means(correct),
            bin_confidence=means(confidence),
        )


def bin_sums(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, bins: int = BINS) -> BinSums:
    """Predictions of the targets that the mask has, by confidence: equal bins of (0, 1], each with its upper end.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 2.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    confidence_BT = jnp.exp(jnp.max(logits_BTV, axis=-1) - jax.nn.logsumexp(logits_BTV, axis=-1))
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    bin_BT = jnp.clip(jnp.ceil(confidence_BT * bins).astype(jnp.int32) - 1, 0, bins - 1)

    def summed(values_BT: jax.Array) -> jax.Array:
        weights_BT = jnp.where(mask_BT, values_BT.astype(jnp.float32), 0)
        return jnp.zeros(bins, jnp.float32).at[bin_BT].add(weights_BT)

    counts = (summed(x_BT) for x_BT in (jnp.ones_like(confidence_BT), correct_BT, confidence_BT))
    return BinSums(token_loss(logits_BTV, targets_BT, mask_BT).cross_entropy_sum, *counts)


@partial(jax.jit, static_argnums=(0, 1))
def _step(graphdef: nnx.GraphDef, bins: int, state: Any, batch: Mapping[str, jax.Array]) -> BinSums:
    out = call_model(nnx.merge(graphdef, state), batch)
    return bin_sums(out.logits, batch["targets"], batch["mask"], bins)


def calibrate(
    model: nnx.Module,
    batches: Iterable[Mapping[str, Any]],
    bins: int = BINS,
    *,
    to_device: Callable[[Mapping[str, Any]], Any] = dict,
) -> Calibration:
    """Loss, accuracy and expected calibration error of next-token prediction over `batches` of a data pipeline.

    Args:
      model: called as `model(tokens, segment_ids=, positions=)`, returns logits.
      batches: dicts of [B, T] arrays tokens, targets, segment_ids, positions, mask, all of one shape.
      bins: of equal width.
      to_device: puts a batch where the model's devices expect it.

    Raises:
      DataError: the batches hold no target token.
    """
    require(bins > 0, "bins", bins, "must be above 0")
    graphdef, state = nnx.split(model)
    total = BinSums(*(np.zeros(shape) for shape in ((), bins, bins, bins)))
    for batch in batches:
        total = jax.tree.map(np.add, total, jax.device_get(_step(graphdef, bins, state, to_device(batch))))
    return Calibration.of(total)
