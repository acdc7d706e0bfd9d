"""The Spark paper's ablations on the embedded corpus: `python -m benchmarks.ablations`.

Every variant is spark tiny with one thing changed, at the same learning rate, tokens and (apart from the variants that
say so) parameters. Finished runs are kept in `--runs` and not repeated; an unfinished one resumes from its checkpoint.
All variants of the first seed come before those of the second, and `--table` prints what there is without training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.training_runs import figures_of
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig


class Variant(NamedTuple):
    """One row of the table."""

    group: str
    name: str
    flags: Mapping[str, Any] = {}
    arch: str = "spark"


def variants() -> list[Variant]:
    """The rows, the unchanged model first."""
    model = preset("spark", "tiny").model
    assert isinstance(model.ffn, SparkFFNConfig)
    assert isinstance(model.attention, SparkAttentionConfig)
    width, d_ff, head = model.d_model, model.ffn.d_ff, model.attention.head_dim
    dense_ffn = {"model.ffn.kind": "gated", "model.ffn.d-ff": d_ff * 2 // 3}
    return [
        Variant("", "spark tiny: r = d/2, 8 % dense, statistical, softplus"),
        Variant("where", "neither (dense twin)", arch="dense"),
        Variant("where", "Spark FFN only", {"model.attention.kind": "gqa"}),
        Variant("where", "Spark attention only", dense_ffn),
        *(Variant("r of the FFN", f"r = {name} d", {"model.ffn.r": int(width * part)})
          for name, part in (("1/4", 0.25), ("3/4", 0.75))),
        *(Variant("FFN density", f"{percent} %", {"model.ffn.top-k": round(d_ff * percent / 100)})
          for percent in (3, 5, 10, 20)),
        Variant("predictor", "plain top-k on a gated FFN, no split", {
            **dense_ffn, "model.ffn.activation-sparsity-pattern": 0.92}),
        Variant("threshold", "exact top-k in the FFN", {"model.ffn.selection": "exact"}),
        Variant("threshold", "exact top-k in FFN and attention", {
            "model.ffn.selection": "exact", "model.attention.selection": "exact"}),
        Variant("threshold", "ReLU in the FFN, no target density", {"model.ffn.selection": "relu"}),
        Variant("softplus", "off, the same r", {"model.attention.weighting": "none"}),
        Variant("softplus", "off, r = the whole head", {
            "model.attention.weighting": "none", "model.attention.r": head}),
    ]  # fmt: skip


def main() -> None:
    """Train what is missing and print the table."""
    columns = {
        "active neurons": lambda figures: f"{statistics.mean(figures['ffn_density']):.1%}",
        "attended keys": lambda figures: f"{statistics.mean(figures['attended_keys']):.1f}",
    }
    run(variants(), columns, Path("runs/ablations"), __doc__ or "")


Columns = Mapping[str, Callable[[dict[str, Any]], str]]


def run(rows_wanted: Sequence[Variant], columns: Columns, runs: Path, description: str) -> None:
    """Parse flags, train what is missing and print the table; `columns` format statistics of a row beside its loss."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    groups = list(dict.fromkeys(variant.group for variant in rows_wanted if variant.group))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups, help="train rows of these alone")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs only")
    options = parser.parse_args()
    rows: list[tuple[Variant, list[dict[str, Any]]]] = [(variant, []) for variant in rows_wanted]
    for seed in options.seeds:
        for index, (variant, found) in enumerate(rows):
            slug = "-".join("".join(c if c.isalnum() else " " for c in f"{variant.group} {variant.name}").split())
            workdir = options.runs / f"{index:02d}-{slug}-seed{seed}-steps{options.steps}"
            if variant.group and variant.group not in options.groups:
                continue
            if options.table and not (workdir / "evaluation.json").exists():
                continue
            flags = {"train.steps": options.steps, "train.seed": seed, "data.seed": seed, **variant.flags}
            found.append(figures_of(workdir, variant.arch, flags))
    print_table(rows, columns)


def print_table(rows: Sequence[tuple[Variant, list[dict[str, Any]]]], columns: Columns) -> None:
    """Loss of every variant, beside the unchanged model over the seeds that both have."""
    base = rows[0][1]
    header = ("changed", "to", "loss, nats/token", "spread", "against the first row", *columns, "seeds")
    print(f"| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for variant, found in rows:
        if not found:
            continue
        losses = [figures["loss"] for figures in found]
        change = statistics.mean(losses) / statistics.mean(row["loss"] for row in base[: len(losses)]) - 1
        # Statistics of all seeds as one: their layers beside each other.
        together = {
            name: [value for figures in found for value in figures[name]]
            for name, first in found[0].items()
            if isinstance(first, list)
        }
        more = "".join(f" {form(together)} |" for form in columns.values())
        print(
            f"| {variant.group or '(nothing)'} | {variant.name} | {statistics.mean(losses):.4f} "
            f"| {max(losses) - min(losses):.4f} | {change:+.2%} |{more} {len(losses)} |"
        )


if __name__ == "__main__":
    main()
