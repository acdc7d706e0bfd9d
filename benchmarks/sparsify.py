"""Methods of sparsity after training at several sparsities: `python -m benchmarks.sparsify RUN`.

For each method, sparsity and calibration text (`--calibrations`, each of other sequences) a model is made of the run's
as `sparsezoo_jax.sparsify` makes it, and evaluated. Printed are the change of the loss, mean and range over the texts,
the weights that a token needs of the layers' linear maps (ideal; of pruned matrices: that are not 0), and for models
that read less the time of a token by the native operations against the dense model's, whose layers are packed, too:
medians over rounds in which all variants take turns. Weights that are 0 are read like others, so no time is measured.
`--no-times` leaves times out; `--figure FILE.html` draws the changes of the loss by sparsity.

Small layers fit into a processor's caches, where reading fewer rows saves little; the ratio is that of the run's shape.
`python -m benchmarks.sparsify --shape gemma2_2b --layers 8` times dense layers of that shape with random weights in
bfloat16, whose thresholds leave out the share that is asked for; nothing is said about quality then.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from sparsezoo_jax.models.sparsified import DENSITY
from sparsezoo_jax.sparsification import METHODS, calibrate, sparsified_config, thresholds, with_cuts
from sparsezoo_jax.sparsification.config import AllocationConfig, CalibrationConfig, RSparseConfig
from sparsezoo_jax.sparsification.making import Text
from sparsezoo_jax.sparsify import ACTIVATIONS, NEURONS, Sparsify, planned

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
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--calibrations", type=int, default=3, help="texts that are calibrated on, one after another")
    parser.add_argument("--sequences", type=int, default=128, help="of each calibration")
    parser.add_argument("--batches", type=int, default=16, help="of the validation split, for the loss")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--figure", type=Path, help="page to draw")
    parser.add_argument("--shape", help="size of the dense preset to time with random weights, in place of a run")
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
        return variant(model.config, Formats(), options.context, "native", Trained(model, text))

    _, tokens, segments = validation_text(options.run, 64)
    text = tokens[segments > 0]
    dense = evaluate_corpora(model, validation, shown)[0].loss
    print(f"loss of the dense run: {dense:.4f} nats/token", flush=True)
    rows: dict[tuple[str, float], Row] = {}
    variants = {} if options.no_times else {"dense": decoding(model)}
    for name in options.methods:
        method, fields = ROWS[name]
        for sparsity in options.sparsities:
            command = Sparsify(directory=options.run, out=Path("unused"), method=method, sparsity=sparsity, **fields)
            plan, changes, made, figures = planned(command), [], None, {}
            plan.check(model.config)
            for n in range(options.calibrations):
                calibration = CalibrationConfig(sequences=options.sequences, skip=n * options.sequences)
                made = plan.make(model, Text(read, config.data.batch_size, calibration))
                found = evaluate_corpora(made.model, validation, shown)[0]
                changes.append(found.loss - dense)
                figures = plan.figures(made, found.stats)
            assert made is not None
            if "weights" in figures:
                needed = figures["weights"] / figures["weights_dense"]
            else:
                counts = zeros(made.model)
                needed = counts["nonzero"] / counts["weights"]
            rows[name, sparsity] = Row(changes, needed)
            shown_changes = " ".join(f"{change:+.4f}" for change in changes)
            print(f"{name} {sparsity:g}: {shown_changes}, {needed:.1%}", flush=True)
            if not options.no_times and method in (*ACTIVATIONS, *NEURONS):
                variants[f"{name} {sparsity:g}"] = decoding(made.model)
    return rows, variants


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
    """Time dense layers and sparsified ones with random weights, at the first of the sparsities."""
    changes = {"dtype": "bfloat16", "param_dtype": "bfloat16", "layers": options.layers, "vocab_size": options.vocab}
    dense = dataclasses.replace(preset("dense", options.shape).model, **changes)
    tokens = jax.random.randint(jax.random.key(1), (1, 64), 0, options.vocab)
    ones = jnp.ones((1, 64), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": jnp.arange(64)[None]}
    variants = {"dense": variant(dense, Formats(), options.context, "native")}
    forms = {
        "teal": METHODS["teal"],
        "wina": METHODS["wina"],
        "wina, threshold": METHODS["wina"]._replace(gate="threshold"),
    }
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
    print(f"\n{options.shape}, {options.layers} layers, {options.vocab:,} words, context {options.context}, bfloat16\n")
    print("| variant | MB a token | ms a token | ratio | quartiles |")
    print("|---|---|---|---|---|")
    for name, made in variants.items():
        print(f"| {name} | {made.bytes / 1e6:,.0f} | {timing(name, times)} |")


if __name__ == "__main__":
    main()
