"""Methods of sparsity after training at several sparsities: `python -m benchmarks.sparsify RUN`.

For each method, sparsity and calibration text (`--calibrations`, each of other sequences) a model is made of the run's
as `sparsezoo_jax.sparsify` makes it, and evaluated. Printed are the change of the loss, mean and range over the texts,
the weights that a token needs of the layers' linear maps (ideal; of pruned matrices: that are not 0), and for models
that read less the time of a token by the native operations against the dense model's, whose layers are packed, too:
medians over rounds in which all variants take turns. Weights that are 0 are read like others, so no time is measured.
`--no-times` leaves times out; `--figure FILE.html` draws the changes of the loss by sparsity. `--results FILE` keeps
what is measured of quality, a line for each method, sparsity and text, and goes on with what is missing there. Read-ME
is made with `--domains`, corpora of its experts, and trains for `--rounds-trained` rounds of 20 and 40 steps.

Small layers fit into a processor's caches, where reading fewer rows saves little; the ratio is that of the run's shape.
`python -m benchmarks.sparsify --shape gemma2_2b --layers 8` times dense layers of that shape with random weights in
bfloat16, whose thresholds leave out the share that is asked for; nothing is said about quality then. `--arch moe
--shape xlarge` times a mixture, `--maps up down` of it masks on experts alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import TURN, Trained, Variant, drawn, variant
from benchmarks.run_text import validation_text
from sparsezoo_jax import data, run_dir
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation import evaluate_corpora
from sparsezoo_jax.evaluation.report.svg import Series, line_plot
from sparsezoo_jax.evaluation.sparsified import zeros
from sparsezoo_jax.inference import Formats
from sparsezoo_jax.models.masks import DENSITY
from sparsezoo_jax.sparsification import METHODS, calibrate, sparsified_config, thresholds, with_cuts
from sparsezoo_jax.sparsification.config import AllocationConfig, CalibrationConfig, ReadMEConfig, RSparseConfig
from sparsezoo_jax.sparsification.making import Domains, Text
from sparsezoo_jax.sparsify import ACTIVATIONS, EXPERTS, NEURONS, Sparsify, planned

#: What is compared: method and fields of the command that are not as by default.
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cats": ("cats", {}),
    "teal": ("teal", {}),
    "teal, greedy": ("teal", {"allocation": AllocationConfig(kind="greedy", sequences=4)}),
    "wina": ("wina", {}),
    "rsparse": ("rsparse", {"rsparse": RSparseConfig(population=8, generations=2, sequences=8)}),
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "gblm": ("gblm", {}),
    "magnitude-sp": ("magnitude-sp", {}),
    "wanda-sp": ("wanda-sp", {}),
    "cfsp": ("cfsp", {}),
    "flap": ("flap", {}),
    "readme": ("readme", {}),
}
SPARSITIES = (0.25, 0.4, 0.5, 0.65)


class Row(NamedTuple):
    """A method at one sparsity."""

    changes: list[float]
    """Of the loss, by calibration text."""
    needed: float
    """Share of the weights."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="run directory, not sparsified")
    default = [name for name in ROWS if name != "readme"]
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=default)
    parser.add_argument("--domains", nargs="+", default=[], help="corpora that readme makes an expert of each")
    parser.add_argument("--rounds-trained", type=int, default=1, help="of the training of readme")
    parser.add_argument("--results", type=Path, help="file that keeps what is measured, to go on with")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--calibrations", type=int, default=3, help="texts that are calibrated on, one after another")
    parser.add_argument("--sequences", type=int, default=128, help="of each calibration")
    parser.add_argument("--batches", type=int, default=16, help="of the validation split, for the loss")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--figure", type=Path, help="page to draw")
    parser.add_argument("--shape", help="size of a preset to time with random weights, in place of a run")
    parser.add_argument("--arch", default="dense", help="architecture of --shape")
    parser.add_argument("--maps", nargs="+", help="maps of --shape that leave channels out (default: those of teal)")
    parser.add_argument("--layers", type=int, default=8, help="of --shape")
    parser.add_argument("--vocab", type=int, default=32_000, help="of --shape")
    options = parser.parse_args()
    if (options.run is None) == (options.shape is None):
        parser.error("give a run directory or --shape")
    if options.shape is not None:
        time_shape(options)
        return
    rows, variants = measured(options)
    times = {} if options.no_times else in_turns(variants, options.rounds)
    print_rows(options, rows, times)
    if options.figure is not None:
        options.figure.write_text(curves(rows, options))


def measured(options: argparse.Namespace) -> tuple[dict[tuple[str, float], Row], dict[str, Variant]]:
    """Figures by method and sparsity, and what decodes."""
    model, config, tokenizer = run_dir.load(options.run)
    if tokenizer is None:
        raise UserError(f"{options.run}: has no tokenizer")
    read, validation = (data.prepare(config.data, split, tokenizer) for split in ("train", "validation"))

    def shown(split: Any) -> Any:
        return data.evaluation_batches(split, config.data.batch_size, options.batches)

    def decoding(model: Any) -> Variant:
        return variant(model.config, Formats(), options.context, "native", Trained(model, start))

    _, tokens, segments = validation_text(options.run, 64)
    start = tokens[segments > 0]
    dense = evaluate_corpora(model, validation, shown)[0].loss
    print(f"loss of the dense run: {dense:.4f} nats/token", flush=True)
    rows: dict[tuple[str, float], Row] = {}
    variants = {} if options.no_times else {"dense": decoding(model)}
    known = {} if options.results is None else read_results(options.results)
    for name in options.methods:
        method, fields = ROWS[name]
        if method in EXPERTS:
            domains, rounds = tuple(options.domains), options.rounds_trained
            experts = ReadMEConfig(domains=domains, rounds=rounds, router_steps=20, expert_steps=40)
            fields: dict[str, Any] = {"readme": experts}
        for sparsity in options.sparsities:
            command = Sparsify(directory=options.run, out=Path("unused"), method=method, sparsity=sparsity, **fields)
            plan, changes, made, needed = planned(command), [], None, 0.0
            plan.check(model.config)
            timed = not options.no_times and method in (*ACTIVATIONS, *NEURONS)
            for n in range(options.calibrations):
                key = f"{name} {sparsity:g} {n} of {options.sequences}, {options.batches} batches"
                if key not in known or (timed and n == options.calibrations - 1):
                    calibration = CalibrationConfig(sequences=options.sequences, skip=n * options.sequences)
                    if method in EXPERTS:
                        mixture: Any = data.prepare(plan.corpora(config.data), "train", tokenizer)
                        text: Any = Domains(mixture, config.data.batch_size, calibration)
                    else:
                        text = Text(read, config.data.batch_size, calibration)
                    made = plan.make(model, text)
                    found = evaluate_corpora(made.model, validation, shown)[0]
                    figures = plan.figures(made, found.stats)
                    known[key] = (found.loss - dense, share_needed(made.model, figures))
                    if options.results is not None:
                        with options.results.open("a") as lines:
                            lines.write(json.dumps([key, *known[key]]) + "\n")
                change, needed = known[key]
                changes.append(change)
            rows[name, sparsity] = Row(changes, needed)
            shown_changes = " ".join(f"{change:+.4f}" for change in changes)
            print(f"{name} {sparsity:g}: {shown_changes}, {needed:.1%}", flush=True)
            if timed:
                assert made is not None
                variants[f"{name} {sparsity:g}"] = decoding(made.model)
    return rows, variants


def share_needed(model: Any, figures: Mapping[str, Any]) -> float:
    """Of the weights of the layers' maps those that a token needs, or that are not 0."""
    if "weights" in figures:
        return figures["weights"] / figures["weights_dense"]
    counts = zeros(model)
    return counts["nonzero"] / counts["weights"]


def read_results(path: Path) -> dict[str, tuple[float, float]]:
    """What `--results` has: change of the loss and share of the weights, by method, sparsity and text."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {key: (change, needed) for key, change, needed in rows}


def in_turns(variants: Mapping[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds a token of each variant, by round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, made in variants.items():
            started = time.perf_counter()
            made.turn()
            times[name].append((time.perf_counter() - started) / TURN)
    return times


def timing(name: str, times: Mapping[str, list[float]]) -> str:
    """Cells of a table: milliseconds, ratio to the dense model and its quartiles."""
    if name not in times:
        return "– | – | –"
    ratios = [dense / own for dense, own in zip(times["dense"], times[name], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{1e3 * statistics.median(times[name]):.3f} | {statistics.median(ratios):.2f} | {low:.2f} .. {high:.2f}"


def print_rows(
    options: argparse.Namespace, rows: dict[tuple[str, float], Row], times: Mapping[str, list[float]]
) -> None:
    """Print the table of a run."""
    print(f"\n{options.run.name}, {options.calibrations} calibrations of {options.sequences} sequences\n")
    print("| method | sparsity | change of the loss | range | weights needed | ms a token | ratio | quartiles |")
    print("|---|---|---|---|---|---|---|---|")
    if "dense" in times:
        print(f"| dense | 0 | 0 | | 100.0% | {timing('dense', times)} |")
    for (name, sparsity), row in rows.items():
        span = f"{min(row.changes):+.4f} .. {max(row.changes):+.4f}"
        cells = timing(f"{name} {sparsity:g}", times)
        print(f"| {name} | {sparsity:g} | {np.mean(row.changes):+.4f} | {span} | {row.needed:.1%} | {cells} |")


def curves(rows: dict[tuple[str, float], Row], options: argparse.Namespace) -> str:
    """A page with the change of the loss by sparsity, a line for each method; falls of the loss are left out."""
    series = [
        Series(name, list(options.sparsities), [float(np.mean(rows[name, s].changes)) for s in options.sparsities])
        for name in options.methods
    ]
    title = f"{options.run.name}: change of the loss"
    return "<!doctype html>\n" + line_plot(title, "sparsity", "nats/token", series, log_y=True) + "\n"


def time_shape(options: argparse.Namespace) -> None:
    """Time layers of a preset's shape and sparsified ones with random weights, at each of the sparsities."""
    changes = {"dtype": "bfloat16", "param_dtype": "bfloat16", "layers": options.layers, "vocab_size": options.vocab}
    dense = dataclasses.replace(preset(options.arch, options.shape).model, **changes)
    tokens = jax.random.randint(jax.random.key(1), (1, 64), 0, options.vocab)
    ones = jnp.ones((1, 64), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": jnp.arange(64)[None]}
    variants = {"dense": variant(dense, Formats(), options.context, "native")}
    maps = METHODS["teal"].maps if options.maps is None else tuple(options.maps)
    forms = {name: METHODS[name]._replace(maps=maps) for name in ("teal", "wina")}
    forms["wina"] = forms["wina"]._replace(weighted=maps)
    forms["wina, threshold"] = forms["wina"]._replace(gate="threshold")
    for name, method in forms.items():
        for sparsity in options.sparsities:
            model = drawn(sparsified_config(dense, method.sparsity(sparsity)))
            with_cuts(model, {map: np.zeros(options.layers) for map in method.maps})
            calibration = calibrate(model, [batch])
            shares = {map: np.full(options.layers, sparsity) for map in calibration.maps}
            cuts = shares if method.gate == "top_k" else thresholds(calibration, shares)
            with_cuts(model, cuts)
            made = variant(model.config, Formats(), options.context, "native", model=model)
            densities = [float(np.mean(x)) for stat, x in made.stats.items() if stat.startswith(DENSITY)]
            print(f"{name} {sparsity:g}: maps leave out {1 - np.mean(densities):.1%} of their channels", flush=True)
            variants[f"{name} {sparsity:g}"] = made
    times = in_turns(variants, options.rounds)
    shape = f"{options.arch} {options.shape}, {options.layers} layers, {options.vocab:,} words"
    print(f"\n{shape}, context {options.context}, bfloat16\n")
    print("| variant | MB a token | ms a token | ratio | quartiles |")
    print("|---|---|---|---|---|")
    for name, made in variants.items():
        print(f"| {name} | {made.bytes / 1e6:,.0f} | {timing(name, times)} |")


if __name__ == "__main__":
    main()
