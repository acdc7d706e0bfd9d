"""MoE-X's chess study at small size: `python -m benchmarks.chess_interpretability --games FILE.pgn`.

All variants have the backbone of `moex tiny` and see the same characters. The dense ones are as wide as the experts of
a token together; the upcycled one is a dense ReLU model as wide as one expert for half the steps, and MoE-X for the
other half. Finished runs and their scores are kept in `--runs` and not repeated; an unfinished run resumes from its
checkpoint. `--table` prints what there is without training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.training_runs import figures_of

EXPERTS, ACTIVE = 8, 2
#: Games whose characters the gate's scores are compared with true L0 on.
GATE_GAMES = 32


class Variant(NamedTuple):
    """One row of the table."""

    name: str
    flags: Mapping[str, Any]
    steps: float = 1.0
    """Share of the steps."""
    init_from: str | None = None
    """Variant that it starts from."""
    shown: bool = True


def variants(width: int) -> list[Variant]:
    """The rows, for experts of `width` neurons; one that starts from another comes after it."""

    def dense(activation: str, neurons: int) -> dict[str, Any]:
        ffn = {"kind": "plain", "d-ff": neurons, "activation": activation}
        return {**{f"model.ffn.{name}": value for name, value in ffn.items()}, "train.objectives": "[]"}

    def experts(gate: str) -> dict[str, Any]:
        ffn = {"experts": EXPERTS, "k": ACTIVE, "expert-width": width, "gate": gate}
        return {f"model.ffn.{name}": value for name, value in ffn.items()}

    return [
        Variant("dense GELU", dense("gelu_tanh", ACTIVE * width)),
        Variant("dense ReLU", dense("relu", ACTIVE * width)),
        Variant("Switch gate", experts("switch")),
        Variant("MoE-X", experts("sparsity")),
        Variant("dense ReLU, one expert wide", dense("relu", width), 0.5, shown=False),
        Variant("MoE-X upcycled", experts("sparsity"), 0.5, "dense ReLU, one expert wide"),
    ]


def directory(options: argparse.Namespace, variant: Variant) -> Path:
    """The run directory of a variant."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in variant.name).split())
    return options.runs / f"{slug}-seed{options.seed}-steps{options.steps}"


def main() -> None:
    """Train and score what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", required=True, help="PGN file, or glob of them, to train on")
    parser.add_argument("--runs", type=Path, default=Path("runs/chess"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=512, help="neurons of one expert")
    parser.add_argument("--seq-len", type=int, default=255)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--layer", type=int, default=3, help="layer that is read, from 1")
    parser.add_argument("--count", type=int, default=300, help="validation games to learn from, and to test on")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs only")
    options = parser.parse_args()
    print("| model | loss, nats/character | coverage | reconstruction | L0 | alive features | score-L0 correlation |")
    print("|---|---|---|---|---|---|---|")
    named = {variant.name: variant for variant in variants(options.width)}
    for variant in named.values():
        run = directory(options, variant)
        if options.table and not (run / "evaluation.json").exists():
            continue
        flags = {
            "model.vocab-size": 32,
            "data.dataset": options.games,
            "data.tokenizer": "chess",
            "data.seq-len": options.seq_len,
            "data.batch-size": options.batch_size,
            "data.seed": options.seed,
            "train.steps": round(options.steps * variant.steps),
            "train.seed": options.seed,
            "train.schedule.learning-rate": options.rate,
            # GPT-2's initial weights, as in the paper's models, whatever the tiny preset has.
            "model.init.kind": "fixed",
            "model.init.scale": 0.02,
            **variant.flags,
        }
        if variant.init_from is not None:
            flags |= {"size": "tiny", "train.init-from": directory(options, named[variant.init_from])}
        loss = figures_of(run, "moex", flags)["loss"]
        if variant.shown:
            gated = "model.ffn.gate" in variant.flags
            print_row(variant.name, loss, scores_of(run, options), correlation_of(run, options) if gated else None)
    for name in ("dense GELU", "MoE-X"):
        run = directory(options, named[name])
        if (run / "evaluation.json").exists():
            print_row(f"{name}, random weights", None, scores_of(run, options, random_weights=True), None)


def print_row(name: str, loss: float | None, scores: Mapping[str, Any], correlation: list[float] | None) -> None:
    """One line of the table."""
    board = scores["sets"]["board"]
    cells = (
        name,
        "-" if loss is None else f"{loss:.4f}",
        f"{board['coverage']['score']:.3f}",
        f"{board['reconstruction']['score']:.3f}",
        f"{scores['l0']:,.1f}",
        f"{scores['alive']:,} of {scores['features']:,}",
        "-"
        if correlation is None
        else f"{statistics.mean(correlation):.2f} ({min(correlation):.2f} .. {max(correlation):.2f})",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


def scores_of(run: Path, options: argparse.Namespace, *, random_weights: bool = False) -> dict[str, Any]:
    """What `evaluate --chess` says of a run, asked once."""
    name = f"{'random' if random_weights else 'chess'}-layer{options.layer}-count{options.count}.json"
    path = run / name
    if not path.exists():
        command = [sys.executable, "-m", "sparsezoo_jax.evaluate", str(run), "--chess", "--json"]
        command += ["--chess.layer", str(options.layer), "--chess.count", str(options.count)]
        command += ["--chess.random-weights"] if random_weights else []
        print(f"scoring {run.name}", file=sys.stderr, flush=True)
        path.write_text(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return json.loads(path.read_text())


def correlation_of(run: Path, options: argparse.Namespace) -> list[float]:
    """For each expert the correlation, over characters, of its gate score with its number of active neurons."""
    import jax.numpy as jnp

    import sparsezoo_jax
    from sparsezoo_jax.evaluation.chess import games_for

    model, config, tokenizer = sparsezoo_jax.load(run)
    assert tokenizer is not None
    games, _ = games_for(config.data, (), GATE_GAMES)
    length = min(map(len, games.texts))
    tokens = jnp.asarray([ids[:length] for ids in tokenizer.encode_batch(games.texts)])
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    model = model.unstacked()
    layer: Any = type(model.segments[options.layer - 1].blocks[0].ffn)
    score = layer.scores

    def recorded(ffn: Any, x: Any) -> Any:
        scores = score(ffn, x)
        active = jnp.sum(jnp.einsum("btd,edw->btew", x, ffn.up_EDW[...]) > 0, axis=-1)
        seen.append((np.asarray(scores), np.asarray(active)))
        return scores

    with mock.patch.object(layer, "scores", recorded):
        model(tokens, logits=False)
    scores, active = (array.reshape(-1, EXPERTS).astype(np.float64) for array in seen[options.layer - 1])
    return [float(np.corrcoef(scores[:, e], active[:, e])[0, 1]) for e in range(EXPERTS)]


if __name__ == "__main__":
    main()
