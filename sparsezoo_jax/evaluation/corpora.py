"""Evaluation of a model on each corpus of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from sparsezoo_jax.data import Prepared, PreparedSplit, components_of
from sparsezoo_jax.evaluation.perplexity import Evaluation, evaluate_model


def evaluate_corpora(
    model: nnx.Module,
    prepared: Prepared,
    batches: Callable[[PreparedSplit], Iterable[Mapping[str, Any]]],
    **options: Any,
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Evaluate a model on a split: on that of each corpus of a mixture by itself, and on the mixture.

    Args:
      prepared: what to evaluate on.
      batches: of one corpus.
      options: as for `evaluate_model`.

    Returns:
      Averages over the split, for a mixture those of `mean`; and the corpora of a mixture by name.
    """
    corpora = components_of(prepared)
    found = [
        evaluate_model(model, batches(corpus.split), corpus.split.bytes_per_token, **options) for corpus in corpora
    ]
    if isinstance(prepared, PreparedSplit):
        return found[0], {}
    names = [corpus.name for corpus in corpora]
    return mean(found, [corpus.weight for corpus in corpora]), dict(zip(names, found, strict=True))


def mean(evaluations: Sequence[Evaluation], weights: Sequence[float]) -> Evaluation:
    """Averages over a mixture with these shares of the tokens (together 1), however much of each corpus was read."""

    def average(values: Sequence[Any]) -> Any:
        return np.tensordot(weights, np.asarray(values, np.float64), axes=1)

    sizes = [evaluation.bytes_per_token for evaluation in evaluations]
    return Evaluation(
        loss=float(average([evaluation.loss for evaluation in evaluations])),
        tokens=sum(evaluation.tokens for evaluation in evaluations),
        bytes_per_token=None if None in sizes else float(average(sizes)),
        stats={name: average([e.stats[name] for e in evaluations]).tolist() for name in evaluations[0].stats},
    )


def by_name(corpora: Mapping[str, Evaluation]) -> dict[str, float]:
    """Loss and bits per byte of each corpus as `<name>/loss` and `<name>/bits_per_byte`, for metric writers."""
    rows = {f"{name}/loss": found.loss for name, found in corpora.items()}
    bits = {f"{name}/bits_per_byte": found.bits_per_byte for name, found in corpora.items()}
    return rows | {name: value for name, value in bits.items() if value is not None}


def as_figures(prepared: Prepared, corpora: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """For JSON: the weight of each corpus in the mixture, its loss, perplexity, bits per byte and tokens."""
    return {
        corpus.name: {
            "weight": corpus.weight,
            **{name: value for name, value in corpora[corpus.name].as_dict().items() if not isinstance(value, list)},
        }
        for corpus in components_of(prepared)
        if corpus.name in corpora
    }
