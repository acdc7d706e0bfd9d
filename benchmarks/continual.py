"""Learning classes task by task: `python -m benchmarks.continual`.

SHARP (arXiv 2305.18563), its parts left out one at a time, and plain replay and fine-tuning, on digits and on generated
images of shapes and of textures, a few classes a task in an order that the seed draws. Prints average accuracy and
average forgetting, mean and standard deviation over seeds, the densities of the layers and the bytes that are kept.
Results are kept in `--results` and not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparsezoo_jax.continual import FINE_TUNING, REPLAY, ContinualConfig, class_tasks, learn
from sparsezoo_jax.data.images import open_images

SHARP = ContinualConfig()
METHODS: dict[str, ContinualConfig] = {
    "SHARP": SHARP,
    "SHARP, all tasks replayed": dataclasses.replace(SHARP, replayed_tasks=None),
    "SHARP without freezing": dataclasses.replace(SHARP, freezing=False),
    "SHARP without ages": dataclasses.replace(SHARP, freezing=False, rewiring=False),
    "SHARP without ages, dense": dataclasses.replace(SHARP, freezing=False, rewiring=False, density=1.0),
    "plain replay": REPLAY,
    "plain fine-tuning": FINE_TUNING,
}
#: Sets, pixels of a side, images of training and of test (None: all), classes of a task.
SETS: dict[str, tuple[str, int | None, int | None, int | None, int]] = {
    "digits": ("digits", None, None, None, 2),
    "shapes": ("shapes", 16, 1600, 400, 2),
    "textures": ("textures", 16, 1600, 400, 2),
}


def run(options: argparse.Namespace, name: str, method: str, seed: int) -> dict[str, Any]:
    """Figures of a method on a set, read or made now."""
    path = options.results / f"{name}-{method.replace(' ', '-').replace(',', '')}-seed{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    opened, size, count, test_count, per_task = SETS[name]
    train = open_images(opened, "train", size=size, count=count)
    test = open_images(opened, "validation", size=size, count=test_count)
    classes = len(train.classes)
    order = [int(c) for c in np.random.default_rng(seed).permutation(classes)][: classes // per_task * per_task]
    tasks = class_tasks((train.images, train.labels), (test.images, test.labels), per_task, order)
    started = time.perf_counter()
    found = learn(METHODS[method], tasks, classes, seed)
    figures = {
        "accuracy": found.average_accuracy,
        "forgetting": found.average_forgetting,
        "matrix": [row[: i + 1].tolist() for i, row in enumerate(found.accuracy)],
        "densities": found.densities,
        "kept_bytes": found.kept_bytes,
        "seconds": time.perf_counter() - started,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures))
    print(f"{name}, {method}, seed {seed}: {figures['seconds']:.0f} s", file=sys.stderr, flush=True)
    return figures


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} ({100 * deviation:.1f})"


def main() -> None:
    """Make what results are missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/continual"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for name in options.sets:
        print(f"\n{name}, {len(options.seeds)} seeds\n")
        print(
            "| method | average accuracy | average forgetting | density of layers | bytes kept |\n" + "|---" * 5 + "|"
        )
        for method in options.methods:
            found = [run(options, name, method, seed) for seed in options.seeds]
            last = {f"{density:.2f}" for figures in found for after in figures["densities"] for density in after}
            row = [method, spread([f["accuracy"] for f in found]), spread([f["forgetting"] for f in found])]
            row += [", ".join(sorted(last)), f"{found[0]['kept_bytes']:,}"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
