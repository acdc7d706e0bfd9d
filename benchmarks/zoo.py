"""All architectures side by side at tiny scale: `python -m benchmarks.zoo`.

Every architecture's tiny preset (about 1.5 million parameters) trains on the same text, in batches of the same tokens.
Its learning rate is searched on the first seed, further on where the best is the outermost that was tried; the best
trains on further seeds, which change the initialisation and the order of the data. From each first seed's run, the
validation text gives the share of active neurons and the FLOPs of a token; its packed model decodes in turns with the
others', and train steps take turns likewise.

Finished runs and measurements are kept in `--runs` and not repeated; a run that was cut off resumes. Their figures are
in `benchmarks/results/zoo.json` as well (`--record`), from which the table is made where a run's directory is gone;
only times need the runs of the first seed. Times of models this small are mostly those of calls, so that they say
little of large ones: `benchmarks.decode` has those.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import decode, records
from benchmarks.run_text import validation_text
from benchmarks.timing import interleaved, ratios
from benchmarks.train_step import compiled_step, random_batch
from benchmarks.training_runs import figures_of
from sparsezoo_jax import data, platforms, run_dir
from sparsezoo_jax.configs import PRESETS, preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation.meters import measure
from sparsezoo_jax.inference import Formats
from sparsezoo_jax.models import dense_twin, flops_per_token

BASELINE = "dense"
#: Architectures of texts: those of images have no loss of tokens to compare.
ARCHS = sorted(arch for arch, found in PRESETS.items() if found["tiny"].model.images.patch is None)
RECORD = Path("benchmarks/results/zoo.json")
STEPS, SEEDS = 300, (0, 1, 2)
#: Learning rates that are tried, as multiples of the preset's.
FACTORS = (0.5, 1.0, 2.0)
#: Further ones at most, while the best is the outermost.
FURTHER = 3
CONTEXT = 128
#: What a run is called.
NAME = re.compile(r"(?P<arch>.+)-lr(?P<rate>.+)-seed(?P<seed>\d+)-steps(?P<steps>\d+)")


@dataclasses.dataclass(frozen=True)
class Trained:
    """The runs of one architecture."""

    rate: float
    """The best learning rate."""
    losses: list[float]
    """Validation loss by seed, nats a token."""
    figures: dict[str, Any]
    """Of the first seed's run at that rate: see `measured`, with the active share of the FFN's neurons, `density`."""
    first: Path
    """Its directory, which may be gone."""


def train(arch: str, options: argparse.Namespace) -> Trained:
    """Search the rate and train all seeds, as far as that has not been done."""
    own = preset(arch, "tiny").train.schedule.learning_rate

    def folder(rate: float, seed: int) -> Path:
        return options.runs / f"{arch}-lr{rate:g}-seed{seed}-steps{options.steps}"

    def run(rate: float, seed: int) -> dict[str, Any]:
        own = folder(rate, seed)

        def figures() -> dict[str, Any]:
            found = made(own)
            kept = {"loss": found["loss"], "density": density(found), "seconds": found["seconds"]}
            return {**kept, **measured(own, options.batches)}

        return records.recorded(options.record, own.name, figures)

    tried: dict[float, dict[str, Any]] = {}

    def loss(rate: float) -> float:
        if rate not in tried:
            tried[rate] = run(rate, options.seeds[0])
        return tried[rate]["loss"]

    best = searched([own * factor for factor in options.factors], loss)
    found = [run(best, seed) for seed in options.seeds]
    return Trained(best, [figures["loss"] for figures in found], found[0], folder(best, options.seeds[0]))


def made(run: Path) -> dict[str, Any]:
    """What `evaluation.json` of a run of the comparison holds, which is trained unless it is there.

    Args:
      run: its directory, whose name tells architecture, learning rate, seed and steps.
    """
    match = NAME.fullmatch(run.name)
    assert match is not None, run
    flags = {"train.steps": match["steps"], "train.schedule.learning-rate": match["rate"]}
    flags |= {"train.seed": match["seed"], "data.seed": match["seed"], "eval.no-report": True}
    return figures_of(run, match["arch"], flags)


def searched(rates: list[float], loss: Callable[[float], float], further: int = FURTHER) -> float:
    """The rate of the lowest loss: `rates`, and where the best is the outermost, up to `further` halves or doubles."""
    found = {rate: loss(rate) for rate in rates}
    for _ in range(further):
        best = min(found, key=found.__getitem__)
        if len(found) < 2 or min(found) < best < max(found):
            break
        beyond = best / 2 if best == min(found) else best * 2
        found[beyond] = loss(beyond)
    return min(found, key=found.__getitem__)


class BestRuns(NamedTuple):
    """What the record holds of an architecture at its best learning rate."""

    first: str
    """Name of the first seed's run."""
    figures: dict[str, Any]
    """Its figures."""
    losses: list[float]
    """Validation losses of all seeds, the first one's first."""
    searched: bool
    """Whether rates on both sides of the best were tried, or as many as `searched` goes to."""


def best_runs(kept: Mapping[str, dict[str, Any]], steps: int) -> dict[str, BestRuns]:
    """Of each architecture in a record the runs at the rate of the first seed's lowest loss, as `train` finds it."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in kept:
        match = NAME.fullmatch(name)
        if match is not None and int(match["steps"]) == steps:
            found.setdefault(match["arch"], {}).setdefault(match["rate"], {})[int(match["seed"])] = name
    best = {}
    for arch, rates in found.items():
        first = min(seed for seeds in rates.values() for seed in seeds)
        seeds = min((s for s in rates.values() if first in s), key=lambda s: kept[s[first]]["loss"])
        losses = [kept[seeds[seed]]["loss"] for seed in sorted(seeds)]
        tried = sorted(float(rate) for rate, s in rates.items() if first in s)
        rate = next(float(rate) for rate, s in rates.items() if s is seeds)
        searched = tried[0] < rate < tried[-1] or len(tried) >= len(FACTORS) + FURTHER
        best[arch] = BestRuns(seeds[first], kept[seeds[first]], losses, searched)
    return best


def command(arch: str, steps: int) -> str:
    """The command that trains an architecture as far as that has not been done."""
    return f"python -m benchmarks.zoo --archs {arch} --steps {steps} --only-train"


def measured(run: Path, batches: int) -> dict[str, float]:
    """What a run's model does on its validation text: parameters, and FLOPs of a token with and without sparsity."""
    model, config, tokenizer = run_dir.load(run)
    if tokenizer is None:
        raise UserError(f"{run}: has no tokenizer, so no text can be read")
    prepared = data.prepare(config.data, "validation", tokenizer)
    rows = config.data.batch_size
    sparsity = measure(model, config.model, data.evaluation_batches(prepared, rows, batches)).sparsity(config.model)
    context = config.data.seq_len
    return {
        "parameters": float(sum(x.size for x in _arrays(model))),
        "flops": flops_per_token(config.model, context, sparsity=sparsity, logits=True),
        "dense_flops": flops_per_token(dense_twin(config.model) or config.model, context, logits=True),
    }


def _arrays(model: Any) -> list[Any]:
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))


def density(figures: dict[str, Any]) -> float:
    """Mean active share of the FFN's neurons over the layers that have one; 1 where all are."""
    shares = [share for share in figures.get("ffn_density", []) if share is not None]
    return statistics.fmean(shares) if shares else 1.0


def decoding(run: Path) -> Callable[[], None]:
    """Decode `decode.TURN` tokens after validation text with a run's packed model, in float32."""
    model, tokens, segments = validation_text(run, 8)
    text = decode.Trained(model, tokens[segments > 0])
    return decode.variant(model.config, Formats(), CONTEXT, "native", text).turn


def training(arch: str) -> Callable[[], Any]:
    """One train step of the preset."""
    config = preset(arch, "tiny")
    batch = random_batch(config.model, config.data.batch_size, config.data.seq_len)
    compiled, state = compiled_step(config.model, batch, config.train)
    held = [state]

    def step() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return step


def main() -> None:
    """Train, measure and print the table."""
    platforms.keep_freed_memory()  # as training does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--archs", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), help="of the preset's learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only-train", action="store_true", help="make the runs and print nothing")
    parser.add_argument("--batches", type=int, default=8, help="batches of validation text that FLOPs are measured on")
    parser.add_argument("--rounds", type=int, default=15, help="of the times, which take turns; 0: no times")
    parser.add_argument("--record", type=Path, default=RECORD, help="figures of all runs")
    options = parser.parse_args()
    archs = [BASELINE, *(arch for arch in options.archs if arch != BASELINE)]

    runs = {arch: train(arch, options) for arch in archs}
    if options.only_train:
        return
    times: list[dict[str, tuple[float, float, float]]] = []
    if options.rounds:
        steps, tokens = (
            {arch: training(arch) for arch in archs},
            {arch: decoding(of.first) for arch, of in runs.items()},
        )
        times += [ratios(interleaved(turns, options.rounds), BASELINE) for turns in (steps, tokens)]
    print(
        "| architecture | parameters | learning rate | validation loss, mean (spread) | against dense | FFN active | "
        "MFLOP a token (its dense twin) |" + " train step | decoding |" * bool(times)
    )
    print("|---|---|---|---|---|---|---|" + "---|---|" * bool(times))
    base = statistics.fmean(runs[BASELINE].losses)
    for arch in archs:
        trained, count = runs[arch], runs[arch].figures
        mean = statistics.fmean(trained.losses)
        own = "".join(f" {mid:.2f} ({low:.2f} .. {high:.2f}) |" for low, mid, high in (found[arch] for found in times))
        print(
            f"| {arch} | {count['parameters']:,.0f} | {trained.rate:g} | {mean:.4f} "
            f"({max(trained.losses) - min(trained.losses):.4f}) | {mean / base - 1:+.2%} | {count['density']:.1%} | "
            f"{count['flops'] / 1e6:.2f} ({count['dense_flops'] / 1e6:.2f}) |{own}"
        )
    if times:
        print(
            "\nTimes are relative to the dense preset's, median and quartiles over the rounds. FLOPs and times include "
            "the output projection, which is the same for all."
        )


if __name__ == "__main__":
    main()
