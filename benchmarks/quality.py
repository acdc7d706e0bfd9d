"""Loss of spark tiny against its dense twin at equal parameters and tokens: `python -m benchmarks.quality`.

The learning rate is searched for each architecture on its own (first seed), then each trains with its best one on
further seeds, which change the initialisation and the order of the data. Finished runs are kept in `--runs` and not
repeated, so that an interrupted search goes on where it was; an unfinished run resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.training_runs import figures_of

ARCHITECTURES = ("dense", "spark")


def loss_of(runs: Path, arch: str, rate: float, seed: int, steps: int) -> float:
    """Validation loss in nats per token of one run, trained now if it is not there."""
    flags = {
        "train.steps": steps,
        "train.schedule.learning-rate": rate,
        "train.seed": seed,
        "data.seed": seed,
    }
    return figures_of(runs / f"{arch}-lr{rate:g}-seed{seed}-steps{steps}", arch, flags)["loss"]


def main() -> None:
    """Search, train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    best: dict[str, float] = {}
    print("Learning rate, validation loss (nats/token), first seed\n")
    print("| architecture | " + " | ".join(f"{rate:g}" for rate in options.rates) + " |")
    print("|---" * (len(options.rates) + 1) + "|")
    for arch in ARCHITECTURES:
        losses = {rate: loss_of(options.runs, arch, rate, options.seeds[0], options.steps) for rate in options.rates}
        best[arch] = min(losses, key=losses.__getitem__)
        print(f"| {arch} | " + " | ".join(f"{loss:.4f}" for loss in losses.values()) + " |", flush=True)

    print("\nBest learning rate, all seeds\n")
    print("| architecture | learning rate | " + " | ".join(f"seed {s}" for s in options.seeds) + " | mean | spread |")
    print("|---" * (len(options.seeds) + 4) + "|")
    means: dict[str, float] = {}
    for arch in ARCHITECTURES:
        losses = [loss_of(options.runs, arch, best[arch], seed, options.steps) for seed in options.seeds]
        means[arch] = statistics.mean(losses)
        cells = " | ".join(f"{loss:.4f}" for loss in losses)
        print(
            f"| {arch} | {best[arch]:g} | {cells} | {means[arch]:.4f} | {max(losses) - min(losses):.4f} |", flush=True
        )
    print(f"\nspark / dense: {means['spark'] / means['dense'] - 1:+.2%}")


if __name__ == "__main__":
    main()
