"""Sparsing Law at tiny scale: `python -m benchmarks.sparsing_law`.

Trains gated decoders of prosparse tiny's shape, without an L1 loss or a threshold, on the embedded corpus, and measures
the activation ratio of their checkpoints at CETT-PPL-1% (docs/sparsing-law.md):

1. ReLU against SiLU over tokens: the ratio of every checkpoint, and the fit of the law to those after the warm-up.
2. Width against depth with a ReLU, at equal parameters without embeddings: the last checkpoint's ratio and loss.

Finished runs are kept in `--runs` and not repeated. The learning rate is constant after its warm-up, so that a
checkpoint is that of a run of its own length.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.training_runs import figures_of
from sparsezoo_jax import data, run_dir
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation.cett import Course, course
from sparsezoo_jax.evaluation.laws import LawName, fit
from sparsezoo_jax.models import Decoder, count_parameters
from sparsezoo_jax.training.parameters import saved_steps

INCREASE = 0.01
SHAPES = {2: 176, 4: 128, 8: 88, 12: 72}
"""Width by number of layers."""
PARAMETERS = 1_049_728
"""Of prosparse tiny, without embeddings."""
HEADS = 4
WARMUP = 0.1


def flags(activation: str, layers: int, width: int, steps: int, checkpoints: int) -> dict[str, Any]:
    """The flags of one run over prosparse tiny; the hidden width makes parameters equal."""
    head = width // HEADS // 2 * 2
    rest = layers * (4 * width * HEADS * head + 2 * width) + width
    return {
        "model.ffn.activation": activation,
        "model.ffn.no-l1": True,
        "model.ffn.threshold": 0,
        "train.objectives": "[]",
        "model.layers": layers,
        "model.d-model": width,
        "model.attention.head-dim": head,
        "model.ffn.d-ff": round((PARAMETERS - rest) / (3 * width * layers)),
        "train.steps": steps,
        "train.checkpoint-every": max(1, steps // checkpoints),
        "train.keep-last": checkpoints,
        "train.schedule.kind": "wsd",
        "train.schedule.learning-rate": 4e-3,
        "train.schedule.warmup-steps": WARMUP,
        "train.schedule.decay-steps": 0,
        "eval.no-report": True,
    }


def measured(directory: Path, batches: int) -> tuple[Course, float, int]:
    """The course of a run's activation ratio, tokens of a step, and parameters without embeddings."""
    _, config, tokenizer = run_dir.load(directory)
    assert tokenizer is not None
    prepared = data.prepare(config.data, "validation", tokenizer)

    def shown() -> Any:
        return data.evaluation_batches(prepared, config.data.batch_size, batches)

    def model(step: int) -> Decoder:
        return run_dir.load(directory, step=step).model

    steps = saved_steps(directory / run_dir.CHECKPOINTS)
    found = course({step: partial(model, step) for step in steps}, shown, INCREASE)
    return found, config.data.batch_size * config.data.seq_len, count_parameters(config.model).non_embedding


def trained(options: argparse.Namespace, name: str, given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The directory and the final figures of a run."""
    workdir = options.runs / f"{name}-steps{options.steps}"
    return workdir, figures_of(workdir, "prosparse", {**given, "train.seed": options.seed})


def over_tokens(options: argparse.Namespace) -> None:
    """Print the ratio of each checkpoint of a ReLU and of a SiLU model, and the laws fitted to them."""
    print("| gate | million tokens | activation ratio | increase of the perplexity |\n|---|---|---|---|")
    notes = []
    laws: dict[str, LawName] = {"relu": "relu", "silu": "silu"}
    for activation, law in laws.items():
        directory, _ = trained(options, activation, flags(activation, 4, 128, options.steps, options.checkpoints))
        found, per_step, _ = measured(directory, options.batches)
        for step, point in zip(found.steps, found.points, strict=True):
            print(f"| {activation} | {step * per_step / 1e6:.2f} | {point.mean:.2%} | {point.increase:+.2%} |")
        kept = [(s * per_step / 1e9, p.mean) for s, p in zip(found.steps, found.points, strict=True)]
        kept = [(tokens, ratio) for tokens, ratio in kept if tokens * 1e9 > WARMUP * options.steps * per_step]
        try:
            fitted = fit(law, *zip(*kept, strict=True))
            low, high = fitted.intervals["limit"]
            notes.append(
                f"{activation}: CETT {found.cett:.3f}, limit {fitted.law.limit:.2%} ({low:.2%} to {high:.2%}), "
                f"residuals {fitted.residual_std:.2%}, {fitted.points} points"
            )
        except ConfigError as error:
            notes.append(f"{activation}: CETT {found.cett:.3f}, no fit ({error})")
    print("\n".join(["", *notes, ""]))


def width_and_depth(options: argparse.Namespace) -> None:
    """Print ratio and loss of ReLU models of several shapes."""
    print("| layers | width | width / depth | parameters | activation ratio | loss |\n|---|---|---|---|---|---|")
    for layers, width in SHAPES.items():
        directory, figures = trained(options, f"relu-{layers}x{width}", flags("relu", layers, width, options.steps, 1))
        found, _, parameters = measured(directory, options.batches)
        ratio, loss = found.points[-1].mean, figures["loss"]
        print(f"| {layers} | {width} | {width / layers:.0f} | {parameters:,} | {ratio:.2%} | {loss:.4f} |", flush=True)


PARTS = {"tokens": over_tokens, "shapes": width_and_depth}


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/sparsing-law"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--batches", type=int, default=4, help="batches of validation that are calibrated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
