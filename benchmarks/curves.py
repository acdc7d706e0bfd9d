"""Loss against parameters, FLOPs and bytes of a token, by architecture: `python -m benchmarks.curves`.

Tiny presets are made 0.625, 1.25 and 2.5 times as wide (about 0.4, 1.5 and 6 million parameters in the layers of dense
and Spark; others as their presets are to these) and trained on `--budgets` steps of the same batches of text. The
learning rate is that of `--rates` for the preset's own width and goes over to others as in muP: matrices of layers
train at it divided by the width, all else at it itself. Of several rates each size and budget has its best, by the
seeds that were trained at all of them. The middle size trains on `--seeds` at the middle budget, and counts with their
mean: their spread is the noise of every other figure.

A power law `L = limit + factor * x^-exponent` goes through the dense models of one budget; x is the parameters without
embeddings, the FLOPs of a token, or the bytes that decoding it reads. For each run the table has the loss that this law
gives a dense model of equal x, at the sparsity that was measured on the run's validation text. A sparse model pays
where its own loss is below. The last column is how many times its bytes a dense model of equal loss would read: what
decoding gains at equal quality, as far as reading is what takes the time; in brackets between which numbers nine of ten
come to lie where the losses of the run and of the law's models are drawn again with the noise that seeds have.

With `--rounds` the packed models decode in turns, in float32 after 128 tokens of validation text, the output projection
included. A line through the dense models' times over their bytes gives that of one whose loss is equal by the law. Only
runs whose directories are there take part.

Runs are resumed and not repeated; figures are kept in `benchmarks/results/curves.json` (`--record`), from which the
table is made. All of it takes most of a day on two cores: `--archs`, `--sizes` and `--budgets` take a part.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from benchmarks import decode, records, zoo
from benchmarks.timing import interleaved
from benchmarks.training_runs import figures_of
from sparsezoo_jax import data, platforms, run_dir
from sparsezoo_jax.config import RunConfig, flatten
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation.meters import measure
from sparsezoo_jax.models import bytes_per_token, count_parameters, flops_per_token

RECORD = Path("benchmarks/results/curves.json")
ARCHS = ("dense", "spark", "blockffn", "deco", "moe", "moex", "mohd", "sparselm")
SIZES = {"s": 0.625, "m": 1.25, "l": 2.5}
BUDGETS = (150, 300, 600)
#: Size and budget that train on all seeds.
NOISE = ("m", 300)
#: How often losses are drawn for an interval.
DRAWS = 200
#: What grows with the width; numbers of heads, experts, blocks and layers stay, and so does the context.
WIDTHS = re.compile(
    r"model\.(d_model|(first_)?ffn\.(d_ff|r|top_k|expert_width|shared_width|dense_twin_d_ff)"
    r"|attention\.(head_dim|r|[qk]v?_lora_rank|qk_nope_head_dim|qk_rope_head_dim|v_head_dim))"
)
#: Matrices of layers, whose rate falls with the width.
MATRICES = r"^segments/.*/(attention|ffn)/(?!.*(scale|bias))"


class Run(NamedTuple):
    """One training run."""

    arch: str
    size: str
    steps: int
    rate: float
    """Learning rate at the preset's own width."""
    seed: int
    dataset: str

    @property
    def name(self) -> str:
        corpus = re.sub(r"\W", "_", self.dataset)
        return f"{corpus}-{self.arch}-{self.size}-steps{self.steps}-lr{self.rate:g}-seed{self.seed}"


class Law(NamedTuple):
    """`L = limit + factor * x^-exponent`."""

    limit: float
    factor: float
    exponent: float

    def __call__(self, x: float) -> float:
        return self.limit + self.factor * x**-self.exponent

    def at(self, loss: float) -> float:
        """The x of a loss; infinite where that is not above the limit."""
        return ((loss - self.limit) / self.factor) ** (-1 / self.exponent) if loss > self.limit else math.inf


Kept = Mapping[Run, Mapping[str, Any]]
"""Figures of runs."""


def widened(config: RunConfig, times: float) -> dict[str, Any]:
    """Changes of a preset that make it `times` as wide, and its learning rates those of muP.

    Raises:
      UserError: a width that would be no whole number.
    """
    changes: dict[str, Any] = {}
    for name, value in flatten(config).items():
        if WIDTHS.fullmatch(name) and isinstance(value, int | float) and not isinstance(value, bool):
            exact = value * times
            # A number of active neurons may be rounded; a width that is would not fit the others.
            if not name.endswith("top_k") and exact != int(exact):
                raise UserError(f"{config.arch}: {name}={value} can't be {times:g} times as large")
            changes[name] = round(exact) if isinstance(value, int) else exact
    groups = [dataclasses.asdict(group) for group in config.train.groups]
    for group in groups:
        group["lr_multiplier"] /= times if group["lr_multiplier"] != 1 else 1
    changes["train.groups"] = groups or [{"pattern": MATRICES, "lr_multiplier": 1 / times}]
    return changes


def flags_of(run: Run) -> dict[str, Any]:
    """Flags of the train command."""
    found = widened(preset(run.arch, "tiny"), SIZES[run.size])
    found["train.groups"] = json.dumps(found["train.groups"])
    found |= {"train.steps": run.steps, "train.schedule.learning-rate": run.rate, "data.dataset": run.dataset}
    found |= {"train.seed": run.seed, "data.seed": run.seed, "eval.no-report": True}
    return {name.replace("_", "-"): value for name, value in found.items()}


def trained(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run, which is made where the record has none."""

    def figures() -> dict[str, Any]:
        directory = options.runs / run.name
        found = figures_of(directory, run.arch, flags_of(run))
        return {"loss": found["loss"], "density": zoo.density(found), **needed(directory, options.batches)}

    return records.recorded(options.record, run.name, figures)


def needed(directory: Path, batches: int) -> dict[str, float]:
    """Parameters without embeddings, FLOPs and bytes of a token at the sparsity of a run's validation text."""
    model, config, tokenizer = run_dir.load(directory)
    if tokenizer is None:
        raise UserError(f"{directory}: has no tokenizer, so no text can be read")
    prepared = data.prepare(config.data, "validation", tokenizer)
    read = data.evaluation_batches(prepared, config.data.batch_size, batches)
    sparsity, context = measure(model, config.model, read).sparsity(config.model), config.data.seq_len
    return {
        "parameters": float(count_parameters(config.model).non_embedding),
        "flops": flops_per_token(config.model, context, sparsity=sparsity),
        "bytes": bytes_per_token(config.model, context, sparsity=sparsity),
    }


def fitted(x: Sequence[float], losses: Sequence[float], near: Law | None = None) -> Law:
    """The law of losses at three or more different x, by least squares of their logarithms.

    Args:
      near: where to look for it; everywhere by default.

    Raises:
      UserError: fewer than three.
    """
    if len(set(x)) < 3:
        raise UserError("a law needs three sizes at least")
    at, seen = np.asarray(x, np.float64), np.asarray(losses, np.float64)
    middle = float(np.exp(np.mean(np.log(at))))

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(seen) - np.log(np.exp(p[0]) + np.exp(p[1]) * (at / middle) ** -np.exp(p[2]))

    if near is None:
        starts = [
            (share * seen.min(), (1 - share) * np.median(seen), exponent)
            for share in (0.1, 0.5, 0.9)
            for exponent in (0.1, 0.3, 0.6)
        ]
    else:
        starts = [(near.limit, near.factor / middle**near.exponent, near.exponent)]
    tried = [optimize.least_squares(residuals, np.log(start)) for start in starts]
    limit, factor, exponent = np.exp(min(tried, key=lambda found: found.cost).x)
    return Law(float(limit), float(factor * middle**exponent), float(exponent))


def best(kept: Kept) -> dict[Run, dict[str, Any]]:
    """Of each architecture, size and budget the run of the first seed at its best rate.

    Its loss is the mean of all `seeds` at that rate, whose number is added. Rates are compared by the seeds that all of
    them have.
    """
    found: dict[Run, dict[str, Any]] = {}
    for same in dict.fromkeys((run.arch, run.size, run.steps) for run in kept):
        by_rate: dict[float, dict[int, Run]] = {}
        for run in kept:
            if (run.arch, run.size, run.steps) == same:
                by_rate.setdefault(run.rate, {})[run.seed] = run
        shared = set.intersection(*(set(runs) for runs in by_rate.values()))

        def loss(runs: dict[int, Run], seeds: Iterable[int]) -> float:
            return statistics.fmean(kept[runs[seed]]["loss"] for seed in seeds)

        runs = min(by_rate.values(), key=lambda runs, shared=shared: loss(runs, shared))
        first = runs[min(runs)]
        found[first] = {**kept[first], "loss": loss(runs, runs), "seeds": len(runs)}
    return found


def as_dense(kept: Kept, steps: int, measure_of: str, near: Law | None = None) -> Law | None:
    """The law of dense models at one budget against parameters, flops or bytes; None: too few of them."""
    dense = [figures for run, figures in kept.items() if (run.arch, run.steps) == ("dense", steps)]
    if len(dense) < 3:
        return None
    return fitted([figures[measure_of] for figures in dense], [figures["loss"] for figures in dense], near)


def noise(kept: Kept) -> float | None:
    """Standard deviation of a loss over seeds, relative to it: of the runs of `NOISE`, all architectures together.

    None: no architecture has two seeds at one rate.
    """
    squares, freedom = 0.0, 0
    for arch, rate in {(run.arch, run.rate) for run in kept}:
        same = (arch, *NOISE, rate)
        logs = [math.log(of["loss"]) for run, of in kept.items() if (run.arch, run.size, run.steps, run.rate) == same]
        if len(logs) > 1:
            squares += statistics.variance(logs) * (len(logs) - 1)
            freedom += len(logs) - 1
    return math.sqrt(squares / freedom) if freedom else None


def drawn_laws(kept: Kept, steps: int, measure_of: str, relative: float) -> list[Law | None]:
    """`as_dense` of losses that are drawn again `DRAWS` times, with `relative` noise; the same draws every time.

    The mean of several `seeds` has less of it.
    """
    draw, found = np.random.default_rng(0), []
    dense = {run: of for run, of in kept.items() if (run.arch, run.steps) == ("dense", steps)}
    near = as_dense(dense, steps, measure_of)
    for _ in range(DRAWS):
        again = {run: {**of, "loss": of["loss"] * float(noisy(draw, of, relative))} for run, of in dense.items()}
        found.append(as_dense(again, steps, measure_of, near))
    return found


def noisy(draw: np.random.Generator, figures: Mapping[str, Any], relative: float, size: int | None = None) -> Any:
    """Factors by which the noise of seeds moves a loss that is a mean of so many."""
    return np.exp(relative / math.sqrt(figures["seeds"]) * draw.standard_normal(size))


def print_table(every: Kept) -> None:
    """Print the best runs beside what a dense model of equal parameters, FLOPs and bytes would come to."""
    print(
        "| architecture | size | steps | rate | parameters, M | MFLOP a token | MB a token | FFN active | loss |",
        end="",
    )
    print(" dense, equal parameters | dense, equal FLOPs | dense, equal bytes | bytes at equal loss |\n|" + "---|" * 13)
    kept, relative = best(every), noise(every)
    laws, draw = dict[int, list[Law | None]](), np.random.default_rng(1)
    for run, figures in kept.items():
        cells = [run.arch, run.size, f"{run.steps}", f"{run.rate:g}", f"{figures['parameters'] / 1e6:.2f}"]
        cells += [f"{figures['flops'] / 1e6:.2f}", f"{figures['bytes'] / 1e6:.2f}", f"{figures['density']:.1%}"]
        cells.append(f"{figures['loss']:.4f}")
        for name in ("parameters", "flops", "bytes"):
            law = as_dense(kept, run.steps, name)
            dense = math.nan if law is None else law(figures[name])
            cells.append("–" if law is None else f"{dense:.4f} ({figures['loss'] - dense:+.4f})")
        law = as_dense(kept, run.steps, "bytes")
        equal = "–" if law is None else f"{law.at(figures['loss']) / figures['bytes']:.2f}"
        if law is not None and relative is not None and run.arch != "dense":
            if run.steps not in laws:
                laws[run.steps] = drawn_laws(kept, run.steps, "bytes", relative)
            losses = figures["loss"] * noisy(draw, figures, relative, DRAWS)
            pairs = zip(laws[run.steps], losses, strict=True)
            found = [of.at(float(loss)) / figures["bytes"] for of, loss in pairs if of is not None]
            low, high = np.quantile(found, [0.05, 0.95], method="nearest")
            equal += f" ({low:.2f} .. {high:.2f})"
        cells.append(equal)
        print("| " + " | ".join(cells) + " |")
    print("\nIn brackets: the run's loss less the dense one's. Spread over seeds, middle size and budget:")
    for arch, rate in dict.fromkeys((run.arch, run.rate) for run in every):
        same = (arch, *NOISE, rate)
        losses = [of["loss"] for run, of in every.items() if (run.arch, run.size, run.steps, run.rate) == same]
        if len(losses) > 1:
            spread = max(losses) - min(losses)
            print(f"{arch} at {rate:g}: {spread:.4f} ({len(losses)} seeds, mean {statistics.mean(losses):.4f})")


def print_times(every: Kept, runs: Path, rounds: int) -> None:
    """Time a token of the best runs, and print it beside that of a dense model of equal loss.

    Of several seeds the first is timed whose directory is there.

    Raises:
      UserError: fewer than three of the dense runs are there.
    """
    kept = best(every)
    alike = {run: [other for other in every if other._replace(seed=run.seed) == run] for run in kept}
    there = {run: [other.name for other in others if (runs / other.name).is_dir()] for run, others in alike.items()}
    timed = {names[0]: run for run, names in there.items() if names}
    found = interleaved({name: zoo.decoding(runs / name) for name in timed}, rounds)
    ms = {name: [1e3 * seconds / decode.TURN for seconds in times] for name, times in found.items()}
    print(
        "\n| run | bytes of layers, MB | ms a token | dense of equal loss, ms | its time / this | at most, by bytes |"
    )
    print("|---|---|---|---|---|---|")
    for name, run in timed.items():
        dense = {other: kept[of] for other, of in timed.items() if (of.arch, of.steps) == ("dense", run.steps)}
        law = as_dense(kept, run.steps, "bytes")
        if law is None or len(dense) < 3:
            raise UserError(
                f"{runs}: times at equal loss need three dense runs of {run.steps} steps, found {len(dense)}"
            )
        figures = kept[run]
        equal = law.at(figures["loss"])
        # Round by round, for a disturbance hits all of a round alike.
        lines = [
            np.polyfit([of["bytes"] for of in dense.values()], [ms[other][i] for other in dense], 1)
            for i in range(rounds)
        ]
        at_equal = [float(np.polyval(line, equal)) for line in lines]
        gains = [other / own for other, own in zip(at_equal, ms[name], strict=True)]
        low, middle, high = statistics.quantiles(gains, n=4)
        cells = [f"{figures['bytes'] / 1e6:.2f}", f"{statistics.median(ms[name]):.3f}"]
        cells += [f"{statistics.median(at_equal):.3f}", f"{middle:.2f} ({low:.2f} .. {high:.2f})"]
        print(f"| {name} | {' | '.join(cells)} | {equal / figures['bytes']:.2f} |")


def rates_of(arch: str, options: argparse.Namespace) -> list[float]:
    """Learning rates to try, for the preset's own width."""
    given = json.loads(options.rates).get(arch) or preset(arch, "tiny").train.schedule.learning_rate
    return given if isinstance(given, list) else [given]


def runs_of(options: argparse.Namespace) -> list[Run]:
    """What is to be trained on the first seed, small and short runs first."""
    return [
        Run(arch, size, steps, rate, options.seeds[0], options.dataset)
        for steps in sorted(options.budgets)
        for size in options.sizes
        for arch in options.archs
        for rate in rates_of(arch, options)
    ]


def further_seeds(kept: Kept, known: Collection[str], options: argparse.Namespace) -> list[Run]:
    """Runs of the other seeds: at the best rate of the first, and those that are there."""
    chosen = set(best(kept))
    return [
        other
        for run in kept
        if (run.size, run.steps) == NOISE
        for other in (run._replace(seed=seed) for seed in options.seeds[1:])
        if run in chosen or other.name in known
    ]


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="the first of them trains everywhere")
    parser.add_argument(
        "--rates", default="{}", help='learning rates of presets, JSON: {"spark": [0.008, 0.016]}; else their own'
    )
    parser.add_argument("--dataset", default="pysource", help="corpus")
    parser.add_argument("--batches", type=int, default=8, help="of the validation split, for the sparsity")
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--rounds", type=int, default=0, help="of times of a token, in which all take turns; 0: none")
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    options = parser.parse_args()
    platforms.keep_freed_memory()
    known = records.read(options.record)
    kept: dict[Run, Mapping[str, Any]] = {}

    def make(runs: Iterable[Run]) -> None:
        for run in runs:
            if run.name in known:
                kept[run] = known[run.name]
            elif not options.table:
                kept[run] = trained(run, options)
                print(f"{run.name}: {kept[run]['loss']:.4f} nats/token", flush=True)

    make(runs_of(options))
    make(further_seeds(kept, known, options))
    print_table(kept)
    if options.rounds:
        print_times(kept, options.runs, options.rounds)


if __name__ == "__main__":
    main()
