"""Scores of explanations at equal L0: `python -m benchmarks.interpretability`, after `python -m benchmarks.zoo`.

The features of sparse models' FFNs are explained and tested (detection and fuzzing, docs/interpretability.md), and
beside each those of a `topk` autoencoder on the dense model's residual stream, in the same layer, with as many features
of a token. Figures are kept in `benchmarks/results/interpretability.json` and not measured again;
`benchmarks.leaderboard` shows them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks import records, zoo
from sparsezoo_jax import cli, evaluate, platforms, sae
from sparsezoo_jax.autoencoders import SAETrainConfig, TopKSAE
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation.interpretability import InterpretEvaluation, JudgeName
from sparsezoo_jax.untrusted import read_json

ARCHS = ("moex", "spark", "blockffn")
RECORD = Path("benchmarks/results/interpretability.json")


class Names(NamedTuple):
    """Names of the figures of one architecture in the record."""

    own: str
    autoencoder: str
    """Of the dense model's autoencoder with its L0."""


def names(arch: str, steps: int, judge: str) -> Names:
    """Names in the record."""
    return Names(f"{arch}-steps{steps}-{judge}", f"dense-topk-at-{arch}-steps{steps}-{judge}")


def run_of(arch: str, options: argparse.Namespace) -> Path:
    """The directory of an architecture's best run of the comparison; it is trained again where it is gone.

    Raises:
      UserError: the comparison has none.
    """
    found = zoo.best_runs(read_json(options.zoo) if options.zoo.exists() else {}, options.steps).get(arch)
    if found is None:
        raise UserError(f"{options.zoo}: no run of {arch}; {zoo.command(arch, options.steps)} makes it")
    zoo.made(options.runs / found.first)
    return options.runs / found.first


def explained(directory: Path, options: argparse.Namespace, autoencoder: Path | None = None) -> dict[str, Any]:
    """The figures of a run's features, or of an autoencoder's."""
    asked = InterpretEvaluation(
        judge=options.judge,
        features=options.features,
        sae=None if autoencoder is None else str(autoencoder),
        base_url=options.base_url,
        model=options.model,
    )
    found = evaluate.interpret(evaluate.Evaluate(directory=directory, explain=True, interpret=asked))
    kept = ("accuracy", "judge", "judge_kind", "layer", "l0", "dead", "zipf", "tokens", "failed")
    return {**{name: found[name] for name in kept}, "features": len(found["features"])}


def autoencoder_at(l0: float, dense: Path, arch: str, options: argparse.Namespace) -> Path:
    """A `topk` autoencoder of the dense run with `l0` features of a token, trained unless it is there."""
    place = options.runs / f"topk-at-{arch}-steps{options.steps}"
    if not (place / "evaluation.json").exists():
        config = TopKSAE(features=options.dictionary, k=max(1, min(round(l0), options.dictionary)))
        train = SAETrainConfig(steps=options.sae_steps, learning_rate=2e-3)
        sae.train(sae.TrainSAE(directory=dense, kind="topk", sae=config, train=train, workdir=place))
    return place


def main(args: list[str] | None = None) -> None:
    """Measure what is not in the record, and print all of it."""
    platforms.keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--zoo", type=Path, default=zoo.RECORD, help="record of benchmarks.zoo")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--steps", type=int, default=zoo.STEPS, help="of the runs")
    parser.add_argument("--judge", default="tokens", choices=get_args(JudgeName))
    parser.add_argument("--base-url", help="of the endpoint that judges")
    parser.add_argument("--model", help="that the endpoint is asked for")
    parser.add_argument("--features", type=int, default=50, help="features to explain")
    parser.add_argument("--dictionary", type=int, default=512, help="features of an autoencoder")
    parser.add_argument("--sae-steps", type=int, default=1000)
    options = parser.parse_args(args)
    dense = run_of(zoo.BASELINE, options)
    print("| features | L0 | detection | fuzzing |\n|---|---|---|---|")
    for arch in options.archs:
        own, autoencoder = names(arch, options.steps, options.judge)
        run = run_of(arch, options)
        figures = records.recorded(options.record, own, lambda run=run: explained(run, options))
        place = autoencoder_at(figures["l0"], dense, arch, options)
        beside = records.recorded(options.record, autoencoder, lambda place=place: explained(dense, options, place))
        for label, found in ((arch, figures), (f"dense, topk at {arch}'s L0", beside)):
            scores = " | ".join(scored(found["accuracy"].get(task)) for task in ("detection", "fuzzing"))
            print(f"| {label} | {found['l0']:.1f} | {scores} |", flush=True)


def scored(value: dict[str, Any] | None) -> str:
    """A score with its interval; an en dash for none."""
    if value is None or value["mean"] is None:
        return "–"
    return f"{value['mean']:.3f}" + ("" if value["low"] is None else f" ({value['low']:.3f} .. {value['high']:.3f})")


if __name__ == "__main__":
    cli.run(lambda args: main(list(args)))
