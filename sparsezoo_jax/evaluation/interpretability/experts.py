"""How well the gate of a mixture of sparse experts does what it is for, and how evenly it shares out the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.evaluation.interpretability.contexts import Batch
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.records import EXPERT_SCORES, FFN_SCORES, GATE_SCORES


@dataclasses.dataclass(frozen=True)
class ExpertFigures:
    """One layer."""

    l0_by_expert: tuple[float, ...]
    """Active units that each expert would have for a token, mean over all tokens."""
    l0_chosen: float
    """Active units of a token's experts together, mean."""
    l0_not_chosen: float
    """Those of one of the other experts, mean; compare with `l0_chosen` / k."""
    l0_oracle: float
    """The least that as many experts could have, mean."""
    correlation: tuple[float, ...]
    """Of each expert's score with its active units over tokens; -1 is a perfect gate."""
    load: tuple[float, ...]
    """Share of the choices that fall on each expert."""
    load_entropy: float
    """Entropy of the load divided by its largest value: 1 is even, 0 one expert for all."""
    load_variation: float
    """Standard deviation of the load divided by its mean."""

    @property
    def oracle_gap(self) -> float:
        """Active units of the chosen experts beyond those of the best choice."""
        return self.l0_chosen - self.l0_oracle

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return {**dataclasses.asdict(self), "oracle_gap": self.oracle_gap}


@partial(jax.jit, static_argnums=(0, 1))
def _sums(graphdef: nnx.GraphDef, layer: int, state: Any, tokens_BT: jax.Array, segments_BT: jax.Array):
    names = (EXPERT_SCORES, FFN_SCORES, GATE_SCORES)
    out = nnx.merge(graphdef, state)(tokens_BT, segment_ids=segments_BT, logits=False, record=names)
    if any(name not in out.records for name in names):
        return None
    weights_BTE, pre_BTF, scores_BTE = (out.records[name][layer - 1] for name in names)
    l0_BTE = jnp.sum(pre_BTF.reshape(*weights_BTE.shape, -1) > 0, axis=-1, dtype=jnp.float32)
    real_BT1 = (segments_BT > 0)[..., None].astype(jnp.float32)
    chosen_BTE = (weights_BTE != 0) * real_BT1
    k = jnp.sum(weights_BTE != 0, axis=-1, keepdims=True)
    rank = jnp.arange(weights_BTE.shape[-1])
    least = jnp.sum(jnp.where(rank < k, jnp.sort(l0_BTE, axis=-1), 0) * real_BT1)

    def total(x_BTE: jax.Array) -> jax.Array:
        return jnp.sum(x_BTE * real_BT1, axis=(0, 1))

    return {
        "tokens": jnp.sum(real_BT1),
        "l0_E": total(l0_BTE),
        "chosen": jnp.sum(l0_BTE * chosen_BTE),
        "least": least,
        "choices_E": jnp.sum(chosen_BTE, axis=(0, 1)),
        "s_E": total(scores_BTE),
        "ss_E": total(jnp.square(scores_BTE)),
        "ll_E": total(jnp.square(l0_BTE)),
        "sl_E": total(scores_BTE * l0_BTE),
    }


def expert_figures(model: Decoder, batches: Iterable[Batch], layer: int) -> ExpertFigures | None:
    """Measure the experts of a layer (from 1) over batches; None for a layer without experts whose scores are recorded.

    Source: MoE-X (arXiv 2503.07639), appendix C and figure 9.
    """
    graphdef, state = nnx.split(model.unstacked())
    totals: dict[str, Any] = {}
    for batch in batches:
        sums = _sums(graphdef, layer, state, jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"]))
        if sums is None:
            return None
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    if not totals:
        return None
    n, choices_E = totals["tokens"], totals["choices_E"]
    mean_s, mean_l = totals["s_E"] / n, totals["l0_E"] / n
    spread = np.sqrt((totals["ss_E"] / n - mean_s**2) * (totals["ll_E"] / n - mean_l**2))
    correlation = (totals["sl_E"] / n - mean_s * mean_l) / np.maximum(spread, 1e-20)
    load_E = choices_E / choices_E.sum()
    used = load_E[load_E > 0]
    experts = len(load_E)
    rest = experts * n - choices_E.sum()
    return ExpertFigures(
        l0_by_expert=tuple(float(x) for x in mean_l),
        l0_chosen=float(totals["chosen"] / n),
        l0_not_chosen=float((totals["l0_E"].sum() - totals["chosen"]) / max(rest, 1)),
        l0_oracle=float(totals["least"] / n),
        correlation=tuple(float(x) for x in correlation),
        load=tuple(float(x) for x in load_E),
        load_entropy=float(-np.sum(used * np.log(used)) / np.log(experts)) if experts > 1 else 1.0,
        load_variation=float(load_E.std() / load_E.mean()),
    )
