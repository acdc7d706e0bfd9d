"""Compile time of the train step by depth: `python -m benchmarks.compile_time`.

Scanned layers compile once per period, so 26 layers should cost about what 4 cost. Spark tiny's widths; tracing and
compiling are timed without the persistent cache, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import jax
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.optimizer import build_optimizer
from sparsezoo_jax.training.state import ModelTemplate, initial_state
from sparsezoo_jax.training.step import build_train_step


def compile_seconds(layers: int, scan: bool) -> float:
    """Seconds to trace, lower and compile the train step of `layers` layers."""
    jax.clear_caches()
    config = dataclasses.replace(preset("spark").model, layers=layers, scan_layers=scan)
    train = TrainConfig()

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config, rngs=rngs)

    template = ModelTemplate(build)
    optimizer = build_optimizer(train, template.parameters)
    state = jax.eval_shape(lambda key: initial_state(template, build, optimizer, (), key), jax.random.key(0))
    names = {"tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "mask": "bool"}
    batch = {name: jax.ShapeDtypeStruct((8, 256), dtype) for name, dtype in names.items()}
    started = time.perf_counter()
    jax.jit(build_train_step(train, template, optimizer), donate_argnums=0).lower(state, batch).compile()
    return time.perf_counter() - started


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unrolled", action="store_true", help="also time 26 unrolled layers, once")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    compile_seconds(2, True)  # loads what is loaded once
    times: dict[int, list[float]] = {4: [], 26: []}
    for _ in range(options.rounds):
        for layers, values in times.items():
            values.append(compile_seconds(layers, True))
    medians = {layers: statistics.median(values) for layers, values in times.items()}
    print("| layers | median seconds to trace and compile |\n|---|---|")
    for layers, seconds in medians.items():
        print(f"| {layers}, scanned | {seconds:.2f} |")
    if options.unrolled:
        print(f"| 26, unrolled | {compile_seconds(26, False):.2f} |")
    print(f"\n26 layers / 4 layers: {medians[26] / medians[4]:.2f}")


if __name__ == "__main__":
    main()
