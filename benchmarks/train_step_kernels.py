"""A train step with its kernels and without, by the compiler: `python -m benchmarks.train_step_kernels --arch spark`.

Takes the flags of `python -m sparsezoo_jax.aot`, compiles the step twice, and prints both as one Markdown table. All
figures are those of one device; nothing is measured on one.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsezoo_jax import cli
from sparsezoo_jax.aot import GIB, Aot

if TYPE_CHECKING:
    from sparsezoo_jax.compilation.report import Report

NOTES = """
scheduled: cycles that the compiler's scheduler gives to XLA's operations, coarse and without kernels, trips of loops
multiplied in, at an assumed clock. Of kernels: FLOPs and bytes by their own estimates, and the larger of the two by the
datasheet's peaks, a bound. Bytes and FLOPs of the whole program are the compiler's, in which the body of a loop counts
once, and so one period of the layers and one micro-batch."""


def main(args: Sequence[str]) -> None:
    """Compile both forms and print the table."""
    command = cli.parse_with_preset(Aot, args, prog="train_step_kernels", description=(__doc__ or "").strip())
    from sparsezoo_jax.compilation.topologies import open_topology

    topology = open_topology(command.topology, command.mesh.slices)
    import jax

    from sparsezoo_jax.compilation.profile import CLOCK_GHZ
    from sparsezoo_jax.compilation.report import compile_report
    from sparsezoo_jax.pallas_kernels import without_kernels

    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache has no costs
    columns = {}
    for name, form in (("kernels by default", contextlib.nullcontext), ("without kernels", without_kernels)):
        started = time.process_time()
        with form():
            report = compile_report(command.config(), topology, command.step, command.context or command.data.seq_len)
        seconds = time.process_time() - started
        print(f"{name}: {seconds:.0f} s of CPU", file=sys.stderr)
        chip, clock = topology.chip, CLOCK_GHZ.get(topology.generation)
        column = figures(report, clock, chip.bf16_flops / chip.devices, chip.hbm_bandwidth / chip.devices)
        columns[name] = column | {"compiling, s of CPU": seconds}
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    print(f"{command.arch} {command.size}, {command.step} step on {command.topology}, ", end="")
    print(f"{command.data.batch_size} x {command.data.seq_len} tokens, {command.model.layers} layers\n")
    print(f"| | {' | '.join(columns)} | ratio |\n|---|{'---|' * (len(columns) + 1)}")
    for row in rows:
        values = [column.get(row, 0.0) for column in columns.values()]
        shown = ["not known" if value is None else f"{value:,.2f}" for value in values]
        ratio = f"{values[0] / values[1]:.2f}" if all(values) else ""
        print(f"| {row} | {' | '.join(shown)} | {ratio} |")
    print(NOTES)


def figures(report: Report, clock: float | None, peak: float, bandwidth: float) -> dict[str, float | None]:
    """Rows of the table for one form of the step; None: not known.

    Args:
      clock: GHz, or None.
      peak: FLOP/s of a device.
      bandwidth: of its HBM, bytes/s.
    """
    found: dict[str, float | None] = {}
    if not report.memory:
        found["memory needed, GiB (does not fit)"] = None if report.needed is None else report.needed / GIB
        return found
    bounds = sum(max(kernel["flops"] / peak, kernel["bytes"] / bandwidth) for kernel in report.kernels)
    found["scheduled, ms"] = report.cycles / clock / 1e6 if clock and report.cycles else None
    found["kernels' bound, ms"] = 1e3 * bounds
    found["bytes accessed, loop bodies once, GB"] = None if report.xla_bytes is None else report.xla_bytes / 1e9
    found["FLOPs, loop bodies once, T"] = report.flops["xla"] / 1e12 if "xla" in report.flops else None
    for kind in ("arguments", "temporaries", "total", "peak"):
        found[f"memory: {kind}, GiB"] = report.memory[kind] / GIB
    totals: dict[str, Any] = defaultdict(lambda: [0.0, 0.0])
    for item in report.collectives:
        totals[item["kind"]][0] += item["count"]
        totals[item["kind"]][1] += item["moved"] / 1e9
    for kind, (count, sent) in sorted(totals.items()):
        found[f"{kind}: executions"] = count
        found[f"{kind}: GB sent"] = sent
    for kernel in report.kernels:
        found[f"`{kernel['name']}`: calls"] = kernel["count"]
        found[f"`{kernel['name']}`: GB"] = kernel["bytes"] / 1e9
        found[f"`{kernel['name']}`: TFLOP"] = kernel["flops"] / 1e12
    return found


if __name__ == "__main__":
    cli.run(main)
