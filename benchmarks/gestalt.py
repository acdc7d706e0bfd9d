"""Gestalt and DiSRT at tiny scale: `python -m benchmarks.gestalt`.

Trains small transformers on generated shapes and on digits: a masked autoencoder, a classifier that starts from its
encoder, and one that starts from random parameters; each without a top-k of maps, with it in training and with it in
the test alone. A classifier with top-k in training starts from the autoencoder without. Seeds draw parameters and the
order of the images, which are the same for all.

Prints, beside those of a model that made no step, how often classes are right, how often the odd one of three images is
found of which one differs in how its parts lie to each other, and of shapes also how closure and convexity show:
`sparsezoo_jax.evaluation.gestalt`.

Finished runs and figures are kept in `--runs` and not made again; a run that was cut off resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from sparsezoo_jax import run_dir
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data.images import open_images
from sparsezoo_jax.data.images.batches import images_once
from sparsezoo_jax.data.images.gestalt import closure, convexity, disrt, figures
from sparsezoo_jax.evaluation import calibrate
from sparsezoo_jax.evaluation.gestalt import PIXELS, Areas, Displays, Score, gestalt_credits, score
from sparsezoo_jax.models import build_model
from sparsezoo_jax.models.encoder import read_as
from sparsezoo_jax.models.images import MAEConfig
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.train import train
from sparsezoo_jax.training_inputs import evaluation_images

Training = Literal["untrained", "mae", "tuned", "scratch"]
TopK = Literal["none", "in training", "in the test alone"]
#: Image sets, and the size of the presets for each.
SETS = {"shapes": "tiny", "digits": "digits"}
LABELS = {"untrained": "no step made", "mae": "MAE", "tuned": "MAE, then classes", "scratch": "classes"}
TESTS = {
    "intact": "odd one broken",
    "broken": "odd one intact",
    "closure": "closure",
    "convexity": "convexity",
    "figure": "figure",
}
PAIRS: tuple[Literal["intact", "broken"], ...] = ("intact", "broken")
Credits = dict[str, dict[str, list[float]]]


class Model(NamedTuple):
    """A row of the tables."""

    training: Training
    top_k: TopK

    @property
    def label(self) -> str:
        """What tables call it."""
        top_k = "" if self.top_k == "none" else f", top-k {self.top_k}"
        return f"{LABELS[self.training]}{top_k}"


MODELS = (
    Model("untrained", "none"),
    *(Model(t, k) for t in ("mae", "tuned", "scratch") for k in ("none", "in training", "in the test alone")),
)


def configured(options: argparse.Namespace, training: Training, seed: int, *, top_k: bool) -> RunConfig:
    """A run on a set: masked autoencoding, or classification, from such a run or from random parameters."""
    reconstructs = training == "mae"
    changes: dict[str, Any] = {
        "model.d_model": 64,
        "model.layers": 3,
        "model.attention.head_dim": 16,
        "model.ffn.d_ff": 256,
        "model.images.positions": "sine",
        "model.images.map_top_k": options.map_top_k if top_k else None,
        "model.images.map_top_k_of": options.map_top_k_of,
        "data.batch_size": 32,
        "data.seed": seed,
        "train.seed": seed,
        "train.steps": options.mae_steps if reconstructs else options.steps,
        "train.schedule.learning_rate": options.tuned_rate if training == "tuned" else options.rate,
        "train.eval_every": 0,
        "train.checkpoint_every": 0,
        "train.keep_best": False,
        "train.writers": (),
        "eval.report": False,
        "eval.meter_batches": 0,
    }
    if training == "tuned":
        changes["train.init_from"] = str(run_of(options, "mae", seed, top_k=False).absolute())
    return with_values(preset("vit_mae" if reconstructs else "vit", SETS[options.set]), changes)


def run_of(options: argparse.Namespace, training: Training, seed: int, *, top_k: bool) -> Path:
    """The directory of a run, which is named by what shapes it."""
    steps = options.mae_steps if training == "mae" else options.steps
    parts = [options.set, training, f"steps{steps}", f"seed{seed}"]
    if training == "tuned":
        parts.insert(3, f"mae{options.mae_steps}")
    if top_k:
        parts.append(f"topk{options.map_top_k:g}-{options.map_top_k_of}")
    return options.runs / "-".join(parts)


def trained(options: argparse.Namespace, training: Training, seed: int, *, top_k: bool) -> Path:
    """The directory of a run, made now as far as it has not been."""
    if training == "tuned":
        trained(options, "mae", seed, top_k=False)
    workdir = run_of(options, training, seed, top_k=top_k)
    if not (workdir / "evaluation.json").exists() and not train(
        configured(options, training, seed, top_k=top_k), workdir
    ):
        raise SystemExit(1)  # it was stopped, and has said so
    return workdir


def displays_of(options: argparse.Namespace) -> Displays:
    """What all models of a set are tested with.

    Blocks are the models' patches. Shapes, moved by at most two blocks, stay whole; digits go on at the other border.
    """
    count = options.displays
    if options.set == "digits":
        images = open_images("digits", "validation", count=count).images
        return Displays({pair: disrt(images, 2, pair=pair) for pair in PAIRS})
    images = figures(count, margin=8).images
    return Displays(
        {pair: disrt(images, 4, pair=pair, reach=2) for pair in PAIRS},
        closure(count),
        Areas(figures(count, seed=1), figures(count, seed=2), convexity(count)),
    )


def measured(options: argparse.Namespace, model: Model, seed: int, displays: Displays) -> tuple[float | None, Credits]:
    """Accuracy on validation images (None without classes), and credits: read, or made now."""
    steps = f"mae{options.mae_steps}-steps{options.steps}-displays{options.displays}"
    top_k = f"topk{options.map_top_k:g}-{options.map_top_k_of}"
    name = f"{model.label.replace(', ', '-').replace(' ', '-')}-{top_k}-{steps}-seed{seed}.json"
    path = options.runs / "results" / f"{options.set}-{name}"
    if path.exists():
        found = json.loads(path.read_text())
        return found["accuracy"], found["credits"]
    if model.training == "untrained":
        config = configured(options, "scratch", seed, top_k=False)
        net: Any = build_model(config.model, nnx.Rngs(seed))
    else:
        net, config, _ = run_dir.load(trained(options, model.training, seed, top_k=model.top_k == "in training"))
    images = dataclasses.replace(net.config.images, mae=MAEConfig())
    if model.top_k == "in the test alone":
        images = dataclasses.replace(images, map_top_k=options.map_top_k, map_top_k_of=options.map_top_k_of)
    net = read_as(net, images)
    accuracy = None
    if model.training in ("tuned", "scratch"):
        shown = images_once(evaluation_images(config, "validation"), config.data.batch_size)
        accuracy = calibrate(net, shown).accuracy
    each = gestalt_credits(net, displays)
    found = {test: {name: x.tolist() for name, x in layers.items()} for test, layers in each.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"accuracy": accuracy, "credits": found}).encode())
    return accuracy, found


def shown(found: Score) -> str:
    """A score with its interval, in percent."""
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/gestalt"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400, help="of classification, from either start")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tuned-rate", type=float, default=1e-3)
    parser.add_argument("--map-top-k", type=float, default=0.2)
    parser.add_argument("--map-top-k-of", choices=["ffn_output", "residual"], default="ffn_output")
    parser.add_argument("--displays", type=int, default=200, help="of each test, an even number")
    options = parser.parse_args()
    for name in options.sets:
        options.set = name
        for seed in options.seeds:
            for training in ("mae", "tuned", "scratch"):
                for top_k in (False, True):
                    trained(options, training, seed, top_k=top_k)
        displays = displays_of(options)
        found = {model: [measured(options, model, seed, displays) for seed in options.seeds] for model in MODELS}
        tables(name, found)


def tables(name: str, found: dict[Model, list[tuple[float | None, Credits]]]) -> None:
    """Print what was measured of the models of a set, by seed."""
    first = next(iter(found.values()))[0][1]
    layers = [name for name in first["intact"] if name != PIXELS]
    last, tests = layers[-1], [test for test in TESTS if test in first]

    def credits_of(model: Model, test: str, layer: str) -> np.ndarray:
        return np.asarray([credits[test][layer] for _, credits in found[model]])

    seeds = len(next(iter(found.values())))
    print(f"\n{name}, percent with 95 % intervals over displays, mean over {seeds} seeds, {last}\n")
    print(f"| model | accuracy | {' | '.join(TESTS[test] for test in tests)} |\n" + "|---" * (2 + len(tests)) + "|")
    chances = ["33.3" if test in PAIRS else "50" for test in tests]
    print(f"| chance | {'10' if name == 'digits' else '16.7'} | {' | '.join(chances)} |")
    for label, layer, models in (("pixels", PIXELS, MODELS[:1]), *((m.label, last, (m,)) for m in MODELS)):
        (model,) = models
        accuracies = [accuracy for accuracy, _ in found[model] if accuracy is not None and layer != PIXELS]
        cells = [f"{100 * statistics.fmean(accuracies):.1f}" if accuracies else ""]
        cells += [shown(score(credits_of(model, test, layer))) for test in tests]
        print(f"| {label} | {' | '.join(cells)} |")

    columns = [f"{TESTS[test]}, {layer}" for test in PAIRS for layer in layers]
    print(f"\nBy layer, percent\n\n| model | {' | '.join(columns)} |")
    print("|---" * (1 + 2 * len(layers)) + "|")
    for model in MODELS:
        cells = [f"{100 * credits_of(model, test, x).mean():.1f}" for test in PAIRS for x in layers]
        print(f"| {model.label} | {' | '.join(cells)} |")

    mae, tuned, scratch = (Model(training, "none") for training in ("mae", "tuned", "scratch"))
    claims = [
        ("MAE above classes", mae, scratch),
        ("MAE above MAE, then classes", mae, tuned),
        *(
            (f"{Model(t, k).label} above without", Model(t, k), Model(t, "none"))
            for t in ("tuned", "scratch")
            for k in ("in training", "in the test alone")
        ),
    ]
    named = [f"{TESTS[test]} | seeds" for test in PAIRS]
    print(f"\nDifferences in points, {last}\n\n| claim | {' | '.join(named)} |\n" + "|---" * 5 + "|")
    for claim, one, other in claims:
        cells = []
        for test in PAIRS:
            difference = credits_of(one, test, last) - credits_of(other, test, last)
            held = int((difference.mean(1) > 0).sum())
            cells += [shown(score(difference)), f"{held} of {len(difference)}"]
        print(f"| {claim} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
