"""Evaluate a run: `python -m sparsezoo_jax.evaluate DIR`.

Prints loss, perplexity and bits per byte of a split, and the meters of every layer's sparsity (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sparsezoo_jax import cli
from sparsezoo_jax.errors import UserError, require

if TYPE_CHECKING:
    from sparsezoo_jax.models import DecoderConfig, Sparsity


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run directory."""
    step: int | None = None
    """Checkpoint to load; none is the newest."""
    merge_last: int = 1
    """Average this many newest checkpoints, weighted like a 1-sqrt decay (after a constant learning rate)."""
    split: Literal["train", "validation"] = "validation"
    """Split of the run's corpus."""
    dataset: str | None = None
    """Another corpus, named as in --data.dataset of training; its split of that name is read."""
    batch_size: int | None = None
    """Sequences in a batch; none is the run's."""
    batches: int | None = None
    """Batches to read; none reads the whole split."""
    meters: bool = True
    """Measure density, selection quality, score distribution and dead neurons of every layer, and what they cost."""
    meter_batches: int = 8
    """Batches that the meters read."""
    contexts: tuple[int, ...] = (512, 2048, 8192)
    """Context lengths, in tokens, at which FLOPs and bytes per token are counted."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(args: Sequence[str]) -> None:
    """Evaluate and print."""
    command = cli.parse(Evaluate, args, prog="evaluate", description=(__doc__ or "").strip())
    figures = evaluate(command)
    if command.json:
        print(json.dumps(figures))
        return
    rows = [
        ("loss", f"{figures['loss']:.4f} nats/token"),
        ("perplexity", f"{figures['perplexity']:.2f}"),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}"),
        ("tokens", f"{figures['tokens']:,}"),
    ]
    cli.print_table(f"{command.directory}, {figures['split']} split", ("figure", "value"), rows)
    if "meters" not in figures:
        cli.print_layers(figures)
        return
    print_meters(figures["meters"]["layers"])
    print_flow(figures["meters"]["layers"])
    print_parameters(figures["parameters"])
    print_costs(figures["costs"])


def evaluate(command: Evaluate) -> dict[str, Any]:
    """The figures by name: loss (nats/token), perplexity, bits_per_byte, tokens, and per-layer statistics.

    With meters also "meters" (see `evaluation.Meters`), "costs" (a list of `evaluation.Cost`) and "parameters".

    Raises:
      UserError: no run or step there, an unknown corpus, or a run without a tokenizer.
      StorageError: files that can't be read.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation import as_rows, cost_table, evaluate_model, measure

    require(command.batches is None or command.batches > 0, "--batches", command.batches, "must be above 0")
    require(command.batch_size is None or command.batch_size > 0, "--batch-size", command.batch_size, "must be above 0")
    require(command.meter_batches > 0, "--meter-batches", command.meter_batches, "must be above 0")
    for context in command.contexts:
        require(context > 0, "--contexts", context, "must be above 0")
    require(command.merge_last > 0, "--merge-last", command.merge_last, "must be above 0")
    model, config, tokenizer = run_dir.load(command.directory, step=command.step, merge_last=command.merge_last)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    data_config = config.data
    if command.dataset is not None:
        data_config = dataclasses.replace(data_config, dataset=command.dataset)
    prepared = data.prepare(data_config, command.split, tokenizer)
    batch_size = command.batch_size or config.data.batch_size
    batches = data.evaluation_batches(prepared, batch_size, command.batches)
    result = evaluate_model(model, batches, prepared.num_bytes / prepared.num_targets)
    figures = {"split": command.split, **result.as_dict()}
    if not command.meters:
        return figures
    meters = measure(model, config.model, data.evaluation_batches(prepared, batch_size, command.meter_batches))
    costs = cost_table(config.model, command.contexts, meters.sparsity())
    counts = parameter_counts(config.model, meters.sparsity())
    return {**figures, "meters": meters.as_dict(), "costs": as_rows(costs), "parameters": counts}


def parameter_counts(config: DecoderConfig, measured: Sparsity) -> dict[str, float]:
    """Parameters in all, without embeddings, and those that one token needs: as configured and as measured."""
    from sparsezoo_jax.models import activated_parameters, count_parameters

    count, aim, found = count_parameters(config), activated_parameters(config), activated_parameters(config, measured)
    return {
        "total": count.total,
        "non_embedding": count.non_embedding,
        "activated_layers": aim.layers,
        "activated_layers_measured": found.layers,
        "activated_head": aim.head,
    }


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


if __name__ == "__main__":
    cli.run(main)
