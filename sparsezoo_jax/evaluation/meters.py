"""Meters of a model's sparsity: density, selection quality, score distribution, dead neurons, attended keys, per layer.

A layer gets the meters that its records allow (see `models.records`): a dense model has a density of 100 % and no
selection. `docs/evaluation.md` says how to read them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation.counts import Count, count_of
from sparsezoo_jax.evaluation.expert_meters import ExpertMeters, expert_meters
from sparsezoo_jax.evaluation.flow import StreamFlow, figures
from sparsezoo_jax.evaluation.summaries import BLOCKS, EDGES, NAMES, summarise_layer
from sparsezoo_jax.models import DecoderConfig, Sparsity
from sparsezoo_jax.models.config import LayerSpec

CURVE_POINTS = 128
"""Most points of a curve that is kept for plotting."""
QQ_POINTS = tuple(float(x) for x in np.arange(-3.5, 3.501, 0.25))
"""Quantiles of N(0, 1) at which those of the scores are taken."""


@dataclasses.dataclass(frozen=True)
class Activity:
    """Which neurons of a layer are active (output of the non-linearity is not 0)."""

    neurons: int
    active: Count
    """Active neurons of a token."""
    target: float | None
    """Active neurons that the selection aims at; None where nothing is selected by count."""
    density: float
    """Share of active neurons, mean over tokens."""
    density_std: float
    """Standard deviation of that share over tokens."""
    dead: int
    """Neurons that no token activated."""
    frequency: list[float]
    """Share of tokens that activate a neuron, most active first; at most `CURVE_POINTS` of the sorted neurons."""
    unions: dict[str, float] = dataclasses.field(default_factory=dict)
    """Share of the neurons that some token of a block of so many activates, mean over blocks: what a kernel computes
    that gathers the neurons of a block. Lengths of which the batches have no whole block are left out."""
    dynamic_dead: float = 0.0
    """Share of the neurons that are 0 for a token though not for all tokens, mean over tokens: the dynamic dead neuron
    rate (Activate-while-Pruning, arXiv 2212.06145). With the dead ones and the active ones it makes 1."""
    temporal_sparsity: float | None = None
    """Share of the neurons that are as for the token before, of the same document, mean over tokens: what decoding by
    changes leaves out (Delta Activation Layer, arXiv 2107.07305). None where no token has one before."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """How many keys the queries of a layer attend to; queries of all heads count alike."""

    attended: Count
    target: int | None
    """Keys that the selection aims at; None where all visible keys are attended."""
    visible: list[int]
    """Numbers of visible keys at which `attended_by_visible` is given (the upper end of an interval)."""
    attended_by_visible: list[float]
    """Attended keys, mean over the queries whose number of visible keys is in that interval."""
    attended_beyond_target: float | None
    """Attended keys, mean over the queries that see more than `target`; None where there are none."""


@dataclasses.dataclass(frozen=True)
class SelectionQuality:
    """A selection against the exact top k of the same scores, k as configured; means over rows."""

    rows: int
    """Tokens (FFN) or queries of one head that see more than k keys (attention) that were compared."""
    precision: float | None
    """Share of the selected that are in the exact top k; None where nothing was ever selected."""
    recall: float
    """Share of the exact top k that is selected."""
    f1: float
    jaccard: float
    selected_share: float
    """Share of entries above the threshold."""
    target_share: float
    """Share that k asks for."""


@dataclasses.dataclass(frozen=True)
class ScoreDistribution:
    """Selection scores (or pre-activations), standardised within their row, against N(0, 1)."""

    scores: int
    skewness: float
    """Third standardised moment; 0 for a normal distribution."""
    excess_kurtosis: float
    """Fourth standardised moment less 3; 0 for a normal distribution, above it for heavy tails."""
    normal_quantiles: list[float]
    score_quantiles: list[float]
    """Quantiles of the scores at the same probabilities."""


@dataclasses.dataclass(frozen=True)
class LayerMeters:
    """The meters of one layer; None where the layer has nothing to measure."""

    ffn: Activity | None
    ffn_selection: SelectionQuality | None
    ffn_scores: ScoreDistribution | None
    attention: Attention | None
    attention_selection: SelectionQuality | None
    attention_scores: ScoreDistribution | None
    experts: ExpertMeters | None = None
    flow: dict[str, StreamFlow] = dataclasses.field(default_factory=dict)
    """Activation flow through each of `evaluation.flow.STREAMS`."""


@dataclasses.dataclass(frozen=True)
class Meters:
    """The meters of all layers."""

    tokens: int
    """Real tokens read."""
    batches: int
    layers: tuple[LayerMeters, ...]
    experts: ExpertMeters | None = None
    """Those of all layers pooled; None where no layer has experts."""

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return dataclasses.asdict(self)

    def dead(self) -> dict[str, np.ndarray]:
        """`dead_neurons` and `dead_experts`, float64 [layers]: how many no token made active; NaN where a layer has
        none, absent where no layer has.
        """
        counts = {
            "dead_neurons": [math.nan if layer.ffn is None else layer.ffn.dead for layer in self.layers],
            "dead_experts": [math.nan if layer.experts is None else layer.experts.dead for layer in self.layers],
        }
        arrays = {name: np.asarray(values, np.float64) for name, values in counts.items()}
        return {name: values for name, values in arrays.items() if not np.isnan(values).all()}

    def sparsity(self, config: DecoderConfig) -> Sparsity:
        """What was measured on a model of `config`, for `flops_per_token` and `bytes_per_token`."""

        def active(layer: LayerMeters, ffn: Any) -> float | None:
            if layer.ffn is not None:
                return layer.ffn.active.mean
            # A layer that chooses experts and nothing within them records no neurons.
            return None if layer.experts is None else layer.experts.active.mean * ffn.expert_width

        return Sparsity(
            tuple(active(layer, spec.ffn) for layer, spec in zip(self.layers, config.layer_specs(), strict=True)),
            tuple(None if layer.attention is None else layer.attention.attended_beyond_target for layer in self.layers),
        )


@partial(jax.jit, static_argnums=0)
def _summarise(graphdef: nnx.GraphDef, state: Any, batch: Mapping[str, jax.Array]):
    model = nnx.merge(graphdef, state)
    out = model(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        record=NAMES,
        summarise=summarise_layer,
    )
    tokens = jnp.sum(batch["segment_ids"] > 0)
    return tokens, out.records


def measure(model: nnx.Module, config: DecoderConfig, batches: Iterable[Mapping[str, Any]]) -> Meters:
    """Measure the sparsity of a model over `batches` of a data pipeline.

    Args:
      model: a `Decoder`, called as `model(tokens, segment_ids=, positions=, record=, summarise=)`.
      config: its configuration.
      batches: dicts of [B, T] arrays tokens, segment_ids, positions, all of one shape; padding has segment id 0.

    Raises:
      DataError: the batches hold no token.
    """
    graphdef, state = nnx.split(model)
    totals: list[dict[str, np.ndarray]] = [{} for _ in range(config.layers)]
    tokens = count = 0
    for batch in batches:
        arrays = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
        read, records = jax.device_get(_summarise(graphdef, state, arrays))
        tokens, count = tokens + int(read), count + 1
        for name, per_layer in records.items():
            for total, value in zip(totals, per_layer, strict=True):
                if value is not None:
                    # Sums over many batches outgrow float32 and int32.
                    wide = np.asarray(value, np.float64 if value.dtype.kind == "f" else np.int64)
                    total[name] = total.get(name, 0) + wide
    if tokens == 0:
        raise DataError("the split to measure on has no token")
    layers = tuple(_layer(total, spec) for total, spec in zip(totals, config.layer_specs(), strict=True))
    return Meters(tokens, count, layers, expert_meters(totals))


def _layer(total: dict[str, np.ndarray], spec: LayerSpec) -> LayerMeters:
    return LayerMeters(
        _activity(total, spec.ffn.target_active) if "ffn_tokens_by_count" in total else None,
        _selection(total, "ffn"),
        _distribution(total, "ffn"),
        _attention(total, spec.attention.target_keys) if "attention_queries_by_attended" in total else None,
        _selection(total, "attention"),
        _distribution(total, "attention"),
        expert_meters([total]),
        figures(total),
    )


def _activity(total: dict[str, np.ndarray], target: float | None) -> Activity:
    by_neuron = np.sort(total["ffn_tokens_by_neuron"])[::-1]
    neurons, active = len(by_neuron), count_of(total["ffn_tokens_by_count"])
    kept = np.unique(np.linspace(0, neurons - 1, min(neurons, CURVE_POINTS)).round().astype(int))
    return Activity(
        neurons=neurons,
        active=active,
        target=target,
        density=active.mean / neurons,
        density_std=active.std / neurons,
        dead=int(np.sum(by_neuron == 0)),
        frequency=[float(x) for x in by_neuron[kept] / total["tokens"]],
        unions={
            str(length): float(used / (blocks * neurons))
            for length, used, blocks in zip(BLOCKS, total["ffn_used_by_blocks"], total["ffn_blocks"], strict=True)
            if blocks
        },
        dynamic_dead=float(np.mean(by_neuron > 0) - active.mean / neurons),
        temporal_sparsity=float(total["ffn_unchanged"] / total["ffn_pairs"]) if total["ffn_pairs"] else None,
    )


def _attention(total: dict[str, np.ndarray], target: int | None) -> Attention:
    queries, attended = total["attention_queries_by_visible"], total["attention_attended_by_visible"]
    # As many intervals as a curve may have points, of equal width in the number of visible keys.
    most = int(np.flatnonzero(queries)[-1])
    ends = np.unique(np.ceil(np.linspace(0, most, min(most, CURVE_POINTS) + 1)).astype(int))
    queries_to, attended_to = np.cumsum(queries)[ends], np.cumsum(attended)[ends]
    queries_in, attended_in = np.diff(queries_to), np.diff(attended_to)
    used = queries_in > 0
    beyond = None
    if target is not None and queries[target + 1 :].sum() > 0:
        beyond = float(attended[target + 1 :].sum() / queries[target + 1 :].sum())
    return Attention(
        attended=count_of(total["attention_queries_by_attended"]),
        target=target,
        visible=[int(x) for x in ends[1:][used]],
        attended_by_visible=[float(x) for x in attended_in[used] / queries_in[used]],
        attended_beyond_target=beyond,
    )


def _selection(total: dict[str, np.ndarray], prefix: str) -> SelectionQuality | None:
    rows = total.get(f"{prefix}_selection_rows", 0)
    if rows == 0:
        return None

    def mean(name: str, over: Any = rows) -> float:
        return float(total[f"{prefix}_{name}"] / over)

    with_any = total[f"{prefix}_selection_rows_with_any"]
    return SelectionQuality(
        rows=int(rows),
        precision=mean("precision", with_any) if with_any > 0 else None,
        recall=mean("recall"),
        f1=mean("f1"),
        jaccard=mean("jaccard"),
        selected_share=mean("selected", total[f"{prefix}_selectable"]),
        target_share=mean("aimed_at", total[f"{prefix}_selectable"]),
    )


def _distribution(total: dict[str, np.ndarray], prefix: str) -> ScoreDistribution | None:
    n = total.get(f"{prefix}_scores", 0)
    if n == 0:
        return None
    mean, second, third, fourth = (float(total[f"{prefix}_scores_power_{p}"] / n) for p in (1, 2, 3, 4))
    variance = second - mean**2
    central_third = third - 3 * mean * second + 2 * mean**3
    central_fourth = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    histogram = total[f"{prefix}_scores_histogram"]
    below = np.concatenate([[0], np.cumsum(histogram)]) / histogram.sum()
    # Quantiles that would rest on less than a few scores are noise; those scores are not there in a short run.
    points = [x for x in QQ_POINTS if min(NormalDist().cdf(x), NormalDist().cdf(-x)) * n >= 5]
    filled = np.concatenate([[True], np.diff(below) > 0])  # np.interp needs one edge for each value
    quantiles = np.interp([NormalDist().cdf(x) for x in points], below[filled], EDGES[filled])
    return ScoreDistribution(
        scores=int(n),
        skewness=central_third / variance**1.5,
        excess_kurtosis=central_fourth / variance**2 - 3,
        normal_quantiles=points,
        score_quantiles=[float(x) for x in quantiles],
    )
