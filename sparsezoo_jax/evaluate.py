"""Evaluate a run: `python -m sparsezoo_jax.evaluate DIR`.

Prints loss, perplexity and bits per byte of a split, and the measured sparsity of every layer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sparsezoo_jax import cli
from sparsezoo_jax.errors import UserError, require


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
    cli.print_layers(figures)


def evaluate(command: Evaluate) -> dict[str, Any]:
    """The figures by name: loss (nats/token), perplexity, bits_per_byte, tokens, and per-layer statistics.

    Raises:
      UserError: no run or step there, an unknown corpus, or a run without a tokenizer.
      StorageError: files that can't be read.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation import evaluate_model

    require(command.batches is None or command.batches > 0, "--batches", command.batches, "must be above 0")
    require(command.batch_size is None or command.batch_size > 0, "--batch-size", command.batch_size, "must be above 0")
    require(command.merge_last > 0, "--merge-last", command.merge_last, "must be above 0")
    model, config, tokenizer = run_dir.load(command.directory, step=command.step, merge_last=command.merge_last)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    data_config = config.data
    if command.dataset is not None:
        data_config = dataclasses.replace(data_config, dataset=command.dataset)
    prepared = data.prepare(data_config, command.split, tokenizer)
    batches = data.evaluation_batches(prepared, command.batch_size or config.data.batch_size, command.batches)
    result = evaluate_model(model, batches, prepared.num_bytes / prepared.num_targets)
    return {"split": command.split, **result.as_dict()}


if __name__ == "__main__":
    cli.run(main)
