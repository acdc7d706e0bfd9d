"""The plots of a report: of one run by layer, and of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sparsezoo_jax.evaluation.expert_meters import ExpertMeters
from sparsezoo_jax.evaluation.meters import LayerMeters, SelectionQuality
from sparsezoo_jax.evaluation.report.figures import RunFigures
from sparsezoo_jax.evaluation.report.svg import Series, bar_plot, line_plot

DENSE = 0.99
"""Density from which on there is nothing to see in how often neurons are active: GELU underflows to 0 now and then."""
VARIANTS = {"dense": "dense twin", "configured": "as configured", "measured": "as measured"}


def run_plots(run: RunFigures) -> list[str]:
    """The plots of one run; those that its architecture has nothing for are left out."""
    layers = run.meters.layers
    plots = [_loss([run]), *_course_by_layer(run), *_activation(run)]
    attended = [
        Series(f"layer {i}", layer.attention.visible, layer.attention.attended_by_visible)
        for i, layer in enumerate(layers)
        if layer.attention
    ]
    if attended:
        # All visible keys would put the selections of a long context flat onto the axis.
        seen = max(max(series.x) for series in attended)
        end = min(seen, 1.5 * max(y for series in attended for y in series.y if y is not None))
        every_key = Series("all visible keys", [0, end], [0, end])
        plots.append(
            line_plot(
                "Attended keys", "visible keys", "attended keys", attended, reference=[every_key], y_from_zero=True
            )
        )
    for kind, of_scores, of_selection in (
        ("FFN", lambda x: x.ffn_scores, lambda x: x.ffn_selection),
        ("Attention", lambda x: x.attention_scores, lambda x: x.attention_selection),
    ):
        plots.extend(_quantiles(kind, layers, of_scores))
        plots.extend(_selection(kind, layers, of_selection))
    frequencies = [
        Series(f"layer {i}", np.linspace(0, 1, len(layer.ffn.frequency)).tolist(), layer.ffn.frequency)
        for i, layer in enumerate(layers)
        if layer.ffn and layer.ffn.density < DENSE
    ]
    if frequencies:
        plots.append(
            line_plot(
                "How often neurons are active",
                "neurons, most active first (share)",
                "share of tokens",
                frequencies,
                log_y=True,
            )
        )
    return [*plots, *_experts(run), *_flow(run), *_costs(run)]


def comparison_plots(runs: Sequence[RunFigures]) -> list[str]:
    """Plots that lay several runs over each other; per-layer figures as means over the layers."""
    plots = [_loss(runs)]
    for name, title, percent in (("ffn_density", "FFN density", True), ("attended_keys", "Attended keys", False)):
        series = [
            Series(run.name, run.history.train.steps, [_mean(row) for row in rows], place=place)
            for place, run in enumerate(runs)
            if any(rows := run.history.train.layers[name])
        ]
        title = f"{title} over training, mean over layers"
        plots.append(line_plot(title, "step", title.partition(" over")[0], series, percent=percent, places=len(runs)))
    for kind, pick in (("FFN", lambda x: x.ffn_selection), ("Attention", lambda x: x.attention_selection)):
        qualities = [
            (
                run.name,
                [
                    run.layer_mean(lambda x, pick=pick: pick(x) and pick(x).recall),
                    run.layer_mean(lambda x, pick=pick: pick(x) and pick(x).precision),
                ],
            )
            for run in runs
        ]
        if any(value is not None for _, values in qualities for value in values):
            title = f"{kind}: selection against exact top-k, mean over layers"
            plots.append(bar_plot(title, "share", ["recall", "precision"], qualities))
    pooled = [(place, run.name, run.meters.experts) for place, run in enumerate(runs) if run.meters.experts is not None]
    if pooled:
        plots.append(_chunk_sparsity(pooled, len(runs)))
    contexts = list(dict.fromkeys(context for run in runs for context in run.contexts))
    for title, unit, value in COSTS:
        bars = [
            (run.name, [_cost(run, context, value, "measured", "configured") for context in contexts]) for run in runs
        ]
        plots.append(bar_plot(title, unit, [f"{context:,}" for context in contexts], bars))
    return plots


def _experts(run: RunFigures) -> list[str]:
    parts = [(f"layer {i}", layer.experts) for i, layer in enumerate(run.meters.layers) if layer.experts is not None]
    if not parts:
        return []
    by_active = [Series(name, list(range(len(e.tokens_by_active))), e.tokens_by_active) for name, e in parts]
    loads = [Series(name, np.linspace(0, 1, len(e.load)).tolist(), sorted(e.load, reverse=True)) for name, e in parts]
    return [
        _chunk_sparsity([(place, *part) for place, part in enumerate(parts)], len(parts)),
        line_plot("Active experts of a token", "active experts", "share of tokens", by_active, y_from_zero=True),
        line_plot("Load of experts", "experts, busiest first (share)", "share of tokens", loads, y_from_zero=True),
    ]


def _chunk_sparsity(parts: Sequence[tuple[int, str, ExpertMeters]], places: int) -> str:
    """By the logarithm of the chunk length, so that each doubling has its place."""
    lines = [
        Series(name, [math.log2(int(n)) for n in e.cls], list(e.cls.values()), place=place) for place, name, e in parts
    ]
    title, x_label = "Experts: chunk-level sparsity", "log2 of tokens in a chunk"
    return line_plot(title, x_label, "experts not active", lines, percent=True, places=places)


COSTS: tuple[tuple[str, str, str], ...] = (
    ("FLOPs per token by context, mean position", "FLOPs", "flops_mean"),
    ("Bytes read per token by context, last position", "bytes", "bytes_last"),
)


def _flow(run: RunFigures) -> list[str]:
    """How many dimensions of the stream hold 50 % and 90 % of a token's magnitude, by layer."""
    streams = list(dict.fromkeys(name for layer in run.meters.layers for name in layer.flow))
    if not streams:
        return []
    groups = [str(i) for i in range(len(run.meters.layers))]
    bars = [
        (f"{name.replace('_', ' ')}, {percent} %", [_held(layer, name, percent) for layer in run.meters.layers])
        for name in streams
        for percent in (50, 90)
    ]
    return [bar_plot("Dimensions that hold a token's magnitude, by layer", "share of the width", groups, bars)]


def _held(layer: LayerMeters, stream: str, percent: int) -> float | None:
    flow = layer.flow.get(stream)
    return None if flow is None else getattr(flow, f"dims_{percent}") / flow.width


def _costs(run: RunFigures) -> list[str]:
    variants = [name for name in VARIANTS if any(cost.variant == name for cost in run.costs)]
    groups = [f"{context:,}" for context in run.contexts]
    return [
        bar_plot(
            title, unit, groups, [(VARIANTS[v], [_cost(run, c, value, v) for c in run.contexts]) for v in variants]
        )
        for title, unit, value in COSTS
    ]


def _cost(run: RunFigures, context: int, value: str, *variants: str) -> float | None:
    """That of the first of `variants` which was counted."""
    costs = [cost for variant in variants if (cost := run.cost(context, variant)) is not None]
    return getattr(costs[0], value) if costs else None


def _loss(runs: Sequence[RunFigures]) -> str:
    several = len(runs) > 1
    series = []
    for place, run in enumerate(runs):
        train, evaluation = run.history.train, run.history.evaluation
        names = (run.name, f"{run.name}, validation") if several else ("training", "validation")
        own = place if several else None
        series.append(Series(names[0], train.steps, train.loss, place=own))
        series.append(Series(names[1], evaluation.steps, evaluation.loss, True, own, in_legend=not several))
    title = "Loss over training (dashed: validation)" if several else "Loss over training"
    return line_plot(title, "step", "nats/token", series, places=len(runs) if several else 0)


def _course_by_layer(run: RunFigures) -> list[str]:
    plots = []
    targets = {
        "ffn_density": {
            layer.ffn.target / layer.ffn.neurons for layer in run.meters.layers if layer.ffn and layer.ffn.target
        },
        "attended_keys": {
            layer.attention.target for layer in run.meters.layers if layer.attention and layer.attention.target
        },
    }
    for name, title, percent in (("ffn_density", "FFN density", True), ("attended_keys", "Attended keys", False)):
        steps, rows = run.history.train.steps, run.history.train.layers[name]
        present = [(step, row) for step, row in zip(steps, rows, strict=True) if row]
        if not present:
            continue
        count = max(len(row) for _, row in present)
        series = [
            Series(f"layer {i}", [s for s, _ in present], [row[i] if i < len(row) else None for _, row in present])
            for i in range(count)
        ]
        ends = [present[0][0], present[-1][0]]
        aims = [Series("target", ends, [float(target)] * 2) for target in sorted(targets[name])]
        plots.append(line_plot(f"{title} over training", "step", title, series, reference=aims, percent=percent))
    return plots


def _activation(run: RunFigures) -> list[str]:
    found = run.activation
    if found is None:
        return []
    ratios = [point.activation_ratio for point in found.points]
    series = [Series(f"layer {i}", found.steps, [row[i] for row in ratios]) for i in range(len(ratios[0]))]
    mean = Series("mean", found.steps, [point.mean for point in found.points])
    title = f"Activation ratio over training, CETT {found.cett:.3f}: {100 * found.increase:g} % more perplexity"
    return [line_plot(title, "step", "activation ratio", series, reference=[mean], percent=True)]


def _quantiles(kind: str, layers: Sequence[LayerMeters], pick: Callable) -> list[str]:
    series = [
        Series(f"layer {i}", scores.normal_quantiles, scores.score_quantiles)
        for i, layer in enumerate(layers)
        if (scores := pick(layer)) is not None
    ]
    if not series:
        return []
    ends = [min(series[0].x), max(series[0].x)]
    normal = Series("N(0, 1)", ends, ends)
    return [
        line_plot(
            f"{kind}: quantiles of scores", "quantile of N(0, 1)", "quantile of scores", series, reference=[normal]
        )
    ]


def _selection(kind: str, layers: Sequence[LayerMeters], pick: Callable) -> list[str]:
    qualities: list[SelectionQuality | None] = [pick(layer) for layer in layers]
    if all(quality is None for quality in qualities):
        return []
    bars = [
        (name, [quality and getattr(quality, name) for quality in qualities]) for name in ("recall", "precision", "f1")
    ]
    groups = [str(i) for i in range(len(layers))]
    return [bar_plot(f"{kind}: selection against exact top-k, by layer", "share", groups, bars)]


def _mean(row: Sequence[float | None]) -> float | None:
    values = [x for x in row if x is not None]
    return sum(values) / len(values) if values else None
