"""Evaluate a run: `python -m sparsezoo_jax.evaluate DIR`.

Prints loss, perplexity and bits per byte of a split, for a mixture also of each corpus, and the meters of every layer's
sparsity (docs/evaluation.md).
With --chess, for a model of chess games: what its features say about the board (docs/chess.md).
With --interpret: how well a layer's features can be explained (docs/interpretability.md).
With --calibration: how often the likeliest token is right, beside the model's probability of it (docs/evaluation.md).
With --cett 1%: the share of hidden units that is enough for 1 % more perplexity (docs/sparsing-law.md).
With --tasks a,b: the figures of lm-evaluation-harness' tasks instead (docs/evaluation.md; extra [eval]).
With --beside RUN: also the time of a token in decoding, by turns with that of another run, such as its dense twin.
With --weights, --predictor or --head: also the loss of the model packed in these number formats (docs/decode.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from sparsezoo_jax import cli, platforms
from sparsezoo_jax.corpus_flags import CorpusFlags
from sparsezoo_jax.errors import ConfigError, NumericsError, UserError, require
from sparsezoo_jax.evaluation.chess.config import ChessEvaluation
from sparsezoo_jax.evaluation.interpretability.config import InterpretEvaluation
from sparsezoo_jax.evaluation_tables import print_chess, print_evaluation, print_interpretation, print_tasks
from sparsezoo_jax.mesh_flags import MeshFlags
from sparsezoo_jax.path_flags import IN_RUN_STORES
from sparsezoo_jax.weight_formats import WeightFormats

if TYPE_CHECKING:
    from sparsezoo_jax.config import RunConfig
    from sparsezoo_jax.models import Decoder
    from sparsezoo_jax.run_dir import Loaded


@dataclass(frozen=True, kw_only=True)
class Evaluate(WeightFormats, CorpusFlags, MeshFlags):
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory."""
    step: int | None = None
    """Checkpoint to load; none is the newest."""
    merge_last: int | None = None
    """Average this many newest checkpoints, weighted like a 1-sqrt decay (after a constant learning rate). None: the
    newest alone, or what a run with train.merge_last ends as."""
    base: Annotated[Path | None, IN_RUN_STORES] = None
    """Of a run of adapters: the run that they were trained for. None: where its configuration says."""
    split: Literal["train", "validation"] = "validation"
    """Split of the run's corpus."""
    batch_size: int | None = None
    """Sequences in a batch; none is the run's."""
    batches: int | None = None
    """Batches to read, of each corpus of a mixture; none reads the whole split."""
    meters: bool = True
    """Measure density, selection, score distribution, dead neurons and experts of every layer, and what they cost."""
    meter_batches: int = 8
    """Batches that the meters read."""
    calibration: bool = False
    """Also print how often the likeliest token is right, and the expected calibration error, on the split."""
    cett: str | None = None
    """Also drop the hidden units that raise the perplexity by this percentage at most, such as 1% (CETT-PPL), and print
    the share that is left, the activation ratio, of each layer; on the batches of the meters."""
    cett_last: int = 1
    """Find the dropped units' error jointly for this many newest checkpoints."""
    cett_curve: bool = False
    """Also print perplexity against activation ratio under CETT, under thresholds on the gate and under its top k."""
    beside: Annotated[Path | None, IN_RUN_STORES] = None
    """Also measure the time of a token in decoding, by turns with another run's: the one that a sparsified run was made
    of, or a dense twin."""
    beside_rounds: int = 7
    """With --beside: turns of each."""
    beside_context: int | None = None
    """With --beside: tokens of the split that both have read before. None: 64, or a sequence where that is shorter."""
    contexts: tuple[int, ...] = (512, 2048, 8192)
    """Context lengths, in tokens, at which FLOPs and bytes per token are counted."""
    tasks: str | None = None
    """Tasks of lm-evaluation-harness, with commas between them; instead."""
    limit: int | None = None
    """With --tasks: examples of each; none is all."""
    shots: int | None = None
    """With --tasks: examples shown in each prompt; none is what the task says."""
    task_path: Path | None = None
    """With --tasks: a directory with task files of your own."""
    explain: Annotated[bool, tyro.conf.arg(name="interpret")] = False
    """Explain the features of a layer, and test the explanations, instead."""
    interpret: InterpretEvaluation = field(default_factory=InterpretEvaluation)
    """What --interpret explains, and who judges."""
    json: bool = False
    """Print one JSON object instead of tables."""
    map_top_k: float | None = None
    """Of a model of images: the share of an image's patches at which each channel of its maps stays, as
    model.images.map_top_k, whatever the run was trained with. None: as the run."""
    map_top_k_of: Literal["ffn_output", "residual"] | None = None
    """With --map-top-k: the maps, as model.images.map_top_k_of. None: as the run."""
    score_chess: Annotated[bool, tyro.conf.arg(name="chess")] = False
    """Score the features of a model of chess games instead."""
    chess: ChessEvaluation = field(default_factory=ChessEvaluation)
    """What --chess scores."""

    def load(self) -> Loaded:
        """The model that is evaluated, its configuration and tokenizer."""
        from sparsezoo_jax import run_dir

        found = run_dir.load(
            self.directory, step=self.step, merge_last=self.merge_last, base=self.base, mesh=self.build_mesh()
        )
        share, of = self.map_top_k, self.map_top_k_of
        require(of is None or share is not None, "--map-top-k-of", of, "must be given with --map-top-k")
        return found if share is None else self._with_top_k(found, share)

    def _with_top_k(self, found: Loaded, share: float) -> Loaded:
        from sparsezoo_jax.models import Encoder
        from sparsezoo_jax.models.encoder import read_as

        require(0 < share <= 1, "--map-top-k", share, "must be above 0 and at most 1")
        model: Any = found.model
        if not isinstance(model, Encoder):
            raise ConfigError("--map-top-k", share, f"needs a model of images, and {self.directory} reads words")
        of = self.map_top_k_of or model.config.images.map_top_k_of
        images = dataclasses.replace(model.config.images, map_top_k=share, map_top_k_of=of)
        twin: Any = read_as(model, images)
        return found._replace(model=twin, config=dataclasses.replace(found.config, model=twin.config))


def main(args: Sequence[str]) -> None:
    """Evaluate and print."""
    platforms.keep_freed_memory()
    command = cli.parse(Evaluate, args, prog="evaluate", description=(__doc__ or "").strip())
    mode = mode_of(command)
    figures, show = figures_of(command), print_evaluation if mode is None else mode.show
    if command.json:
        print(json.dumps(cli.without_nan(figures)))
    else:
        show(command.directory, figures)


class Mode(NamedTuple):
    """Something that is evaluated in place of the loss and the meters."""

    flag: str
    wanted: bool
    configured: bool
    """Whether flags of this mode alone were given."""
    evaluate: Callable[[Evaluate], dict[str, Any]]
    show: Callable[[Path, dict[str, Any]], None]


def figures_of(command: Evaluate) -> dict[str, Any]:
    """What the flags ask for, by name: see `evaluate`, and the other functions of this module.

    Raises:
      ConfigError: flags that don't go together.
      UserError, StorageError: as these functions.
    """
    from sparsezoo_jax.sharding import use_mesh

    mode = mode_of(command)
    with use_mesh(command.build_mesh()):
        return (evaluate if mode is None else mode.evaluate)(command)


def mode_of(command: Evaluate) -> Mode | None:
    """What is asked for in place of the loss and the meters; raises `ConfigError` for flags that don't go together."""
    modes = _modes(command)
    for mode in modes:
        with_it = "--limit, --shots and --task-path" if mode.flag == "--tasks" else f"{mode.flag}.* flags"
        require(mode.wanted or not mode.configured, mode.flag, False, f"must be given with {with_it}")
        require(not (mode.wanted and command.chosen), mode.flag, True, "can't be given with number formats")
    chosen = [mode for mode in modes if mode.wanted]
    for mode in chosen[1:]:
        require(False, mode.flag, True, f"can't be given with {chosen[0].flag}")
    return chosen[0] if chosen else None


def _modes(command: Evaluate) -> tuple[Mode, ...]:
    chess, explained = command.chess != ChessEvaluation(), command.interpret != InterpretEvaluation()
    tasks = (command.limit, command.shots, command.task_path) != (None, None, None)
    return (
        Mode("--tasks", command.tasks is not None, tasks, evaluate_tasks, print_tasks),
        Mode("--chess", command.score_chess, chess, evaluate_chess, print_chess),
        Mode("--interpret", command.explain, explained, interpret, print_interpretation),
    )


def evaluate(command: Evaluate) -> dict[str, Any]:
    """The figures by name: loss (nats/token), perplexity, bits_per_byte, tokens, and per-layer statistics.

    Of a mixture also "corpora": its weight and these figures for each corpus by name. Its own figures are averages by
    the weights.
    With number formats also "packed": "formats", "loss" and its "change".
    Of a sparsified run also "sparsified": see `evaluation.sparsified.needed`, and "made", how it was (`sparsify.json`).
    Of a pruned run also "pruned": see `evaluation.sparsified.zeros`, and "made".
    Of a run whose experts were made of a dense one's neurons also "converted": "made".
    With calibration also "calibration" (see `evaluation.Calibration`).
    With cett also "activation": see `activation`.
    With another run beside also "decoding": see `decoding`.
    With meters also "meters" (see `evaluation.Meters`), "costs" (a list of `evaluation.Cost`) and "parameters".

    Raises:
      UserError: no run or step there, an unknown corpus, or a run without a tokenizer.
      StorageError: files that can't be read.
    """
    from sparsezoo_jax import data
    from sparsezoo_jax.evaluation import calibrate, corpora, evaluate_corpora, measure
    from sparsezoo_jax.evaluation.cost import as_rows, cost_table, parameter_counts
    from sparsezoo_jax.evaluation.sparsified import made, needed, zeros
    from sparsezoo_jax.inference import packed
    from sparsezoo_jax.sharding import check_batch, device_put, named_sharding

    require(command.batches is None or command.batches > 0, "--batches", command.batches, "must be above 0")
    require(command.batch_size is None or command.batch_size > 0, "--batch-size", command.batch_size, "must be above 0")
    require(command.meter_batches > 0, "--meter-batches", command.meter_batches, "must be above 0")
    for context in command.contexts:
        require(context > 0, "--contexts", context, "must be above 0")
    merges = command.merge_last
    require(merges is None or merges > 0, "--merge-last", command.merge_last, "must be above 0")
    check_cett(command)
    check_beside(command)
    model, config, tokenizer = command.load()
    if config.model.images.patch is not None:
        return evaluate_images(command, model, config)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    prepared = data.prepare(command.corpus(config.data), command.split, tokenizer)
    batch_size = command.batch_size or config.data.batch_size

    def of_corpus(split: data.PreparedSplit) -> Any:
        return data.evaluation_batches(split, batch_size, command.batches)

    mesh, shape = command.build_mesh(), (batch_size, config.data.seq_len)
    check_batch(shape, mesh)
    placed = named_sharding(mesh)(("batch", "length"), shape)
    to_device = partial(device_put, sharding=placed, shape=shape) if mesh.size > 1 else dict
    result, each = evaluate_corpora(model, prepared, of_corpus, to_device=to_device)
    if not math.isfinite(result.loss):
        raise NumericsError(
            f"{command.directory}: the loss is {result.loss}: a weight that is no number, or a run that diverged"
        )
    figures: dict[str, Any] = {"split": command.split, **result.as_dict()}
    if each:
        figures["corpora"] = corpora.as_figures(prepared, each)
    if command.chosen:
        loss = evaluate_corpora(packed(model, command.formats), prepared, of_corpus, to_device=to_device)[0].loss
        names = command.formats._asdict().items()
        text = ", ".join(f"{name} {form}" for name, form in names if form is not None)
        figures["packed"] = {"formats": text, "loss": loss, "change": loss - result.loss}
    if found := needed(config.model, result.stats):
        figures["sparsified"] = {**found, "made": made(command.directory)}
    elif record := made(command.directory):
        of_experts = config.model.ffn.pre_gate(config.model) is not None
        figures["converted" if of_experts else "pruned"] = {**({} if of_experts else zeros(model)), "made": record}
    if command.calibration:
        batches = data.evaluation_batches(prepared, batch_size, command.batches)
        figures["calibration"] = calibrate(model, batches).as_dict()
    if command.cett is not None:
        figures["activation"] = activation(
            command, model, lambda most=None: data.evaluation_batches(prepared, batch_size, most)
        )
    if command.beside is not None:
        figures["decoding"] = decoding(command, model, next(iter(data.evaluation_batches(prepared, batch_size, 1))))
    if not command.meters:
        return figures
    meters = measure(model, config.model, data.evaluation_batches(prepared, batch_size, command.meter_batches))
    costs = cost_table(config.model, command.contexts, meters.sparsity(config.model))
    counts = parameter_counts(config.model, meters.sparsity(config.model))
    return {**figures, "meters": meters.as_dict(), "costs": as_rows(costs), "parameters": counts}


def evaluate_images(command: Evaluate, model: Any, config: RunConfig) -> dict[str, Any]:
    """As `evaluate`, of a model of images: of a classifier also "accuracy" and "ece"; "unit" says what the loss is of.

    Raises:
      UserError: flags that are for models of words, or an image set that can't be used.
    """
    from sparsezoo_jax import training_inputs
    from sparsezoo_jax.data.images.batches import images_once
    from sparsezoo_jax.evaluation import as_rows, calibrate, contexts, cost_table, measure, parameter_counts
    from sparsezoo_jax.sharding import check_batch, device_put, named_sharding

    allowed = f"can't be given for {command.directory}, a model of images"
    require(not command.chosen, "--weights, --predictor, --head", command.formats, allowed)
    require(command.cett is None, "--cett", command.cett, allowed)
    require(command.beside is None, "--beside", command.beside, allowed)
    images = config.model.images
    require(not (command.calibration and images.reconstructs), "--calibration", True, "needs a model of classes")
    config = dataclasses.replace(config, data=command.corpus(config.data))
    read = training_inputs.evaluation_images(config, command.split)
    batch_size = command.batch_size or config.data.batch_size

    def shown(most: int | None = command.batches) -> Any:
        return images_once(read, batch_size, most)

    mesh, shape = command.build_mesh(), (batch_size, config.data.seq_len)
    check_batch(shape, mesh)
    placed = named_sharding(mesh)(("batch", "length"), shape)
    to_device = partial(device_put, sharding=placed, shape=shape) if mesh.size > 1 else dict
    result, further = training_inputs.evaluate_images(model, config, shown, to_device=to_device)
    if not math.isfinite(result.loss):
        raise NumericsError(f"{command.directory}: the loss is {result.loss}: a run that diverged")
    averages = {name: value for name, value in result.as_dict().items() if name not in ("perplexity", "tokens")}
    unit = "hidden patch" if images.reconstructs else "image"
    figures = {"split": command.split, **averages, "count": result.tokens, "unit": unit, **further}
    if command.calibration:
        figures["calibration"] = calibrate(model, shown(), to_device=to_device).as_dict()
    if not command.meters:
        return figures
    meters = measure(model, config.model, map(to_device, shown(command.meter_batches)))
    costs = cost_table(config.model, contexts(config.model), meters.sparsity(config.model))
    counts = parameter_counts(config.model, meters.sparsity(config.model))
    return {**figures, "meters": meters.as_dict(), "costs": as_rows(costs), "parameters": counts}


def check_cett(command: Evaluate) -> None:
    """Raise `ConfigError` for --cett flags that say nothing, or too much."""
    from sparsezoo_jax.evaluation.cett import parse_share

    require(command.cett_last > 0, "--cett-last", command.cett_last, "must be above 0")
    if command.cett is None:
        require(command.cett_last == 1, "--cett-last", command.cett_last, "must be given with --cett")
        require(not command.cett_curve, "--cett-curve", True, "must be given with --cett")
        return
    parse_share(command.cett)
    both = command.cett_last > 1 and (command.merge_last or 1) > 1
    require(not both, "--cett-last", command.cett_last, "can't be given with --merge-last")


def activation(command: Evaluate, model: Decoder, batches: Callable[..., Any]) -> dict[str, Any]:
    """The activation ratio at --cett: "increase" of the perplexity, "cett", what it was found on, and what comes of it.

    "checkpoints" has one row for each: "step", "thresholds" of the layers and the figures of `evaluation.cett.Point`.
    "loss" and "perplexity" are those of the evaluated checkpoint on the split with its thresholds applied; with
    --cett-curve "curve" has points of that checkpoint.

    Args:
      model: of the evaluated checkpoint.
      batches: of the split, at most as many as asked for.

    Raises:
      UserError: fewer checkpoints than asked for.
      ConfigError: a model without hidden units to measure.
    """
    from sparsezoo_jax import run_dir
    from sparsezoo_jax.evaluation import cett, evaluate_model
    from sparsezoo_jax.training.parameters import saved_steps

    assert command.cett is not None
    steps = [step for step in saved_steps(command.directory / run_dir.CHECKPOINTS) if step <= (command.step or step)]
    allowed = f"{command.directory} has {len(steps)} checkpoints"
    require(command.cett_last <= len(steps), "--cett-last", command.cett_last, allowed)
    steps = steps[-command.cett_last :]
    others = [run_dir.load(command.directory, step=step, base=command.base).model for step in steps[:-1]]
    models = [cett.Calibrated(one, lambda: batches(command.meter_batches)) for one in (*others, model)]
    increase = cett.parse_share(command.cett)
    level = cett.find_cett(models, increase)
    rows = []
    for step, one in zip(steps, models, strict=True):
        thresholds = [float(x) for x in one.thresholds(level)]
        rows.append({"step": step, "thresholds": thresholds, **dataclasses.asdict(one.point("cett", level))})
    applied = evaluate_model(cett.Thinned(model, "cett", rows[-1]["thresholds"]), batches(command.batches))
    figures = {
        "increase": increase,
        "cett": level,
        "batches": command.meter_batches,
        "checkpoints": rows,
        "loss": applied.loss,
        "perplexity": applied.perplexity,
    }
    if command.cett_curve:
        figures["curve"] = [dataclasses.asdict(point) for point in cett.curve(models[-1])]
    return figures


def check_beside(command: Evaluate) -> None:
    """Raise `ConfigError` for --beside-* flags that ask for nothing, or are alone."""
    for flag in ("beside_rounds", "beside_context"):
        value, name = getattr(command, flag), f"--{flag.replace('_', '-')}"
        require(value is None or value > 0, name, value, "must be above 0")
        given = value != getattr(Evaluate, flag)
        require(command.beside is not None or not given, name, value, "must be given with --beside")


def decoding(command: Evaluate, model: Decoder, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The time of a token beside that of the run --beside, in the number formats that are chosen.

    Returns:
      "beside", "context", "rounds" as asked for, and the figures of `evaluation.decode_times.compared`.

    Raises:
      UserError, ConfigError: no run there, one of images, or more tokens than a model can attend to.
    """
    from sparsezoo_jax import run_dir
    from sparsezoo_jax.evaluation.decode_times import beside

    assert command.beside is not None
    row = batch["tokens"][0].tolist()
    mesh, rounds = command.build_mesh(), command.beside_rounds
    context = command.beside_context or min(64, len(row))
    require(context <= len(row), "--beside-context", context, f"must be at most a sequence, {len(row)} tokens")
    other: Any = run_dir.load(command.beside, mesh=mesh).model
    reads_words = other.config.images.patch is None
    require(reads_words, "--beside", command.beside, "must be a model of words: one of images does not decode")
    formats = command.formats if command.chosen else None
    found = beside(model, other, row[:context], rounds=rounds, formats=formats, mesh=mesh)
    return {"beside": str(command.beside), "context": context, "rounds": rounds, **found}


def evaluate_tasks(command: Evaluate) -> dict[str, Any]:
    """The figures of each of --tasks by name; see `harness.tasks.run_tasks`.

    Raises:
      UserError: no run there, no such task, or no harness installed.
    """
    from sparsezoo_jax.harness.tasks import run_tasks

    names = [name.strip() for name in (command.tasks or "").split(",") if name.strip()]
    require(bool(names), "--tasks", command.tasks, "must name tasks, with commas between them")
    mesh = command.build_mesh().size
    require(mesh == 1, "--tasks", command.tasks, f"are run on one device, not on a mesh of {mesh}")
    require(command.limit is None or command.limit > 0, "--limit", command.limit, "must be above 0")
    require(command.shots is None or command.shots >= 0, "--shots", command.shots, "must be at least 0")
    for flag, value in (("--merge-last", command.merge_last), ("--base", command.base)):
        require(value is None, flag, value, "can't be given with --tasks; see convert merge")
    return run_tasks(
        command.directory,
        names,
        step=command.step,
        batch_size=command.batch_size,
        limit=command.limit,
        shots=command.shots,
        task_path=command.task_path,
    )


def evaluate_chess(command: Evaluate) -> dict[str, Any]:
    """What the features of a layer say about the board: "layer" and the figures of `evaluation.chess.ChessScores`.

    Raises:
      UserError: no run there, a run that is not one of chess games, or too few games.
    """
    from flax import nnx

    from sparsezoo_jax.evaluation.chess import games_for, score_features
    from sparsezoo_jax.evaluation.features import default_layer, ffn_features
    from sparsezoo_jax.models import Decoder

    chess = command.chess
    model, config, tokenizer = command.load()
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no games can be read")
    if chess.random_weights:
        model = Decoder(config.model, rngs=nnx.Rngs(chess.seed))
    layer = default_layer(config.model.layers) if chess.layer is None else chess.layer
    features = ffn_features(model, layer, field="chess.layer")
    train, test = games_for(command.corpus(config.data), chess.games, chess.count)
    scores = score_features(features, tokenizer, train, test, properties=chess.properties, batch_size=chess.batch_size)
    return {"layer": layer, "random_weights": chess.random_weights, **scores.as_dict()}


def interpret(command: Evaluate) -> dict[str, Any]:
    """The figures of `evaluation.interpretability.Interpretation`, and with experts "experts" (`ExpertFigures`).

    Raises:
      UserError: no run, layer or autoencoder there, too little text, or a judge that can't be reached.
      StorageError: files that can't be read.
    """
    from sparsezoo_jax import data
    from sparsezoo_jax.autoencoders import load_sae
    from sparsezoo_jax.autoencoders.activations import sae_features
    from sparsezoo_jax.evaluation import interpretability
    from sparsezoo_jax.evaluation.features import default_layer, ffn_features

    options = command.interpret
    if options.judge == "endpoint":
        judge: Any = interpretability.EndpointJudge(options.model or "", options.base_url)
    else:
        judge = interpretability.built_in_judge(options.judge, options.seed)
    model, config, tokenizer = command.load()
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    prepared = data.prepare(command.corpus(config.data), command.split, tokenizer)

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
        features, batches, judge, options, lambda ids: data.pieces(tokenizer, ids), layer=layer
    )
    figures = {"split": command.split, "sae": options.sae, **result.as_dict()}
    return figures if experts is None else {**figures, "experts": experts.as_dict()}


if __name__ == "__main__":
    cli.run(main)
