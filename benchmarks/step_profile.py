"""Where the time of a train step goes on this machine: `python -m benchmarks.step_profile --archs moe mohd`.

A step of each tiny preset and of its dense twin is compiled and traced with JAX's profiler. Each operation's time is
given to the function of this library that it was traced from, by the stack that the compiled program holds for it, and
functions are put together by file. Times are sums over what threads do, in ms a step; operations that wait for others
(loops and conditions around operations) are left out. What the traced step took by the clock is beside them: traced
steps are slower than others.

`--functions` shows the functions with the most time, too.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.step_times import twin_of
from benchmarks.train_step import compiled_step, random_batch
from benchmarks.zoo import ARCHS
from sparsezoo_jax import platforms
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.training.config import TrainConfig

#: What an operation is put to: the first that matches a file of its stack, from the innermost call on. An operation
#: of a helper, such as a matrix product, belongs to the layer that called it.
PARTS = {
    "loss": r"evaluation/cross_entropy",
    "attention": r"attention|models/(rope|mla)",
    "routing": r"models/routers",
    "experts' products": r"grouped_ffn|block_ffn|deco_ffn|models/(moe|moex|deco|blockffn|experts)\.py",
    "feed-forward": r"ffn|models/sparselm",
    "routed width": r"grouped_linear|models/mohd",
    "norms": r"models/norms",
    "embedding and stream": r"models/(decoder|layers|common|embedding|residual)",
    "optimizer and step": r"training/|optax",
}
OTHER = "other"
#: Events that contain other operations.
AROUND = re.compile(r"(while|conditional|call|ThunkExecutor.*|.*wait.*)(\.\d+)?")


class Stacks:
    """Functions that instructions of a compiled program were traced from, innermost first."""

    def __init__(self, program: str):
        files = self._table(program, "FileNames")
        functions = self._table(program, "FunctionNames")
        places = {
            number: (
                files[self._field(fields, "file_name_id")].strip('"'),
                functions[self._field(fields, "function_name_id")].strip('"'),
            )
            for number, fields in self._table(program, "FileLocations").items()
        }
        frames = {
            # Parents are counted from 1 on, 0 + 1 is none.
            number: (self._field(fields, "file_location_id"), self._field(fields, "parent_frame_id") - 1)
            for number, fields in self._table(program, "StackFrames").items()
        }
        self._of: dict[str, list[tuple[str, str]]] = {}
        for name, frame in re.findall(r"%?([\w.-]+) = [^\n]*?metadata=\{[^}\n]*?stack_frame_id=(\d+)", program):
            stack, at = [], int(frame)
            while at in frames:
                place, at = frames[at]
                stack.append(places[place])
            self._of[name] = stack

    @staticmethod
    def _table(program: str, name: str) -> dict[int, str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)+)", program, re.MULTILINE)
        rows = found[1].splitlines() if found else []
        return {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows}

    @staticmethod
    def _field(fields: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", fields)
        return int(found[1]) if found else 0

    def __contains__(self, instruction: str) -> bool:
        return instruction in self._of

    def part(self, instruction: str) -> str:
        """The part that an instruction belongs to."""
        for file, _ in self._of.get(instruction, []):
            for part, pattern in PARTS.items():
                if re.search(pattern, file.rsplit("sparsezoo_jax/", 1)[-1]):
                    return part
        return OTHER

    def function(self, instruction: str) -> str:
        """The innermost function of this library."""
        for file, function in self._of.get(instruction, []):
            if "sparsezoo_jax/" in file:
                return f"{file.rsplit('sparsezoo_jax/', 1)[-1]}: {function}"
        return OTHER


def events(trace: Mapping[str, Any]) -> collections.Counter[str]:
    """Microseconds of each operation of a trace in the format of Perfetto, all threads together."""
    spent: collections.Counter[str] = collections.Counter()
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and not AROUND.fullmatch(event["name"]):
            spent[event["name"]] += event["dur"]
    return spent


def profile(config: DecoderConfig, train: TrainConfig, shape: tuple[int, int], steps: int) -> dict[str, Any]:
    """`parts` and `functions` with their milliseconds a step, and `wall`, those of the clock, of traced steps."""
    batch = random_batch(config, *shape)
    compiled, state = compiled_step(config, batch, train)
    stacks = Stacks(compiled.as_text())
    state, _ = jax.block_until_ready(compiled(state, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            began = time.perf_counter()
            for _ in range(steps):
                state, _ = jax.block_until_ready(compiled(state, batch))
            wall = time.perf_counter() - began
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(file) as opened:
            spent = events(json.load(opened))
    parts: dict[str, float] = dict.fromkeys([*PARTS, OTHER], 0.0)
    functions: dict[str, float] = {}
    for name, microseconds in spent.items():
        if name in stacks:
            part, function, ms = stacks.part(name), stacks.function(name), microseconds / steps / 1e3
            parts[part] += ms
            functions[function] = functions.get(function, 0.0) + ms
    return {"parts": parts, "functions": functions, "wall": wall / steps * 1e3}


def _sums(of: Mapping[str, Any]) -> tuple[float, float]:
    return sum(of["parts"].values()), of["wall"]


def main() -> None:
    """Trace the steps and print the tables."""
    platforms.keep_freed_memory()  # as training does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archs", nargs="+", default=["moe", "mohd", "spark"], choices=[a for a in ARCHS if a != "dense"]
    )
    parser.add_argument("--steps", type=int, default=8, help="that are traced")
    parser.add_argument("--functions", type=int, default=0, help="of each model, those with the most time")
    options = parser.parse_args()
    for arch in options.archs:
        config = preset(arch, "tiny")
        model = dataclasses.replace(config.model, scan_layers=False, remat="none")
        shape = (config.data.batch_size, config.data.seq_len)
        found = {
            arch: profile(model, config.train, shape, options.steps),
            "its dense twin": profile(twin_of(model), TrainConfig(), shape, options.steps),
        }
        print(f"| ms a step | {' | '.join(found)} |\n|---|---|---|")
        for part in [*PARTS, OTHER]:
            times = [of["parts"][part] for of in found.values()]
            if any(times):
                print(f"| {part} | {' | '.join(f'{ms:.1f}' for ms in times)} |")
        sums, walls = ([f"{ms:.1f}" for ms in row] for row in zip(*map(_sums, found.values()), strict=True))
        print(f"| all, on all threads | {' | '.join(sums)} |\n| by the clock | {' | '.join(walls)} |\n")
        if options.functions:
            for name, of in found.items():
                print(f"| {name}: function | ms |\n|---|---|")
                largest = sorted(of["functions"].items(), key=lambda item: -item[1])
                for function, ms in largest[: options.functions]:
                    print(f"| {function} | {ms:.1f} |")
                print()


if __name__ == "__main__":
    main()
