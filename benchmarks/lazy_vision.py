"""Lazy Neuron's vision half at tiny scale: `python -m benchmarks.lazy_vision`.

Trains small vision transformers and a mixer with ReLU on scikit-learn's digits, and prints tables beside what the
paper's abstract claims (arXiv 2210.06313):

1. Emergence: the share of hidden units that are not 0, over training, by layer and on images kept out of training: of a
   ViT, of one whose labels are random, and of an MLP-Mixer.
2. Robustness: a ViT with all units and with a patch's k largest, trained on its own labels and on labels of which a
   share is replaced; accuracy and calibration on images kept out of training, as they are and with noise on them.

Finished runs are kept in `--runs` and not repeated; one that was cut off resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsezoo_jax import run_dir
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data import Batch
from sparsezoo_jax.data.images.batches import images_once
from sparsezoo_jax.evaluation import calibrate, read_history
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.mixer import MixerConfig
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.train import train
from sparsezoo_jax.training_inputs import evaluation_images

#: Shares of the training at which the table of emergence looks, after the first step.
LOOKS = (0.1, 0.25, 0.5, 1.0)


def configured(options: argparse.Namespace, seed: int, *, top_k: int | None = None, **changes: Any) -> RunConfig:
    """A ViT of digits as the flags shape it."""
    ffn = PlainFFNConfig(d_ff=4 * options.width, activation="relu", bias=True, top_k=top_k)
    config = preset("vit", "digits")
    return with_values(
        config,
        {
            "model.d_model": options.width,
            "model.layers": options.layers,
            "model.ffn": ffn,
            "data.batch_size": options.batch_size,
            "data.seed": seed,
            "data.images.seed": seed,
            "train.seed": seed,
            "train.steps": options.steps,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.checkpoint_every": 0,
            "train.keep_best": False,
            "train.writers": (),
            "eval.report": False,
            **changes,
        },
    )


def trained(options: argparse.Namespace, name: str, config: RunConfig) -> tuple[Path, dict[str, Any]]:
    """The directory of a run and its final figures, made now as far as it has not been."""
    workdir = options.runs / f"{name}-seed{config.train.seed}-steps{config.train.steps}"
    found = workdir / "evaluation.json"
    if not found.exists() and not train(config, workdir):
        raise SystemExit(1)  # it was stopped, and has said so
    return workdir, json.loads(found.read_text())


def emergence(options: argparse.Namespace) -> None:
    """Train on digits, on random labels and with mixing, and print how many units are not 0."""
    seed = options.seeds[0]
    config = configured(options, seed)
    mixing = MixerConfig(tokens=16, d_tokens=options.width, activation="relu")
    kinds = {
        "clean": ("ViT", config),
        "random": (
            f"ViT, random labels, {options.heart_images} images",
            with_values(config, {"data.images.label_noise": 1.0, "data.images.train_count": options.heart_images}),
        ),
        "mixer": (
            "MLP-Mixer",
            dataclasses.replace(config, model=dataclasses.replace(config.model, attention=mixing)),
        ),
    }
    steps = [1, *(max(1, round(share * options.steps)) for share in LOOKS)]
    print("Units that are not 0, mean over layers, of training batches by step, and of images kept out of training\n")
    print(f"| | {' | '.join(f'step {step}' for step in steps)} | by layer, at the end | others | loss at the end |")
    print("|---" * (4 + len(steps)) + "|")
    ends = {}
    for name, (label, config) in kinds.items():
        workdir, figures = trained(options, name, config)
        course = read_history(workdir).train
        layers = {step: row for step, row in zip(course.steps, course.layers["ffn_density"], strict=True) if row}
        shown = [statistics.fmean(x for x in layers[step] if x is not None) for step in steps]
        last = [layers[step] for step in course.steps[-10:]]
        by_layer = [statistics.fmean(x for x in column if x is not None) for column in zip(*last, strict=True)]
        others = statistics.fmean(figures["ffn_density"])
        loss = statistics.fmean(x for x in course.loss[-10:] if x is not None)
        ends[label] = (shown[0], shown[-1], min(by_layer), max(by_layer), others)
        cells = [*(f"{x:.1%}" for x in shown), ", ".join(f"{x:.1%}" for x in by_layer), f"{others:.1%}", f"{loss:.3f}"]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    print("\nBy layer and loss: mean over the last 10 steps.\n\n| the abstract | here |\n|---|---|")
    first, last, low, high, others = ends["ViT"]
    print(f"| few units are not 0 (6.3 % in ViT-B/16) | {last:.1%}, from {first:.1%} at first |")
    print(f"| in layers at all depths | {low:.1%} to {high:.1%} |")
    print(f"| on training and evaluation data | {last:.1%} and {others:.1%} |")
    for label, (first, last, *_) in list(ends.items())[1:]:
        print(f"| also: {label} | {last:.1%}, from {first:.1%} |")
    print(flush=True)


def corrupted(batch: Batch, deviation: float, draw: np.random.Generator) -> Batch:
    """Images with normal noise on their pixels, of this standard deviation in shares of the range of a pixel."""
    noisy = batch["tokens"] + 255 * deviation * draw.standard_normal(batch["tokens"].shape)
    return Batch(**{**batch, "tokens": np.clip(np.rint(noisy), 0, 255).astype(np.uint8)})


def measured(workdir: Path, deviations: list[float]) -> dict[str, dict[str, float]]:
    """Loss, accuracy and calibration error of a run on validation images, by the deviation of noise on them."""
    model, config, _ = run_dir.load(workdir)
    images = evaluation_images(config, "validation")
    figures = {}
    for deviation in (0.0, *deviations):
        draw = np.random.default_rng(7)
        shown = [corrupted(batch, deviation, draw) for batch in images_once(images, config.data.batch_size)]
        scores = calibrate(model, shown)
        figures[f"{deviation:g}"] = {"loss": scores.loss, "accuracy": scores.accuracy, "ece": scores.ece}
    return figures


def robustness(options: argparse.Namespace) -> None:
    """Train with and without top-k on clean and on noisy labels, and print what validation images show."""
    units: list[int | None] = [None, *options.top_k]
    runs: dict[tuple[int | None, float], list[tuple[float, dict[str, dict[str, float]]]]] = {}
    for noise in (0.0, options.label_noise):
        for top_k in units:
            for seed in options.seeds:
                base = "clean" if noise == 0 else f"noise{noise:g}"
                name = base if top_k is None else f"{base}-k{top_k}"
                config = configured(options, seed, top_k=top_k, **{"data.images.label_noise": noise})
                workdir, figures = trained(options, name, config)
                density = statistics.fmean(figures["ffn_density"])
                runs.setdefault((top_k, noise), []).append((density, measured(workdir, options.corruption)))
    seeds = ", ".join(map(str, options.seeds))
    print(f"Validation images, mean over seeds {seeds} (spread)\n")
    noisy = " | ".join(f"accuracy, noise {deviation:g}" for deviation in options.corruption)
    print(f"| units of a patch | labels replaced | not 0 | loss | accuracy | ECE | {noisy} |")
    print("|---" * (6 + len(options.corruption)) + "|")

    def cell(found: list[float], form: str) -> str:
        return f"{statistics.fmean(found):{form}} ({max(found) - min(found):{form}})"

    for (top_k, noise), rows in runs.items():
        active = statistics.fmean(density for density, _ in rows)
        cells = [
            cell([figures["0"][name] for _, figures in rows], form)
            for name, form in (("loss", ".3f"), ("accuracy", ".2%"), ("ece", ".4f"))
        ]
        cells += [cell([figures[f"{x:g}"]["accuracy"] for _, figures in rows], ".2%") for x in options.corruption]
        print(f"| {_units(top_k)} | {noise:.0%} | {active:.1%} | {' | '.join(cells)} |")

    def lost(noise: float, deviation: str, name: str, sign: int) -> Callable[[int | None, int], float]:
        def difference(top_k: int | None, i: int) -> float:
            clean, worse = runs[top_k, 0.0][i][1]["0"], runs[top_k, noise][i][1][deviation]
            return sign * (worse[name] - clean[name])

        return difference

    claims: list[tuple[str, str, Callable[[int | None, int], float]]] = [
        ("accuracy lost to noisy labels is less", ".2%", lost(options.label_noise, "0", "accuracy", -1)),
        ("loss added by noisy labels is less", ".3f", lost(options.label_noise, "0", "loss", 1)),
    ]
    for deviation in options.corruption:
        claims.append(
            (f"accuracy lost to noise {deviation:g} is less", ".2%", lost(0, f"{deviation:g}", "accuracy", -1))
        )
    claims += [
        ("ECE is less", ".4f", lambda k, i: runs[k, 0.0][i][1]["0"]["ece"]),
        ("ECE is less with noisy labels", ".4f", lambda k, i: runs[k, options.label_noise][i][1]["0"]["ece"]),
    ]
    print("\n| the abstract, of a small k | " + " | ".join(map(_units, units)) + " | seeds |")
    print("|---" * (len(units) + 2) + "|")
    for claim, form, of in claims:
        values = {k: [of(k, i) for i in range(len(options.seeds))] for k in units}
        cells = " | ".join(format(statistics.fmean(values[k]), form) for k in units)
        held = (sum(a < b for a, b in zip(values[k], values[None], strict=True)) for k in units[1:])
        print(f"| {claim} | {cells} | {', '.join(f'{count} of {len(options.seeds)}' for count in held)} |")


def _units(top_k: int | None) -> str:
    return "all" if top_k is None else f"{top_k} largest"


PARTS = {"emergence": emergence, "robustness": robustness}


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/lazy-vision"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="emergence takes the first")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heart-images", type=int, default=256, help="images whose random labels are learnt by heart")
    parser.add_argument("--top-k", type=int, nargs="+", default=[16])
    parser.add_argument("--label-noise", type=float, default=0.4)
    parser.add_argument("--corruption", type=float, nargs="+", default=[0.15, 0.3])
    options = parser.parse_args()
    if not all(0 < share <= 1 for share in (options.label_noise, *options.corruption)):
        parser.error("--label-noise and --corruption must be above 0 and at most 1")
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
