"""Make a sparser run of a trained one: `python -m sparsezoo_jax.sparsify RUN OUT --method teal --sparsity 0.5`.

Nothing is trained. Some text is read to see what the maps of each layer read, and OUT becomes a run whose layers leave
out the channels that matter least: those of small magnitude (teal), of small magnitude times the norm of their weights
(wina), or the neurons whose gates are small (cats). It is evaluated, continued, decoded and reported like every other.
docs/sparsify.md has the formulas and what the released code does otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sparsezoo_jax import cli, platforms
from sparsezoo_jax.corpus_flags import CorpusFlags
from sparsezoo_jax.errors import DataError, UserError, require
from sparsezoo_jax.path_flags import Stores
from sparsezoo_jax.sparsification.config import CalibrationConfig

if TYPE_CHECKING:
    from sparsezoo_jax.data import Prepared


@dataclass(frozen=True, kw_only=True)
class Sparsify(CorpusFlags):
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN"), Stores()]
    """Run directory to read."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT"), Stores()]
    """Run directory to make; empty or absent."""
    method: Literal["cats", "teal", "wina"]
    """cats: neurons of gated networks, by their gates; teal: channels of all linear maps, by magnitude; wina: these, by
    magnitude times the norm of their weights."""
    sparsity: float = 0.5
    """Share of the channels (cats: neurons) that is left out, in [0, 1)."""
    maps: tuple[str, ...] | None = None
    """Maps that leave channels out, of q, k, v, o, gate, up, down, neurons; none: those of the method."""
    gate: Literal["threshold", "top_k"] | None = None
    """threshold: one for a map and layer, from the calibration; top_k: a token's largest. None: that of the method."""
    weighted: tuple[str, ...] | None = None
    """Maps whose scores are multiplied by the norms of their weights; none: those of the method."""
    quantile: Literal["magnitude", "symmetric", "grid"] | None = None
    """What a threshold is: see docs/sparsify.md. None: that of the method."""
    released: bool = False
    """Take what the authors' code does where it is not what their paper says (docs/sparsify.md)."""
    dense_tokens: int = 0
    """First tokens of a document that read everything."""
    step: int | None = None
    """Checkpoint of the run to take; none is the newest."""
    base: Annotated[Path | None, Stores()] = None
    """Of a run of adapters: the run that they were trained for. None: where its configuration says."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """The text that says what maps read."""
    batches: int = 16
    """Batches of the validation split on which the loss is measured, before and after."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: Sequence[str]) -> None:
    """Make the run, measure and print."""
    platforms.keep_freed_memory()
    command = cli.parse(Sparsify, args, prog="sparsify", description=(__doc__ or "").strip())
    figures = sparsify(command)
    if command.json:
        print(json.dumps(cli.without_nan(figures)))
        return
    change = figures["loss"] - figures["loss_dense"]
    rows = [
        ("loss of the dense run", f"{figures['loss_dense']:.4f} nats/token"),
        ("loss at this sparsity", f"{figures['loss']:.4f} nats/token ({change:+.4f})"),
        ("weights of the layers that a token needs", f"{figures['weights'] / figures['weights_dense']:.2%}"),
        *((f"left out of {name}", f"{share:.2%}") for name, share in figures["left_out"].items()),
        ("tokens of the calibration", f"{figures['calibration_tokens']:,}"),
    ]
    cli.print_table(f"{command.out}: {command.method} at {command.sparsity:g}", ("figure", "value"), rows)


def sparsify(command: Sparsify) -> dict[str, Any]:
    """Make the run; returns the figures that are also in its `sparsify.json`.

    Raises:
      UserError: no run there, one that is sparsified, layers that the method can't treat, OUT not empty, or too little
        text; nothing has been written then.
      StorageError: reading or writing failed.
    """
    import numpy as np

    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation import evaluate_corpora
    from sparsezoo_jax.evaluation.sparsified import RECORD, needed
    from sparsezoo_jax.overrides import with_values
    from sparsezoo_jax.sparsification import (
        calibrate,
        is_sparsified,
        sparsified_config,
        thresholds,
        with_cuts,
        wrapped,
    )
    from sparsezoo_jax.storage import write_atomic
    from sparsezoo_jax.training.lora import LoRAConfig
    from sparsezoo_jax.training.parameters import save_params, saved_steps
    from sparsezoo_jax.training.state import ModelTemplate, flatten

    require(0 <= command.sparsity < 1, "--sparsity", command.sparsity, "must be in [0, 1)")
    require(command.batches > 0, "--batches", command.batches, "must be above 0")
    require(command.dense_tokens >= 0, "--dense-tokens", command.dense_tokens, "must be at least 0")
    method = chosen(command)
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise UserError(f"{command.out}: is not empty; name another directory")
    sparsity = method.sparsity(command.sparsity, command.dense_tokens)
    model, config, tokenizer = run_dir.load(command.directory, step=command.step, base=command.base)
    if is_sparsified(config.model):
        raise UserError(f"{command.directory}: is sparsified already; take the run that it was made of")
    target = sparsified_config(config.model, sparsity, exact=command.maps is not None)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")

    corpus = command.corpus(config.data)
    flags = dataclasses.replace(command, dataset=command.calibration.dataset or command.dataset)
    read = data.prepare(flags.corpus(config.data), command.calibration.split, tokenizer)
    validation = data.prepare(corpus, "validation", tokenizer)
    size = min(config.data.batch_size, command.calibration.sequences)
    enough(read, size)

    def shown(split: data.PreparedSplit) -> Any:
        return data.evaluation_batches(split, config.data.batch_size, command.batches)

    dense, _ = evaluate_corpora(model, validation, shown)
    sparse = wrapped(model, target)
    calibration = calibrate(sparse, first(read, size, command.calibration.sequences), command.dense_tokens)
    shares = {name: np.full(config.model.layers, command.sparsity) for name in calibration.maps}
    cuts = shares if sparsity.gate == "top_k" else thresholds(calibration, shares, method.quantile)
    with_cuts(sparse, cuts)
    found, _ = evaluate_corpora(sparse, validation, shown)
    measured = needed(target, found.stats)

    steps = saved_steps(command.directory / run_dir.CHECKPOINTS)
    figures = {
        "method": command.method,
        "sparsity": command.sparsity,
        "quantile": method.quantile if sparsity.gate == "threshold" else None,
        "source": str(command.directory),
        "step": steps[-1] if command.step is None else command.step,
        "calibration_tokens": calibration.tokens,
        "batches": command.batches,
        "tokens": found.tokens,
        "loss_dense": dense.loss,
        "loss": found.loss,
        **measured,
        "cuts": {name: [float(x) for x in values] for name, values in cuts.items()},
    }
    params, variables = ModelTemplate(lambda rngs: type(sparse)(target, rngs=rngs)).split(sparse)
    save_params(command.out / run_dir.CHECKPOINTS, flatten(params), flatten(variables), step=figures["step"])
    tokenizer.save(command.out)
    calibration.save(command.out / "calibration.npz")
    content = json.dumps(cli.without_nan(figures), indent=2) + "\n"
    write_atomic(command.out / RECORD, content.encode())
    # The run is one of its own: no adapters, no base, no average of checkpoints.
    changes = {"model": target, "train.lora": LoRAConfig(), "train.merge_last": 1}
    changes |= {"train.init_step": None, "train.init_from": None}
    run_dir.write_config(command.out, with_values(config, changes))  # last: what is interrupted leaves no run behind
    return figures


def chosen(command: Sparsify) -> Any:
    """The method with what the flags say otherwise."""
    from sparsezoo_jax.sparsification.methods import METHODS, RELEASED

    method = (RELEASED if command.released else METHODS)[command.method]
    maps = method.maps if command.maps is None else command.maps
    weighted = method.weighted if command.weighted is None else command.weighted
    if command.weighted is None:
        weighted = tuple(name for name in weighted if name in maps)
    gate, quantile = command.gate or method.gate, command.quantile or method.quantile
    allowed = "is for --gate threshold"
    require(gate == "threshold" or command.quantile is None, "--quantile", command.quantile, allowed)
    return type(method)(maps, gate, weighted, quantile)


def enough(prepared: Prepared, size: int) -> None:
    """Raise `DataError` for text that is shorter than one sequence."""
    from sparsezoo_jax import data

    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in data.evaluation_batches(prepared, size, 1))
    if tokens < prepared.seq_len:
        raise DataError(f"the text to calibrate on has {tokens} tokens, less than a sequence of {prepared.seq_len}")


def first(prepared: Prepared, size: int, sequences: int) -> Iterator[dict[str, Any]]:
    """Batches of `size` with the first sequences of a split; further ones of the last batch are padding."""
    import numpy as np

    from sparsezoo_jax import data

    for n, batch in enumerate(data.evaluation_batches(prepared, size, -(-sequences // size))):
        kept_B1 = (n * size + np.arange(size) < sequences)[:, None]
        yield {**batch, "segment_ids": np.where(kept_B1, batch["segment_ids"], 0)}


if __name__ == "__main__":
    cli.run(main)
