"""What few active units can tell apart: `python -m sparsezoo_jax.theory --population 16384 --active 1300`.

Chances of confusion between sparse patterns by the formulas of sparse distributed representations (docs/theory.md), and
with --run beside what the active neurons of a trained model do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sparsezoo_jax import cli
from sparsezoo_jax.corpus_flags import CorpusFlags
from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.path_flags import IN_RUN_STORES


@dataclass(frozen=True, kw_only=True)
class Theory(CorpusFlags):
    """Flags of the command."""

    population: int = 10_000
    """Units, of which patterns are sets: neurons of a layer, dimensions of a code (n)."""
    active: int = 300
    """Units of a pattern (a)."""
    sampled: int = 24
    """Units of one pattern that a detector knows (s)."""
    threshold: int = 12
    """Of these, how many must be active for a match."""
    noise: float = 0.5
    """Share of a pattern's active units that may be others and should do no harm."""
    stored: int = 1
    """Patterns among which one is looked for, or whose union is taken (M)."""
    error: float = 1e-9
    """Chance of a false match that is looked for."""
    simulate: int = 0
    """Random patterns to try the first chance with."""
    seed: int = 0
    """Of the simulation, and of signatures with --run."""
    run: Annotated[Path | None, IN_RUN_STORES] = None
    """Run directory of a model; its tokens' active neurons take the place of random patterns."""
    layer: int | None = None
    """Of --run, from 1. Default: at three quarters of the depth."""
    step: int | None = None
    """Checkpoint of --run; none is the newest."""
    batches: int = 4
    """Batches of the validation split that --run reads."""
    signatures: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of neurons by which --run tells tokens apart."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(args: Sequence[str]) -> None:
    """Compute, or measure, and print."""
    command = cli.parse(Theory, args, prog="theory", description=(__doc__ or "").strip())
    figures = calculated(command) if command.run is None else measured(command)
    if command.json:
        print(json.dumps(figures))
    elif command.run is None:
        _print_chances(command, figures)
    else:
        _print_signatures(figures)


def calculated(command: Theory) -> dict[str, Any]:
    """The chances for random patterns.

    Raises:
      ConfigError: numbers that don't go together.
    """
    from sparsezoo_jax.evaluation import representations as theory

    n, a, s, t, m = command.population, command.active, command.sampled, command.threshold, command.stored
    require(0 <= command.noise < 1, "--noise", command.noise, "must be in [0, 1)")
    changed = round(command.noise * a)
    figures: dict[str, Any] = {
        "false_match": theory.false_match(n, a, s, t),
        "missed_match": theory.missed_match(a, s, t, changed),
        "union_density": theory.union_density(n, a, m),
        "union_false_match": theory.union_false_match(n, a, s, t, m),
        "least_threshold": theory.least_threshold(n, a, s, command.error),
        "least_sample": theory.least_sample(n, a, command.error, command.noise),
    }
    figures["false_match_of_stored"] = min(1.0, m * figures["false_match"])
    if command.simulate:
        figures["simulated"] = theory.simulated_false_match(n, a, s, t, command.simulate, command.seed)
    return figures


def _print_chances(command: Theory, figures: dict[str, Any]) -> None:
    sample = figures["least_sample"]
    needed = "none" if sample is None else f"{sample[0]} units, threshold {sample[1]}"
    rows = [
        ("a random pattern matches", f"{figures['false_match']:.4g}"),
        (f"one of {command.stored:,} random patterns matches (at most)", f"{figures['false_match_of_stored']:.4g}"),
        (f"its own pattern with {command.noise:.0%} other units is missed", f"{figures['missed_match']:.4g}"),
        (f"units in the union of {command.stored:,} patterns", f"{figures['union_density']:.2%}"),
        ("the union of patterns without its own matches", f"{figures['union_false_match']:.4g}"),
        (f"least threshold for {command.error:g}", str(figures["least_threshold"])),
        (f"least sample for {command.error:g} and {command.noise:.0%} noise", needed),
    ]
    if "simulated" in figures:
        rows.insert(1, (f"of {command.simulate:,} random ones match", f"{figures['simulated']:.4g}"))
    title = f"{command.sampled} of {command.active:,} active units known, out of {command.population:,}"
    cli.print_table(f"{title}; {command.threshold} must be active", ("figure", "value"), rows)


def measured(command: Theory) -> dict[str, Any]:
    """Signatures of the tokens of a run's validation split.

    Raises:
      UserError: no run or layer there, no tokenizer, or too few active neurons.
    """
    import numpy as np

    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation.features import default_layer, ffn_features
    from sparsezoo_jax.evaluation.representations import measure_active_sets

    require(command.batches > 0, "--batches", command.batches, "must be above 0")
    for s in command.signatures:
        require(s > 0, "--signatures", s, "must be above 0")
    assert command.run is not None
    model, config, tokenizer = run_dir.load(command.run, step=command.step)
    features = ffn_features(model, command.layer, field="--layer")
    if tokenizer is None:
        raise UserError(f"{command.run}: has no tokenizer, so no text can be read")
    prepared = data.prepare(command.corpus(config.data), "validation", tokenizer)
    kept, ids = [], []
    for batch in data.evaluation_batches(prepared, config.data.batch_size, command.batches):
        hidden_BTF = np.asarray(features(batch["tokens"], batch["segment_ids"]))
        text_BT = np.asarray(batch["segment_ids"]) > 0
        kept.append(hidden_BTF[text_BT] != 0)
        ids.append(np.asarray(batch["tokens"])[text_BT])
    found = measure_active_sets(np.concatenate(kept), np.concatenate(ids), command.signatures, seed=command.seed)
    layer = default_layer(config.model.layers) if command.layer is None else command.layer
    return {"run": str(command.run), "layer": layer, **found.as_dict()}


def _print_signatures(figures: dict[str, Any]) -> None:
    title = (
        f"{figures['run']}, layer {figures['layer']}: {figures['tokens']:,} tokens with {figures['active']:.1f} of"
        f" {figures['population']:,} neurons active ({figures['used']:,} ever, {figures['effective']:.0f} in effect)"
    )
    header = ("known neurons", "others match: uniform", "by use", "measured", "of another word", "told apart")
    rows = [
        (
            str(s["sampled"]),
            *(f"{s[name]:.3g}" for name in ("uniform", "by_use", "measured", "unlike")),
            f"{s['alone']:.1%}",
        )
        for s in figures["signatures"]
    ]
    cli.print_table(title, header, rows)


if __name__ == "__main__":
    cli.run(main)
