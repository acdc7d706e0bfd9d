"""Prompts through sparse models and their dense twins on a CPU: `python -m benchmarks.prefill`.

Decoders of `benchmarks.decode`'s shapes (Spark 2B, ProSparse 1B, BlockFFN 2.8B, DECO 0.1B, a mixture of 1.2B) with a
few layers, random weights and a small vocabulary read a prompt as `generate` does: by the rows of each token's active
neurons or experts, with all rows for all tokens (of a mixture: expert by expert in plain JAX), and the dense twin of
equal parameters. Spark selects its share of random scores; thresholds and routers keep the share of their papers.

Then the operation alone, `token_rows`, on the Spark shape, by the share of active neurons.

Sides take turns. Ratios, medians and quartiles over the rounds, are of the process's CPU time and of wall time; those
of models are to the dense twin, those of the operation to the products of all rows.

    python -m benchmarks.prefill [--models spark moe] [--prompts 256 1024] [--layers 4] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.decode import PRESETS, configs, drawn, keep_largest
from benchmarks.peers import calls_of
from benchmarks.timing import interleaved_by, ratios
from sparsezoo_jax import native
from sparsezoo_jax.configs import preset
from sparsezoo_jax.inference import experts, packed
from sparsezoo_jax.pallas_kernels.token_rows import token_rows

CLOCKS = (time.process_time, time.perf_counter)
DENSITIES = (0.005, 0.02, 0.08, 0.15, 0.2, 0.3)
ALL_ROWS = "all rows"
MODELS = ["spark", "prosparse", "blockffn", "deco", "moe"]
#: By its name, for the function of this name hides the module in its package.
OPERATION = importlib.import_module("sparsezoo_jax.pallas_kernels.token_rows")


def of_models(name: str, options: argparse.Namespace) -> None:
    """Print a table for one architecture."""
    arch, size = PRESETS[name]
    sparse, dense = configs(preset(arch, size).model, 8192, options.layers, options.dtype)
    models = {"dense": packed(drawn(dense)), "by token": packed(drawn(sparse))}
    keep_largest(models["by token"])
    for tokens in options.prompts:
        sides = {side: calls_of(model)(1, tokens) for side, model in models.items()}
        neurons = mock.patch.object(OPERATION, "most_density", return_value=-1.0)
        with neurons, mock.patch.object(experts, "MOST_EXPERTS", -1.0):  # compiled here
            sides[ALL_ROWS] = calls_of(models["by token"])(1, tokens)
        show(f"{name}, prompt of {tokens:,}", interleaved_by(sides, options.rounds, CLOCKS), "dense")


def of_operation(options: argparse.Namespace) -> None:
    """Print rows for each density."""
    neurons, gated, d, tokens = 13_824, 1280, 2304, 256
    key, dtype = jax.random.key(0), jnp.dtype(options.dtype)
    rows = jax.random.normal(key, (neurons, gated + d), dtype)
    x, scores = jax.random.normal(key, (tokens, gated), dtype), jax.random.normal(key, (tokens, neurons), dtype)
    forms = {ALL_ROWS: "xla", "by token": "native"}
    for density in DENSITIES:
        gates = jnp.where(scores > statistics.NormalDist().inv_cdf(1 - density), scores, 0)
        calls = {
            side: partial(jax.jit(partial(token_rows, density=0.0, implementation=form)), x, gates, rows)
            for side, form in forms.items()
        }
        show(f"token_rows, {density:.1%} active", interleaved_by(calls, options.rounds, CLOCKS), ALL_ROWS)


def show(case: str, times: list[dict[str, list[float]]], baseline: str) -> None:
    """Print a row for each side."""
    both = [ratios(of_clock, baseline) for of_clock in times]
    for side in times[0]:
        cells = []
        for of_clock, found in zip(times, both, strict=True):
            low, middle, high = found[side]
            cells += [f"{1e3 * statistics.median(of_clock[side]):.1f}", f"{middle:.2f} ({low:.2f} .. {high:.2f})"]
        print(f"| {case} | {side} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{options}; {native.level() or native.why_missing()}, jax {jax.__version__}\n")
    print("| case | side | ms (CPU) | ratio (quartiles) | ms (wall) | ratio (quartiles) |\n|---|---|---|---|---|---|")
    for name in options.models:
        of_models(name, options)
    if not options.models or options.models == MODELS:
        of_operation(options)


if __name__ == "__main__":
    main()
