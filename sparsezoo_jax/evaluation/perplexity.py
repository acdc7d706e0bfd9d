"""Loss, perplexity, bits per byte and sparsity of a model over batches of a corpus."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import DataError


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


@partial(jax.jit, static_argnums=0)
def _eval_step(graphdef: nnx.GraphDef, state: Any, batch: Mapping[str, jax.Array]):
    model = nnx.merge(graphdef, state)
    out = model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    target = jnp.take_along_axis(out.logits, batch["targets"][..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(out.logits, axis=-1) - target
    mask = batch["mask"]
    return jnp.sum(losses * mask), jnp.sum(mask), out.stats


def evaluate_model(
    model: nnx.Module, batches: Iterable[Mapping[str, Any]], bytes_per_token: float | None = None
) -> Evaluation:
    """Average a model's cross-entropy and statistics over `batches` of a data pipeline.

    Args:
      model: called as `model(tokens, segment_ids=, positions=)`, returns logits and stats.
      batches: dicts of [B, T] arrays tokens, targets, segment_ids, positions, mask, all of one shape.
      bytes_per_token: of the split, to report bits per byte.

    Raises:
      DataError: the batches hold no target token.
    """
    graphdef, state = nnx.split(model)
    results = [_eval_step(graphdef, state, dict(batch)) for batch in batches]
    fetched = jax.device_get(results)
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
