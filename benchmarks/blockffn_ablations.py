"""BlockFFN's losses, and the mixtures of experts it is compared with, on the embedded corpus.

`python -m benchmarks.blockffn_ablations`. Every variant is the tiny preset of its architecture: the same backbone,
parameters (to 0.1 %), tokens and learning rate. Finished runs are kept in `--runs` and not repeated; an unfinished one
resumes from its checkpoint. TLS is the share of experts that a token leaves inactive, CLS_8 that a chunk of 8 tokens
does, gap their difference in points, reuse the share of a token's experts that the next one activates again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.training_runs import figures_of
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models.blockffn import ACTIVATION_LOCALITY, CHUNK_SPARSIFICATION, BlockFFNConfig

ROUTER = "router"


class Variant(NamedTuple):
    """One row of the table."""

    name: str
    arch: str = "blockffn"
    size: str = "tiny"
    flags: Mapping[str, Any] = {}


def variants() -> list[Variant]:
    """The rows, in the order of the paper's tables 2 and 3."""
    base = preset("blockffn")
    assert isinstance(base.model.ffn, BlockFFNConfig)
    groups = [dataclasses.asdict(group) for group in base.train.groups if ROUTER not in group.pattern]
    dense = {
        "model.ffn.kind": "gated",
        "model.ffn.d-ff": base.model.ffn.dense_twin().d_ff,
        "model.ffn.activation": "silu",
        "train.groups": json.dumps(groups),
        "train.objectives": "[]",
    }
    return [
        Variant("dense (SwiGLU)", flags=dense),
        Variant("TopK", "moe"),
        Variant("ReMoE", "moe", "tiny_remoe"),
        Variant("BlockFFN, neither loss", flags={"train.objectives": objectives(base)}),
        Variant("BlockFFN, AL", flags={"train.objectives": objectives(base, ACTIVATION_LOCALITY)}),
        Variant("BlockFFN, CS", flags={"train.objectives": objectives(base, CHUNK_SPARSIFICATION)}),
        Variant("BlockFFN, AL + CS"),
    ]


def objectives(config: RunConfig, *losses: str) -> str:
    """Those of the preset's objectives that weigh `losses`, as a flag takes them."""
    return json.dumps([dataclasses.asdict(part) for part in config.train.objectives if part.loss in losses])


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/blockffn_ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs only")
    options = parser.parse_args()
    rows: list[tuple[Variant, list[dict[str, Any]]]] = [(variant, []) for variant in variants()]
    for seed in options.seeds:
        for variant, found in rows:
            slug = "-".join("".join(c if c.isalnum() else " " for c in variant.name).split())
            workdir = options.runs / f"{slug}-seed{seed}-steps{options.steps}"
            if options.table and not (workdir / "evaluation.json").exists():
                continue
            flags = {"size": variant.size, "train.steps": options.steps, "train.seed": seed, "data.seed": seed}
            found.append(figures_of(workdir, variant.arch, {**flags, **variant.flags}))
    print_table(rows)


def print_table(rows: Sequence[tuple[Variant, list[dict[str, Any]]]]) -> None:
    """Validation loss and sparsity of every variant, means over seeds and layers."""
    print("| variant | loss, nats/token | TLS % | CLS_8 % | gap | reuse % | TLS by layer | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for variant, found in rows:
        if not found:
            continue
        loss = statistics.mean(figures["loss"] for figures in found)
        if "chunk_density_8" not in found[0]:
            print(f"| {variant.name} | {loss:.4f} | - | - | - | - | - | {len(found)} |")
            continue
        tls, cls, reuse = (
            100 * statistics.mean(value for figures in found for value in figures[name])
            for name in ("ffn_density", "chunk_density_8", "expert_reuse")
        )
        layers = (statistics.mean(values) for values in zip(*(row["ffn_density"] for row in found), strict=True))
        by_layer = " ".join(f"{100 * (1 - density):.0f}" for density in layers)
        print(
            f"| {variant.name} | {loss:.4f} | {100 - tls:.2f} | {100 - cls:.2f} | {cls - tls:.2f} | {reuse:.1f} "
            f"| {by_layer} | {len(found)} |"
        )


if __name__ == "__main__":
    main()
