"""Loss of spark tiny against its dense twin at equal parameters and tokens: `python -m benchmarks.quality`.

The learning rate is searched for each architecture on its own (first seed), then each trains with its best one on
further seeds, which change the initialisation and the order of the data. Finished runs are kept in `--runs` and not
repeated, so that an interrupted search goes on where it was; an unfinished run resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.training_runs import figures_of

ARCHITECTURES = {"dense": ("dense", "tiny"), "spark": ("spark", "tiny")}


def loss_of(runs: Path, name: str, preset: tuple[str, str], rate: float, seed: int, steps: int) -> float:
    """Validation loss in nats per token of one run, trained now if it is not there."""
    arch, size = preset
    flags = {
        "size": size,
        "train.steps": steps,
        "train.schedule.learning-rate": rate,
        "train.seed": seed,
        "data.seed": seed,
    }
    return figures_of(runs / f"{name}-lr{rate:g}-seed{seed}-steps{steps}", arch, flags)["loss"]


def main() -> None:
    """Search, train and print the table."""
    compare(ARCHITECTURES, Path("runs/quality"), __doc__ or "")


def compare(models: Mapping[str, tuple[str, str]], runs: Path, description: str) -> None:
    """Parse flags, search, train and print the tables for presets by name; others are held against the first."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    best: dict[str, float] = {}
    print("Learning rate, validation loss (nats/token), first seed\n")
    print("| architecture | " + " | ".join(f"{rate:g}" for rate in options.rates) + " |")
    print("|---" * (len(options.rates) + 1) + "|")
    for arch, preset in models.items():
        losses = {
            rate: loss_of(options.runs, arch, preset, rate, options.seeds[0], options.steps) for rate in options.rates
        }
        best[arch] = min(losses, key=losses.__getitem__)
        print(f"| {arch} | " + " | ".join(f"{loss:.4f}" for loss in losses.values()) + " |", flush=True)

    print("\nBest learning rate, all seeds\n")
    print("| architecture | learning rate | " + " | ".join(f"seed {s}" for s in options.seeds) + " | mean | spread |")
    print("|---" * (len(options.seeds) + 4) + "|")
    means: dict[str, float] = {}
    for arch, preset in models.items():
        losses = [loss_of(options.runs, arch, preset, best[arch], seed, options.steps) for seed in options.seeds]
        means[arch] = statistics.mean(losses)
        cells = " | ".join(f"{loss:.4f}" for loss in losses)
        print(
            f"| {arch} | {best[arch]:g} | {cells} | {means[arch]:.4f} | {max(losses) - min(losses):.4f} |", flush=True
        )
    base, *others = models
    print()
    for name in others:
        print(f"{name} / {base}: {means[name] / means[base] - 1:+.2%}")


if __name__ == "__main__":
    main()
