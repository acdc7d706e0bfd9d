"""The page of a report: headline figures, plots, tables and configuration, in one file without external parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsezoo_jax.evaluation.report.figures import RunFigures
from sparsezoo_jax.evaluation.report.plots import comparison_plots, run_plots
from sparsezoo_jax.evaluation.report.svg import escape
from sparsezoo_jax.evaluation.sparsified import COSTS
from sparsezoo_jax.storage import write_atomic

# The palette of Okabe and Ito, which the common forms of colour blindness keep apart, lightened where it is dark.
STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; --faint: #e2e2e2; --grey: #777777; --ramp: 42%;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; --c6: #8c6d00;
  --c7: #444444; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --back: #16181b; --faint: #33373c; --grey: #9a9a9a;
  --ramp: 62%; --c0: #4aa8e0; --c1: #ff8c42; --c2: #2cc79a; --c6: #f0e442; --c7: #c8c8c8; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 1460px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
svg { width: 100%; height: auto; }
.line { fill: none; stroke-width: 1.6; } .axis { fill: none; stroke: var(--text); stroke-width: 1; }
.grid { stroke: var(--faint); stroke-width: 1; } .reference { fill: none; stroke: var(--grey); stroke-dasharray: 4 4; }
.tick, .label { font-size: 11px; fill: var(--text); } .hover { fill: transparent; }
.hover:hover { fill: var(--grey); fill-opacity: .5; }
.legend { list-style: none; margin: 0; padding: 0 0 0 52px; display: flex; flex-wrap: wrap; gap: 0 .9rem;
  font-size: 12px; }
.legend span { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
.scroll { overflow-x: auto;
  /* A shadow at an edge beyond which a table goes on: it stays in place, and what covers it moves with the table. */
  background: linear-gradient(to right, var(--back) 30%, transparent) left / 3rem 100% local,
    linear-gradient(to left, var(--back) 30%, transparent) right / 3rem 100% local,
    radial-gradient(farthest-side at 0 50%, var(--grey), transparent) left / .8rem 100% scroll,
    radial-gradient(farthest-side at 100% 50%, var(--grey), transparent) right / .8rem 100% scroll;
  background-repeat: no-repeat; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .note { color: var(--grey); }
.values td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 8rem; }
.values th { text-align: left; } .values td:first-child { white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); }
@media (max-width: 600px) { .plots { grid-template-columns: 1fr; } th, td { padding: .15rem .4rem; }
  th { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; }
  th:first-child, td:first-child, .values td:first-child { white-space: normal; overflow-wrap: anywhere;
    min-width: 6.5rem; max-width: 45vw; } }
.note { color: var(--grey); }
"""


def render(runs: Sequence[RunFigures]) -> str:
    """The report of one or several runs as an HTML document; the figures are in it as JSON, too."""
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].name
    parts = [f"<h1>{escape(title)}</h1>"]
    if several:
        parts += [_headlines(runs), plot_grid(comparison_plots(runs)), _differences(runs)]
    for run in runs:
        parts.append(f"<section><h2>{escape(run.name)}</h2>" if several else "<section>")
        parts += [] if several else [_headlines([run])]
        parts += [
            _note(run),
            sparsity_after_training(run.sparsified),
            plot_grid(run_plots(run)),
            _layers(run),
            _configuration(run),
            "</section>",
        ]
    return document(title, (part for part in parts if part), [run.as_dict() for run in runs])


def document(title: str, parts: Iterable[str], figures: Any) -> str:
    """An HTML document of parts in HTML, without external ones; `figures` are in it as JSON, too."""
    text = json.dumps(_finite(figures), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("&", "\\u0026")  # neither ends the element nor needs escapes
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n"
        f'<script type="application/json" id="figures">{text}</script>\n</body></html>\n'
    )


def write_report(path: Path, runs: Sequence[RunFigures]) -> None:
    """Write the report of `runs` to `path`, whole or not at all.

    Raises:
      StorageError: it can't be written.
    """
    write_atomic(path, render(runs).encode("utf-8", "backslashreplace"))


def _headlines(runs: Sequence[RunFigures]) -> str:
    headlines = [run.headline() for run in runs]
    names = list(dict.fromkeys(name for headline in headlines for name in headline))
    rows = [[name, *(headline.get(name, "–") for headline in headlines)] for name in names]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    return table(["", *(run.name for run in runs)], rows)


def _differences(runs: Sequence[RunFigures]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.configuration))
    absent = object()
    rows = []
    for name in names:
        values = [run.configuration.get(name, absent) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *("–" if value is absent else str(value) for value in values)])
    return (
        "<h2>Differences of configuration</h2>" + table(["", *(run.name for run in runs)], rows, values=True)
        if rows
        else ""
    )


def _note(run: RunFigures) -> str:
    notes = [f"Meters read {run.meters.tokens:,} tokens of the validation split in {run.meters.batches} batches."]
    if not run.history.train.steps:
        notes.append("The run has no metrics.jsonl, so nothing is known of its training.")
    if run.history.unreadable:
        notes.append(f"{run.history.unreadable} lines of metrics.jsonl are no metrics and were left out.")
    return f'<p class="note">{" ".join(notes)}</p>'


def sparsity_after_training(record: Mapping[str, Any]) -> str:
    """Of a run that `sparsify` made: what it lost, what a token needs, and where its time is to be had from."""
    if not record:
        return ""
    change = record["loss"] - record["loss_dense"]
    quality = [
        ["loss of the dense run (nats/token)", f"{record['loss_dense']:.4f}"],
        ["loss at this sparsity", f"{record['loss']:.4f} ({change:+.4f})"],
        ["tokens of both", f"{record['tokens']:,}"],
    ]
    parts = [
        f"<h3>Sparsity after training: {escape(record['method'])} at {record['sparsity']:g}</h3>",
        table(["quality, when it was made", ""], quality),
    ]
    if all(name in record for name in COSTS):
        names = {"weights": "weights", "flops": "FLOPs", "bytes": "bytes of weights"}
        rows = [
            [
                names[name],
                f"{record[f'{name}_dense']:,.0f}",
                f"{record[name]:,.0f}",
                f"{record[name] / record[f'{name}_dense']:.2%}",
            ]
            for name in COSTS
        ]
        parts.append(table(["needed for a token, if nothing else is read", "dense", "here", "share"], rows))
        time = "Time is another matter: evaluate --beside times a token by turns with the dense run."
    else:
        rows = [[name, f"{share:.2%}"] for name, share in record.get("zeros", {}).items()]
        parts.append(table(["weights that are 0", ""], rows))
        time = "Zeros are stored and multiplied like other weights: they save neither memory nor time."
    return "".join([*parts, f'<p class="note">{time}</p>'])


def plot_grid(figures: Sequence[str]) -> str:
    """Plots of `svg` beside each other, as many as the page is wide for."""
    return f'<div class="plots">{"".join(figures)}</div>'


def _layers(run: RunFigures) -> str:
    """Tables of every layer: FFN, attention, activation flow."""
    ffn, attention = [], []
    for index, layer in enumerate(run.meters.layers):
        if layer.ffn is not None:
            a, target = layer.ffn, layer.ffn.target
            spread = [f"{a.active.mean:.1f}", f"{a.active.std:.1f}", *(str(v) for v in a.active.percentiles.values())]
            ffn.append(
                [str(index), f"{a.density:.2%}", "–" if target is None else f"{target / a.neurons:.2%}", *spread]
            )
            same = "–" if a.temporal_sparsity is None else f"{a.temporal_sparsity:.2%}"
            ffn[-1] += [f"{a.dead:,}", same, *_quality(layer.ffn_selection), *_shape(layer.ffn_scores)]
        if layer.attention is not None:
            keys = layer.attention
            spread = [str(v) for v in keys.attended.percentiles.values()]
            beyond = "–" if keys.attended_beyond_target is None else f"{keys.attended_beyond_target:.1f}"
            attention.append([str(index), f"{keys.attended.mean:.1f}", f"{keys.attended.std:.1f}", *spread])
            attention[-1] += ["–" if keys.target is None else str(keys.target), beyond]
            attention[-1] += [*_quality(layer.attention_selection), *_shape(layer.attention_scores)]
    flow = [
        [
            f"{index} {stream.replace('_', ' ')}",
            *(f"{value:.1f}" for value in (f.flow, f.dims_50, f.dims_90)),
            *(f"{value:,}" for value in (f.width, f.shared, f.specialised)),
            f"{f.run_length:.2f}",
            "–" if f.jaccard is None else f"{f.jaccard:.3f}",
        ]
        for index, layer in enumerate(run.meters.layers)
        for stream, f in layer.flow.items()
    ]
    spread = ("mean", "std", "5 %", "25 %", "50 %", "75 %", "95 %")
    shape = ("recall", "precision", "F1", "Jaccard", "above threshold", "skewness", "excess kurtosis")
    parts = []
    if ffn:
        parts.append("<h3>Active neurons by layer</h3>")
        parts.append(table(("layer", "density", "target", *spread, "dead", "unchanged", *shape), ffn))
    if attention:
        parts.append("<h3>Attended keys by layer</h3>")
        parts.append(table(("layer", *spread, "target", "beyond target", *shape), attention))
    if flow:
        names = ("layer", "flow", "dims of 50 %", "dims of 90 %", "width", "shared", "specialised", "run", "Jaccard")
        parts.append("<h3>Activation flow by layer</h3>")
        parts.append(table(names, flow))
    return "".join([*parts, _experts(run)])


def _experts(run: RunFigures) -> str:
    """Tables of the experts of every layer, and of all layers pooled."""
    pooled = run.meters.experts
    if pooled is None:
        return ""
    parts = [(str(i), layer.experts) for i, layer in enumerate(run.meters.layers) if layer.experts is not None]
    parts.append(("all", pooled))

    def shares(values: Iterable[float | None]) -> list[str]:
        return ["–" if value is None else f"{value:.2%}" for value in values]

    sparsity = [[name, *shares(e.cls.values())] for name, e in parts]
    sparsity.append(["all, chunks of the stream", *shares(pooled.cls_stream.values())])
    active = [
        [
            name,
            f"{e.active.mean:.2f}",
            f"{e.active.std:.2f}",
            *map(str, e.active.percentiles.values()),
            *shares([e.reuse]),
            f"{e.dead:,}",
            "–" if e.max_load is None else f"{e.max_load:.2f}",
        ]
        for name, e in parts
    ]
    header = ["TLS" if n == "1" else f"CLS_{n}" for n in pooled.cls]
    spread = ("mean", "std", *(f"{p} %" for p in pooled.active.percentiles))
    return (
        "<h3>Experts: token- and chunk-level sparsity by layer</h3>"
        + table(("layer", *header), sparsity)
        + "<h3>Active experts of a token by layer</h3>"
        + table(("layer", *spread, "reuse", "dead", "max / mean load"), active)
    )


def _quality(quality: Any) -> list[str]:
    if quality is None:
        return ["–"] * 5
    shares = [quality.recall, quality.precision, quality.f1, quality.jaccard]
    above = f"{quality.selected_share:.2%} of {quality.target_share:.2%}"
    return [*("–" if share is None else f"{share:.3f}" for share in shares), above]


def _shape(scores: Any) -> list[str]:
    return ["–"] * 2 if scores is None else [f"{scores.skewness:.3f}", f"{scores.excess_kurtosis:.3f}"]


def _configuration(run: RunFigures) -> str:
    rows = [[name, str(value)] for name, value in run.configuration.items()]
    return f"<details><summary>Configuration</summary>{table(('field', 'value'), rows, values=True)}</details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, values: bool = False) -> str:
    """A table; of `values` of a configuration, which may be long, rather than of numbers."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="values"' if values else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _finite(value: Any) -> Any:
    """`value` with None for numbers that JSON can't hold, and text for what it has no form of."""
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
