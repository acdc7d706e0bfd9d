"""The tables that `evaluate` prints: figures by name in, rows on stdout out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsezoo_jax import cli
from sparsezoo_jax.evaluation.sparsified import COSTS


def print_evaluation(directory: Path, figures: dict[str, Any]) -> None:
    """Print the loss, and with meters the sparsity, the experts, the parameters and the cost of a token."""
    if "unit" in figures:
        rows = _rows_of_images(figures)
    else:
        rows = [
            ("loss", f"{figures['loss']:.4f} nats/token"),
            ("perplexity", f"{figures['perplexity']:.2f}"),
            ("bits per byte", f"{figures['bits_per_byte']:.4f}"),
            ("tokens", f"{figures['tokens']:,}"),
            *cli.corpus_rows(figures),
        ]
    if "packed" in figures:
        stored = figures["packed"]
        rows.append((f"loss, {stored['formats']}", f"{stored['loss']:.4f} nats/token ({stored['change']:+.4f})"))
    if "calibration" in figures:
        found = figures["calibration"]
        if "accuracy" not in figures:
            rows.append(("accuracy", f"{found['accuracy']:.2%}"))
        rows.append(("mean confidence", f"{found['confidence']:.2%}"))
        rows.append((f"calibration error, {len(found['bins'])} bins", f"{found['ece']:.4f}"))
    cli.print_table(f"{directory}, {figures['split']} split", ("figure", "value"), rows)
    if "sparsified" in figures:
        print_sparsified(figures["sparsified"])
    if "pruned" in figures:
        print_pruned(figures["pruned"])
    if "converted" in figures:
        print_made(figures["converted"]["made"])
    if "activation" in figures:
        print_activation(figures["activation"], figures["loss"])
    if "decoding" in figures:
        print_decoding(figures["decoding"])
    if "meters" not in figures:
        cli.print_layers(figures)
        return
    print_meters(figures["meters"]["layers"])
    print_experts(figures["meters"])
    print_flow(figures["meters"]["layers"])
    print_parameters(figures["parameters"])
    print_costs(figures["costs"])


def print_decoding(figures: dict[str, Any]) -> None:
    """Print the time of a token beside another run's, of figures as `evaluate.decoding` gives them."""
    low, high = figures["ratio_quartiles"]
    rows = [
        ("milliseconds a token", f"{figures['milliseconds']:.2f}"),
        (f"{figures['beside']}", f"{figures['milliseconds_beside']:.2f}"),
        ("times as fast (quartiles of the turns)", f"{figures['ratio']:.2f} ({low:.2f} .. {high:.2f})"),
    ]
    cli.print_table(f"Decoding after {figures['context']} tokens, {figures['rounds']} turns", ("figure", "value"), rows)


def _rows_of_images(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Loss of a model of images, and of a classifier accuracy and calibration error."""
    unit = figures["unit"]
    rows = [("loss", f"{figures['loss']:.4f} {'nats/image' if unit == 'image' else 'a hidden patch'}")]
    if "accuracy" in figures:
        rows += [("accuracy", f"{figures['accuracy']:.2%}"), ("calibration error", f"{figures['ece']:.4f}")]
    return [*rows, ("images" if unit == "image" else "hidden patches", f"{figures['count']:,}")]


def print_sparsified(figures: dict[str, Any]) -> None:
    """Print what a sparsified run leaves out of each map and layer, what that saves, and the loss when it was made.

    Args:
      figures: as `evaluation.sparsified.needed` gives them, and "made".
    """
    maps, made = figures["left_out_by_layer"], figures["made"]
    layers = len(next(iter(maps.values())))
    rows = [(str(i), *(f"{values[i]:.2%}" for values in maps.values())) for i in range(layers)]
    rows.append(("mean", *(f"{share:.2%}" for share in figures["left_out"].values())))
    title = f"Channels left out ({made['method']} at {made['sparsity']:g})" if made else "Channels left out"
    cli.print_table(title, ("layer", *maps), rows)
    print_needed(figures)
    if made:
        print_made(made)


def print_needed(figures: dict[str, Any]) -> None:
    """Print what a token needs of the layers' linear maps, and needed before, of `figures` with both."""
    rows = [
        (
            name,
            f"{figures[f'{name}_dense']:,.0f}",
            f"{figures[name]:,.0f}",
            f"{figures[name] / figures[f'{name}_dense']:.2%}",
        )
        for name in COSTS
    ]
    cli.print_table("Of the layers' linear maps, needed for a token", ("", "dense", "here", "share"), rows)


def print_pruned(figures: dict[str, Any]) -> None:
    """Print the zeros of each map and layer of a pruned run, the neurons of its layers, and the loss when it was made.

    Args:
      figures: as `evaluation.sparsified.zeros` gives them, and "made".
    """
    maps, made = figures["zeros_by_layer"], figures["made"]
    widths = made.get("widths")
    header = ("layer", *maps) if widths is None else ("layer", *maps, "neurons")
    rows = []
    for i in range(len(next(iter(maps.values())))):
        shares = ["-" if math.isnan(values[i]) else f"{values[i]:.2%}" for values in maps.values()]
        rows.append((str(i), *shares, *([] if widths is None else [f"{widths[i]:,}"])))
    means = (f"{share:.2%}" for share in figures["zeros"].values())
    rows.append(("mean", *means, *([] if widths is None else [f"{sum(widths) / len(widths):,.1f}"])))
    pattern = f", {made['pattern']}" if "pattern" in made else ""
    cli.print_table(f"Weights that are 0 ({made['method']} at {made['sparsity']:g}{pattern})", header, rows)
    share = figures["nonzero"] / figures["weights"]
    print(f"{figures['nonzero']:,} of {figures['weights']:,} weights of these maps are not 0 ({share:.2%})")
    print("zeros are stored and multiplied like other weights: they save neither memory nor time")
    print_made(made)


def print_made(made: dict[str, Any]) -> None:
    """Print the losses before and after a run was made of another, and what a token needs of one that is smaller."""
    if all(name in made for name in COSTS):
        print_needed(made)
    change = made["loss"] - made["loss_dense"]
    before = f"{made['loss_dense']:.4f} dense, {made['loss']:.4f} at this sparsity ({change:+.4f})"
    print(f"when it was made, on {made['tokens']:,} tokens: loss {before} nats/token")


def print_activation(figures: dict[str, Any], dense: float) -> None:
    """Print the activation ratio of each layer and checkpoint, the loss with it applied, and the curve if there is one.

    Args:
      figures: as `evaluate.activation` gives them.
      dense: loss of the split with all units.
    """
    checkpoints = figures["checkpoints"]
    layers = len(checkpoints[-1]["activation_ratio"])
    header = ("layer", *(f"step {row['step']}" for row in checkpoints), "threshold")
    rows = [
        (
            str(i),
            *(f"{row['activation_ratio'][i]:.2%}" for row in checkpoints),
            f"{checkpoints[-1]['thresholds'][i]:.3g}",
        )
        for i in range(layers)
    ]
    rows.append(("mean", *(f"{row['mean']:.2%}" for row in checkpoints), ""))
    rows.append(("perplexity", *(f"{row['increase']:+.2%}" for row in checkpoints), ""))
    title = f"Activation ratio at CETT {figures['cett']:.4f}: {100 * figures['increase']:g} % more perplexity"
    cli.print_table(title, header, rows)
    print(f"loss of the split with it applied {figures['loss']:.4f} nats/token ({figures['loss'] - dense:+.4f})")
    names = {"cett": "CETT", "threshold": "gate threshold", "top_k": "top k of the gate"}
    points = [
        (names[point["rule"]], f"{point['setting']:.3g}", f"{point['mean']:.2%}", f"{point['increase']:+.2%}")
        for point in figures.get("curve", ())
    ]
    if points:
        title = "Activation ratio and perplexity (setting: CETT, threshold, share kept)"
        cli.print_table(title, ("meter", "setting", "activation ratio", "perplexity"), points)


def print_chess(directory: Path, figures: dict[str, Any]) -> None:
    """Print coverage and reconstruction of each set of properties."""
    parts = [
        f"{directory}, random weights" if figures["random_weights"] else str(directory),
        f"layer {figures['layer']}",
        f"{figures['alive']:,} of {figures['features']:,} features alive",
        f"{figures['l0']:,.1f} active in a state",
        f"{figures['train_games']:,} + {figures['test_games']:,} games",
    ]
    rows = [
        (
            name,
            f"{scores['coverage']['score']:.4f}",
            f"{scores['coverage']['threshold']:.1f}",
            f"{scores['coverage']['per_property']:.4f}",
            f"{scores['possible']:.4f}",
            f"{scores['reconstruction']['score']:.4f}",
            f"{scores['reconstruction']['threshold']:.1f}",
            f"{scores['reconstruction']['per_board']:.4f}",
            f"{scores['reconstruction']['last']:.4f}",
        )
        for name, scores in figures["sets"].items()
    ]
    header = ("properties", "coverage", "at", "each at its best", "possible")
    cli.print_table(", ".join(parts), (*header, "reconstruction", "at", "per board", "by vote"), rows)


def zipf_text(law: dict[str, Any] | None) -> str:
    """A fit of `evaluation.zipf` in words; "-" for none."""
    if law is None:
        return "-"
    return (
        f"(rank + {law['offset']:.3g})^-{law['exponent']:.3f}, R^2 {law['r_squared']:.3f} over {law['ranks']:,} ranks"
    )


def print_interpretation(directory: Path, figures: dict[str, Any]) -> None:
    """Print accuracy overall and by activation, and the figures of experts."""

    def cell(value: dict[str, Any]) -> str:
        if value["mean"] is None:
            return "-"
        low, high = value["low"], value["high"]
        return f"{value['mean']:.3f}" + ("" if low is None else f" ({low:.3f} .. {high:.3f})")

    rows = [
        (name, *(cell(figures["by_bucket"][task][i]) for task in figures["by_bucket"]))
        for i, name in enumerate(figures["buckets"])
    ]
    rows = [("balanced accuracy", *(cell(value) for value in figures["accuracy"].values())), *rows]
    rows.append(("windows without an answer", *(f"{n:,}" for n in figures["failed"].values())))
    title = (
        f"{directory}: {figures['sae'] or 'FFN'} features of layer {figures['layer']}, {len(figures['features'])} "
        f"explained; judge {figures['judge']} ({figures['judge_kind']}); 95 % intervals over features"
    )
    cli.print_table(title, ("windows", *figures["accuracy"]), rows)
    print(f"{figures['l0']:,.1f} features of a token; {figures['dead']:.2%} of the features never active")
    print(f"Zipf law of densities: {zipf_text(figures['zipf'])}")
    experts = figures.get("experts")
    if experts is None:
        return
    columns = (experts["l0_by_expert"], experts["correlation"], experts["load"])
    table = [
        (str(i), f"{l0:.1f}", f"{r:.3f}", f"{load:.2%}") for i, (l0, r, load) in enumerate(zip(*columns, strict=True))
    ]
    cli.print_table("Experts", ("expert", "active units (L0)", "correlation of score and L0", "load"), table)
    print(
        f"L0 of the chosen {experts['l0_chosen']:.1f}, of the best choice {experts['l0_oracle']:.1f}; "
        f"entropy of the load {experts['load_entropy']:.3f} of its largest"
    )


def print_meters(layers: Sequence[dict[str, Any]]) -> None:
    """Print the meters of all layers, one layer a row; "-" where a layer has nothing of the kind."""

    def cell(part: dict[str, Any] | None, name: str, form: str) -> str:
        value = None if part is None else part[name]
        return "-" if value is None else format(value, form)

    quality = (("recall", ".3f"), ("precision", ".3f"), ("skewness", ".2f"), ("excess_kurtosis", ".2f"))

    def row(index: int, layer: dict[str, Any], kind: str) -> list[str]:
        parts = {"recall": "selection", "precision": "selection"}
        return [str(index), *(cell(layer[f"{kind}_{parts.get(name, 'scores')}"], name, form) for name, form in quality)]

    ffn, attention = [], []
    for index, layer in enumerate(layers):
        activity, keys = layer["ffn"], layer["attention"]
        dead = "-" if activity is None else f"{activity['dead']:,}"
        ffn.append([*row(index, layer, "ffn"), cell(activity, "density", ".2%"), dead])
        attention.append([*row(index, layer, "attention"), cell(keys and keys["attended"], "mean", ".1f")])
    header = ("layer", "recall", "precision", "skewness", "kurtosis")
    cli.print_table("FFN: selection against exact top-k, scores, active neurons", (*header, "active", "dead"), ffn)
    cli.print_table("Attention: the same, attended keys", (*header, "attended keys"), attention)


def print_experts(meters: dict[str, Any]) -> None:
    """Print what experts tokens and chunks activate, layer by layer and pooled; nothing where no layer has experts."""
    pooled = meters["experts"]
    if pooled is None:
        return

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    parts = [(str(i), layer["experts"]) for i, layer in enumerate(meters["layers"]) if layer["experts"] is not None]
    parts.append(("all", pooled))
    sparsity = [[name, *(cell(x, ".2%") for x in experts["cls"].values())] for name, experts in parts]
    sparsity.append(["stream", *(cell(x, ".2%") for x in pooled["cls_stream"].values())])
    header = ["TLS" if n == "1" else f"CLS_{n}" for n in pooled["cls"]]
    cli.print_table("Experts: token- and chunk-level sparsity", ("layer", *header), sparsity)
    percentiles = pooled["active"]["percentiles"]
    rows = [
        [
            name,
            f"{experts['active']['mean']:.2f}",
            *(str(x) for x in experts["active"]["percentiles"].values()),
            cell(experts["reuse"], ".2%"),
            f"{experts['dead']:,}",
            cell(experts["max_load"], ".2f"),
        ]
        for name, experts in parts
    ]
    header = ("layer", "mean", *(f"{p} %" for p in percentiles), "reuse", "dead", "max/mean")
    cli.print_table("Experts: active for a token, used again by the next one, load", header, rows)


def print_flow(layers: Sequence[dict[str, Any]]) -> None:
    """Print how each layer's hidden states spread over the dimensions of the residual stream."""
    rows = [
        (
            f"{index} {stream.removesuffix('_input')}",
            f"{flow['flow']:.1f}",
            *(f"{flow[name] / flow['width']:.1%}" for name in ("dims_50", "dims_90")),
            f"{flow['shared']:,}",
            f"{flow['specialised']:,}",
            f"{flow['run_length']:.2f}",
            "-" if flow["jaccard"] is None else f"{flow['jaccard']:.3f}",
        )
        for index, layer in enumerate(layers)
        for stream, flow in layer["flow"].items()
    ]
    header = ("layer", "flow", "50 % in", "90 % in", "shared", "special", "run", "Jaccard")
    cli.print_table("Activation flow: dimensions that hold 50 and 90 % of a token's magnitude", header, rows)


def print_parameters(counts: dict[str, float]) -> None:
    """Print parameters, and those that one token needs."""
    names = {
        "total": "all",
        "non_embedding": "without embeddings",
        "activated_layers": "activated by a token, layers, as configured",
        "activated_layers_measured": "activated by a token, layers, as measured",
        "activated_head": "activated by a token, output projection",
    }
    cli.print_table("Parameters", ("which", "number"), [(text, f"{counts[name]:,.0f}") for name, text in names.items()])


def print_costs(costs: Sequence[dict[str, Any]]) -> None:
    """Print FLOPs and bytes per token by context length."""
    rows = [
        (
            f"{cost['context']:,}",
            cost["variant"],
            f"{cost['flops_mean'] / 1e6:,.2f}",
            f"{cost['flops_last'] / 1e6:,.2f}",
            f"{cost['bytes_last'] / 1e6:,.2f}",
        )
        for cost in costs
    ]
    header = ("context", "sparsity", "MFLOPs, mean position", "MFLOPs, last", "MB read, last")
    cli.print_table("Cost of one token (output projection not counted)", header, rows)


def print_tasks(directory: Path, figures: dict[str, Any]) -> None:
    """Print the figures of benchmarks' tasks, each with its standard error."""
    rows = []
    for task, found in figures.items():
        names = [name for name in found if "_stderr" not in name and name not in ("sample_len", "sample_count")]
        for name in names:
            metric, comma, rest = name.partition(",")
            error = found.get(f"{metric}_stderr{comma}{rest}")
            rows.append((task, name, f"{found[name]:.4f}", "-" if error is None else f"{error:.4f}"))
    cli.print_table(str(directory), ("task", "metric", "value", "standard error"), rows)
