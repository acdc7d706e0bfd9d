"""Loss, perplexity, bits per byte and sparsity of a model over batches of a corpus."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation.cross_entropy import Batch, model_loss
from sparsezoo_jax.sharding import replicate


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Averages over all target tokens read."""

    loss: float
    """Cross-entropy in nats per token."""
    tokens: int
    """Target tokens read."""
    bytes_per_token: float | None
    """UTF-8 bytes of the split divided by its target tokens, where known."""
    stats: dict[str, list[float]]
    """Per-layer averages of the model's statistics, weighted by tokens."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Cross-entropy in bits, spread over the bytes that the tokens stand for."""
        return None if not self.bytes_per_token else self.loss / math.log(2) / self.bytes_per_token

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        row = {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens, **self.stats}
        return row if self.bits_per_byte is None else {**row, "bits_per_byte": self.bits_per_byte}

    def as_arrays(self) -> dict[str, Any]:
        """The figures by name, per-layer statistics as arrays, for metric writers."""
        return {k: np.asarray(v) if isinstance(v, list) else v for k, v in self.as_dict().items()}


@partial(jax.jit, static_argnums=(0, 1))
def _eval_step(graphdef: nnx.GraphDef, loss_chunk: int | None, state: Any, batch: Batch):
    _, sums, out = model_loss(nnx.merge(graphdef, state), batch, loss_chunk)
    # Every process reads the results, so they are not to be split.
    return jax.tree.map(replicate, (sums.cross_entropy_sum, sums.count, out.stats))


def evaluate_model(
    model: nnx.Module,
    batches: Iterable[Mapping[str, Any]],
    bytes_per_token: float | None = None,
    *,
    loss_chunk: int | None = None,
    to_device: Callable[[Mapping[str, Any]], Batch] = dict,
) -> Evaluation:
    """Average a model's cross-entropy and statistics over `batches` of a data pipeline.

    Args:
      model: called as `model(tokens, segment_ids=, positions=)`, returns logits and stats.
      batches: dicts of [B, T] arrays tokens, targets, segment_ids, positions, mask, all of one shape.
      bytes_per_token: of the split, to report bits per byte.
      loss_chunk: positions of each sequence whose logits exist at one time; None: all.
      to_device: puts a batch where the model's devices expect it.

    Raises:
      DataError: the batches hold no target token.
    """
    graphdef, state = nnx.split(model)
    fetched, pending = [], None
    for batch in batches:
        result = _eval_step(graphdef, loss_chunk, state, to_device(batch))
        # The device works on this batch while the host waits for the one before; more at a time would fill the device's
        # memory with batches, and make the forced devices of a CPU wait for each other for ever.
        if pending is not None:
            fetched.append(jax.device_get(pending))
        pending = result
    if pending is not None:
        fetched.append(jax.device_get(pending))
    losses, counts, stats = ([row[i] for row in fetched] for i in range(3))
    totals = np.asarray(counts, np.float64)
    if totals.sum() == 0:
        raise DataError("the split to evaluate on has no token to predict")
    weights = totals / totals.sum()
    per_layer = {
        name: [float(x) for x in np.atleast_1d(np.tensordot(weights, np.stack([s[name] for s in stats]), axes=1))]
        for name in stats[0]
    }
    loss = float(np.sum(np.asarray(losses, np.float64)) / totals.sum())
    return Evaluation(loss, int(totals.sum()), bytes_per_token, per_layer)
