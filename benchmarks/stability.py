"""How stable training is, architecture by architecture: `python -m benchmarks.stability`.

Every architecture's tiny preset trains at five learning rates, from a quarter of its preset's to four times it, on the
same batches of `--dataset`, and logs each step:

1. Sensitivity: the validation loss at each rate, less that at the best of them.
2. Spikes: the share of steps whose training loss is far above the steps before, as the spike score of OLMo 2 (arXiv
   2501.00656, section 3), with `--window` steps for their thousand and `--deviations` standard deviations for their
   seven, because runs are short. Windows with the warm-up in them are left out, for losses fall too fast there. Beside
   it the largest norm of a gradient over the median one.
3. Death: neurons and experts of the run at the best rate that no token of `--batches` batches of validation text
   makes active, at checkpoints over the run.

The best rates are printed as `benchmarks.curves --rates` takes them. Runs are resumed and not repeated; figures are
kept in `benchmarks/results/stability.json` (`--record`), from which the tables are made where a run's directory is
gone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import records, zoo
from benchmarks.training_runs import figures_of
from sparsezoo_jax import data, platforms, run_dir
from sparsezoo_jax.config import read_config
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation.meters import measure
from sparsezoo_jax.training.parameters import saved_steps
from sparsezoo_jax.training.schedules import steps_of

RECORD = Path("benchmarks/results/stability.json")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: Checkpoints of a run, evenly over it.
CHECKPOINTS = 4


def spikes(losses: Sequence[float], window: int, deviations: float) -> list[int]:
    """The steps, from 0 on, whose loss is more than `deviations` standard deviations above the mean of the `window`
    steps before; a loss that is no number counts. A step has `window` steps before it, or is none.
    """
    found = []
    for step in range(window, len(losses)):
        before = [loss for loss in losses[step - window : step] if math.isfinite(loss)]
        high = statistics.fmean(before) + deviations * statistics.pstdev(before) if before else -math.inf
        if not losses[step] <= high:
            found.append(step)
    return found


def of_training(workdir: Path, warmup: int, window: int, deviations: float) -> dict[str, Any]:
    """What the logged steps of a run say: the share of spikes, and the largest gradient over the median one."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "split" not in row and row["step"] > warmup}
    losses = [float(steps[step]["loss"]) for step in sorted(steps)]
    if len(losses) <= window:
        raise UserError(f"{workdir}: {len(losses)} steps after the warm-up are no more than --window {window}")
    norms = [float(row["grad_norm"]) for row in steps.values()]
    return {
        "spikes": len(spikes(losses, window, deviations)) / (len(losses) - window),
        "largest_gradient": max(norms) / statistics.median(norms),
    }


def dead(workdir: Path, batches: int) -> dict[str, dict[str, float]]:
    """By checkpoint, the share of `neurons` and of `experts` of all layers that no token makes active.

    What a model has none of is absent.
    """
    found = {}
    for step in saved_steps(workdir / run_dir.CHECKPOINTS):
        model, config, tokenizer = run_dir.load(workdir, step=step)
        assert tokenizer is not None
        text = data.prepare(config.data, "validation", tokenizer)
        meters = measure(model, config.model, data.evaluation_batches(text, config.data.batch_size, batches))
        ffns = [layer.ffn for layer in meters.layers if layer.ffn is not None]
        experts = [layer.experts for layer in meters.layers if layer.experts is not None]
        shares = {}
        if ffns:
            shares["neurons"] = sum(ffn.dead for ffn in ffns) / sum(ffn.neurons for ffn in ffns)
        if experts:
            shares["experts"] = sum(of.dead for of in experts) / sum(of.experts - of.shared for of in experts)
        found[str(step)] = shares
    return found


def named(arch: str, rate: float, options: argparse.Namespace) -> str:
    """What the run of a rate is called."""
    corpus = re.sub(r"\W", "_", options.dataset)
    return f"{corpus}-{arch}-lr{rate:g}-seed{options.seed}-steps{options.steps}"


def trained(arch: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, which is made where the record has none."""
    name = named(arch, rate, options)
    flags = {"data.dataset": options.dataset, "train.steps": options.steps, "train.log-every": 1}
    flags |= {
        "train.schedule.learning-rate": rate,
        "train.seed": options.seed,
        "data.seed": options.seed,
        "eval.no-report": True,
    }
    flags |= {"train.checkpoint-every": math.ceil(options.steps / CHECKPOINTS), "train.keep-last": CHECKPOINTS}

    def figures() -> dict[str, Any]:
        workdir = options.runs / name
        found = figures_of(workdir, arch, flags)
        train = read_config(workdir / run_dir.CONFIG).train
        warmup = steps_of(train.schedule.warmup_steps, train.steps)
        return {"loss": found["loss"], **of_training(workdir, warmup, options.window, options.deviations)}

    return records.recorded(options.record, name, figures)


def best_rate(runs: Mapping[float, dict[str, Any]]) -> float:
    """The rate of the lowest loss."""
    return min(runs, key=lambda rate: _comparable(runs[rate]["loss"]))


def with_death(arch: str, runs: dict[float, dict[str, Any]], options: argparse.Namespace) -> None:
    """Add to the run at the best rate, and to its figures in the record, what died in it."""
    rate = best_rate(runs)
    if "dead" not in runs[rate]:
        name = named(arch, rate, options)
        runs[rate] = {**runs[rate], "dead": dead(options.runs / name, options.batches)}
        records.write(options.record, name, runs[rate])


def print_tables(found: Mapping[str, Mapping[float, dict[str, Any]]]) -> None:
    """Print sensitivity and spikes at all rates, and death at the best one."""
    print("| architecture | best rate |" + "".join(f" {f:g} x |" for f in FACTORS), end="")
    print(" spikes at the best rate; all rates | largest gradient over the median, best rate; all |")
    print("|---" * (len(FACTORS) + 4) + "|")
    for arch, runs in found.items():
        best = best_rate(runs)
        cells = [f"{run['loss'] - runs[best]['loss']:+.3f}" if run is not runs[best] else f"{run['loss']:.3f}"
                 for _, run in sorted(runs.items())]  # fmt: skip
        shares = [runs[best]["spikes"], max(run["spikes"] for run in runs.values())]
        norms = [runs[best]["largest_gradient"], max(run["largest_gradient"] for run in runs.values())]
        cells += [f"{shares[0]:.1%}; {shares[1]:.1%}", f"{norms[0]:.1f}; {norms[1]:.1f}"]
        print(f"| {arch} | {best:g} | {' | '.join(cells)} |")
    print("\nLosses in nats a token: that of the best rate, and how much more others have.\n")
    print("| dead at the best rate, over the run | neurons | experts |\n|---|---|---|")
    for arch, runs in found.items():
        over = runs[best_rate(runs)].get("dead", {})
        steps = sorted(over, key=int)
        shown = [
            ", ".join(f"{over[step][of]:.1%}" for step in steps if of in over[step]) or "–"
            for of in ("neurons", "experts")
        ]
        print(f"| {arch}, steps {', '.join(steps)} | {' | '.join(shown)} |")
    print("\nBest rates:", json.dumps({arch: best_rate(runs) for arch, runs in found.items()}))


def _comparable(loss: float) -> float:
    return loss if np.isfinite(loss) else math.inf


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=zoo.ARCHS, default=zoo.ARCHS)
    parser.add_argument("--dataset", default="pysource", help="corpus")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--deviations", type=float, default=4.0)
    parser.add_argument("--batches", type=int, default=8, help="of the validation split")
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    options = parser.parse_args()
    platforms.keep_freed_memory()
    known, found = records.read(options.record), {}
    for arch in options.archs:
        own = preset(arch, "tiny").train.schedule.learning_rate
        rates = [own * factor for factor in FACTORS]
        if options.table:
            names = {rate: named(arch, rate, options) for rate in rates}
            runs = {rate: known[name] for rate, name in names.items() if name in known}
        else:
            runs = {rate: trained(arch, rate, options) for rate in rates}
            with_death(arch, runs, options)
            print(f"{arch}: {', '.join(format(run['loss'], '.4f') for run in runs.values())}", flush=True)
        if len(runs) == len(rates):
            found[arch] = runs
    print_tables(found)


if __name__ == "__main__":
    main()
