"""Train a sparse autoencoder on a run's activations: `python -m sparsezoo_jax.sae DIR --kind topk`.

The autoencoder goes to DIR/sae/KIND-SITE-LAYER, or --workdir, with the figures of its fidelity on the validation split.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsezoo_jax import cli, platforms
from sparsezoo_jax.autoencoders.config import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    SAEConfig,
    SAETrainConfig,
    StandardSAE,
    TopKSAE,
    check_pair,
)
from sparsezoo_jax.corpus_flags import CorpusFlags
from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.evaluation_tables import zipf_text
from sparsezoo_jax.path_flags import IN_RUN_STORES
from sparsezoo_jax.storage import write_atomic

KINDS: dict[str, Any] = {
    "standard": StandardSAE,
    "gated": GatedSAE,
    "jump_relu": JumpReLUSAE,
    "topk": TopKSAE,
    "batch_topk": BatchTopKSAE,
    "feature_choice": FeatureChoiceSAE,
    "gba": GBASAE,
}


@dataclass(frozen=True, kw_only=True)
class TrainSAE(CorpusFlags):
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory of the model."""
    kind: str = "topk"
    """standard, gated, jump_relu, topk, batch_topk, feature_choice or gba: selects which flags --sae.* there are."""
    sae: SAEConfig
    """The autoencoder."""
    train: SAETrainConfig
    """Layer, site, training."""
    step: int | None = None
    """Checkpoint of the model; none is the newest."""
    workdir: Annotated[Path | None, IN_RUN_STORES] = None
    """Directory of the autoencoder, empty or new."""
    batches: int = 8
    """Batches of the validation split on which the result is measured."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: Sequence[str]) -> None:
    """Train, measure, save and print."""
    platforms.keep_freed_memory()
    kind = cli.value_of(args, "--kind") or "topk"
    require(kind in KINDS, "--kind", kind, f"must be one of {', '.join(KINDS)}")
    default = TrainSAE(directory=tyro.MISSING, kind=kind, sae=KINDS[kind](), train=SAETrainConfig())
    command = cli.parse(TrainSAE, args, prog="sae", description=(__doc__ or "").strip(), default=default)
    figures = train(command)
    if command.json:
        print(json.dumps(figures))
        return

    def shown(name: str, form: str) -> str:
        return "-" if figures[name] is None else format(figures[name], form)

    rows = [
        ("features of a token (L0)", shown("l0", ".1f")),
        ("variance unexplained (FVU)", shown("fvu", ".4f")),
        ("features that never fired", f"{figures['dead']:,} of {figures['features']:,}"),
        ("loss recovered", shown("loss_recovered", ".2%")),
        ("loss: model, reconstructed, ablated", ", ".join(shown(n, ".4f") for n in _LOSSES)),
        ("Zipf law of densities", zipf_text(figures["zipf"])),
        ("tokens", f"{figures['tokens']:,}"),
    ]
    cli.print_table(f"{figures['workdir']}: {kind}, {figures['site']} of layer {figures['layer']}", _HEAD, rows)


_HEAD = ("figure", "value")
_LOSSES = ("loss", "loss_reconstructed", "loss_ablated")


def train(command: TrainSAE) -> dict[str, Any]:
    """Train what the command says; returns the figures that are also in `evaluation.json`.

    Raises:
      UserError: no run or layer there, or a directory that is not empty; nothing has been written then.
      StorageError: reading or writing failed.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.autoencoders import SAERun, Trainer, save_sae
    from sparsezoo_jax.autoencoders.activations import fidelity, reader, stream
    from sparsezoo_jax.autoencoders.store import as_row
    from sparsezoo_jax.evaluation.features import default_layer

    require(command.batches > 0, "--batches", command.batches, "must be above 0")
    settings = command.train
    check_pair(command.sae, settings)
    model, config, tokenizer = run_dir.load(command.directory, step=command.step)
    layers = config.model.layers
    layer = default_layer(layers) if settings.layer is None else settings.layer
    require(layer <= layers, "train.layer", layer, f"must be from 1 to {layers}")
    settings = dataclasses.replace(settings, layer=layer)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    place = f"{command.kind}-{settings.site}-{layer}"
    workdir = command.workdir or command.directory / "sae" / place
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir={workdir}: is not empty; name another")

    corpus = command.corpus(config.data)
    prepared = data.prepare(corpus, "train", tokenizer)
    batches = data.prepared_batches(prepared, batch_size=config.data.batch_size, seed=settings.seed)
    read = reader(model, layer, settings.site)
    rows: list[dict[str, Any]] = []
    try:
        activations = stream(read, batches, settings.batch_size, settings.seed)
        trainer = Trainer(command.sae, settings, next(activations))
        for step, x_ND in enumerate(activations, 1):
            metrics = trainer.step(x_ND)
            if step % 100 == 0 or step == settings.steps:
                rows.append({"step": step, **{name: float(value) for name, value in metrics.items()}})
                _progress(rows[-1], settings.steps)
            if step == settings.steps:
                break
    finally:
        batches.close()
    validation = data.prepare(corpus, "validation", tokenizer)
    shown = data.evaluation_batches(validation, config.data.batch_size, command.batches)
    run = SAERun(source=str(command.directory), step=command.step, sae=command.sae, train=settings)
    result = fidelity(trainer.autoencoder, model, shown, layer, settings.site)
    figures = {"workdir": str(workdir), **as_row(run), **result.as_dict()}
    save_sae(workdir, run, trainer.autoencoder)
    write_atomic(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_atomic(workdir / "evaluation.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _progress(row: dict[str, Any], steps: int) -> None:
    import sys

    text = "  ".join(f"{name} {row[name]:.4g}" for name in ("loss", "l0", "fvu", "dead"))
    print(f"step {row['step']}/{steps}  {text}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
