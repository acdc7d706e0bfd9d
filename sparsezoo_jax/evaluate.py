"""Evaluate a run: `python -m sparsezoo_jax.evaluate DIR`.

Prints loss, perplexity and bits per byte of a split, and the meters of every layer's sparsity (docs/evaluation.md).
With --chess, for a model of chess games: what its features say about the board (docs/chess.md).
With --interpret: how well a layer's features can be explained (docs/interpretability.md).
With --weights, --predictor or --head: also the loss of the model packed in these number formats (docs/decode.md).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from sparsezoo_jax import cli
from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.evaluation.chess.config import ChessEvaluation
from sparsezoo_jax.evaluation.interpretability.config import InterpretEvaluation
from sparsezoo_jax.weight_formats import WeightFormats

if TYPE_CHECKING:
    from sparsezoo_jax.models import DecoderConfig, Sparsity


@dataclass(frozen=True, kw_only=True)
class Evaluate(WeightFormats):
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
    """Measure density, selection, score distribution, dead neurons and experts of every layer, and what they cost."""
    meter_batches: int = 8
    """Batches that the meters read."""
    contexts: tuple[int, ...] = (512, 2048, 8192)
    """Context lengths, in tokens, at which FLOPs and bytes per token are counted."""
    explain: Annotated[bool, tyro.conf.arg(name="interpret")] = False
    """Explain the features of a layer, and test the explanations, instead."""
    interpret: InterpretEvaluation = field(default_factory=InterpretEvaluation)
    """What --interpret explains, and who judges."""
    json: bool = False
    """Print one JSON object instead of tables."""
    score_chess: Annotated[bool, tyro.conf.arg(name="chess")] = False
    """Score the features of a model of chess games instead."""
    chess: ChessEvaluation = field(default_factory=ChessEvaluation)
    """What --chess scores."""


def main(args: Sequence[str]) -> None:
    """Evaluate and print."""
    command = cli.parse(Evaluate, args, prog="evaluate", description=(__doc__ or "").strip())
    modes = _modes(command)
    for mode in modes:
        require(mode.wanted or not mode.configured, mode.flag, False, f"must be given with {mode.flag}.* flags")
        require(not (mode.wanted and command.chosen), mode.flag, True, "can't be given with number formats")
    chosen = [mode for mode in modes if mode.wanted]
    for mode in chosen[1:]:
        require(False, mode.flag, True, f"can't be given with {chosen[0].flag}")
    figures = chosen[0].evaluate(command) if chosen else evaluate(command)
    if command.json:
        print(json.dumps(figures))
        return
    if chosen:
        chosen[0].show(command.directory, figures)
        return
    rows = [
        ("loss", f"{figures['loss']:.4f} nats/token"),
        ("perplexity", f"{figures['perplexity']:.2f}"),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}"),
        ("tokens", f"{figures['tokens']:,}"),
    ]
    if "packed" in figures:
        stored = figures["packed"]
        rows.append((f"loss, {stored['formats']}", f"{stored['loss']:.4f} nats/token ({stored['change']:+.4f})"))
    cli.print_table(f"{command.directory}, {figures['split']} split", ("figure", "value"), rows)
    if "meters" not in figures:
        cli.print_layers(figures)
        return
    print_meters(figures["meters"]["layers"])
    print_experts(figures["meters"])
    print_flow(figures["meters"]["layers"])
    print_parameters(figures["parameters"])
    print_costs(figures["costs"])


class Mode(NamedTuple):
    """Something that is evaluated in place of the loss and the meters."""

    flag: str
    wanted: bool
    configured: bool
    """Whether flags of this mode alone were given."""
    evaluate: Callable[[Evaluate], dict[str, Any]]
    show: Callable[[Path, dict[str, Any]], None]


def _modes(command: Evaluate) -> tuple[Mode, ...]:
    chess, explained = command.chess != ChessEvaluation(), command.interpret != InterpretEvaluation()
    return (
        Mode("--chess", command.score_chess, chess, evaluate_chess, print_chess),
        Mode("--interpret", command.explain, explained, interpret, print_interpretation),
    )


def evaluate(command: Evaluate) -> dict[str, Any]:
    """The figures by name: loss (nats/token), perplexity, bits_per_byte, tokens, and per-layer statistics.

    With number formats also "packed": "formats", "loss" and its "change".
    With meters also "meters" (see `evaluation.Meters`), "costs" (a list of `evaluation.Cost`) and "parameters".

    Raises:
      UserError: no run or step there, an unknown corpus, or a run without a tokenizer.
      StorageError: files that can't be read.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation import as_rows, cost_table, evaluate_model, measure
    from sparsezoo_jax.inference import packed

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
    figures: dict[str, Any] = {"split": command.split, **result.as_dict()}
    if command.chosen:
        batches = data.evaluation_batches(prepared, batch_size, command.batches)
        loss = evaluate_model(packed(model, command.formats), batches).loss
        names = command.formats._asdict().items()
        text = ", ".join(f"{name} {form}" for name, form in names if form is not None)
        figures["packed"] = {"formats": text, "loss": loss, "change": loss - result.loss}
    if not command.meters:
        return figures
    meters = measure(model, config.model, data.evaluation_batches(prepared, batch_size, command.meter_batches))
    costs = cost_table(config.model, command.contexts, meters.sparsity(config.model))
    counts = parameter_counts(config.model, meters.sparsity(config.model))
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


def evaluate_chess(command: Evaluate) -> dict[str, Any]:
    """What the features of a layer say about the board: "layer" and the figures of `evaluation.chess.ChessScores`.

    Raises:
      UserError: no run there, a run that is not one of chess games, or too few games.
    """
    from flax import nnx

    from sparsezoo_jax import run_dir
    from sparsezoo_jax.evaluation.chess import games_for, score_features
    from sparsezoo_jax.evaluation.features import default_layer, ffn_features
    from sparsezoo_jax.models import Decoder

    chess = command.chess
    model, config, tokenizer = run_dir.load(command.directory, step=command.step, merge_last=command.merge_last)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no games can be read")
    if chess.random_weights:
        model = Decoder(config.model, rngs=nnx.Rngs(chess.seed))
    layer = default_layer(config.model.layers) if chess.layer is None else chess.layer
    features = ffn_features(model, layer, field="chess.layer")
    train, test = games_for(config.data, chess.games, chess.count)
    scores = score_features(features, tokenizer, train, test, properties=chess.properties, batch_size=chess.batch_size)
    return {"layer": layer, "random_weights": chess.random_weights, **scores.as_dict()}


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


def interpret(command: Evaluate) -> dict[str, Any]:
    """The figures of `evaluation.interpretability.Interpretation`, and with experts "experts" (`ExpertFigures`).

    Raises:
      UserError: no run, layer or autoencoder there, too little text, or a judge that can't be reached.
      StorageError: files that can't be read.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.autoencoders import load_sae
    from sparsezoo_jax.autoencoders.activations import sae_features
    from sparsezoo_jax.evaluation import interpretability
    from sparsezoo_jax.evaluation.features import default_layer, ffn_features

    options = command.interpret
    if options.judge == "endpoint":
        judge: Any = interpretability.EndpointJudge(options.model or "", options.base_url)
    else:
        judge = interpretability.built_in_judge(options.judge, options.seed)
    model, config, tokenizer = run_dir.load(command.directory, step=command.step, merge_last=command.merge_last)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    prepared = data.prepare(config.data, command.split, tokenizer)

    def batches(most: int | None = None) -> Any:
        return data.evaluation_batches(prepared, command.batch_size or config.data.batch_size, most)

    layer = options.layer or default_layer(config.model.layers)
    if options.sae is None:
        features = ffn_features(model, layer, field="interpret.layer")
        experts = interpretability.expert_figures(model, batches(command.meter_batches), layer)
    else:
        autoencoder, run = load_sae(options.sae)
        layer, experts = run.train.layer or layer, None
        features = sae_features(autoencoder, model, layer, run.train.site)
    result = interpretability.interpret(
        features, batches, judge, options, lambda token: tokenizer.decode([token]), layer=layer
    )
    figures = {"split": command.split, "sae": options.sae, **result.as_dict()}
    return figures if experts is None else {**figures, "experts": experts.as_dict()}


def print_interpretation(directory: Path, figures: dict[str, Any]) -> None:
    """Print accuracy overall and by activation, and the figures of experts."""

    def cell(value: dict[str, Any]) -> str:
        if value["mean"] is None:
            return "-"
        width = value["half_width"]
        return f"{value['mean']:.3f}" + ("" if width is None else f" ± {width:.3f}")

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


if __name__ == "__main__":
    cli.run(main)
