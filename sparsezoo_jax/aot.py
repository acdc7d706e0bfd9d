"""Compile a step for hardware that is not there: `python -m sparsezoo_jax.aot --arch spark --topology v5p:4x4x4`.

Prints memory, FLOPs and communication of the step on each device. All figures are the compiler's or follow from shapes;
none was measured. Exit status 0: the step fits into memory; 1: it does not; 2: bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax import cli, program_cache
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.errors import STRICT, require

if TYPE_CHECKING:
    from sparsezoo_jax.compilation.report import Report

GIB = 2**30


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Aot(RunConfig):
    """Flags of the command."""

    topology: str = "v5e:2x2"
    """Hardware: a TPU generation and its chips (v4:2x2x2, v5e:2x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1), or
    h100:SLICESxHOSTSxGPUS (also a100, l40s). `--mesh.slices` takes so many of it."""
    step: Literal["train", "decode", "prefill"] = "train"
    """What to compile: a train step, one more token with a cache, or the reading of a prompt into an empty cache."""
    context: int | None = None
    """Tokens in the cache of decode and prefill. Default: data.seq_len."""
    matmul_efficiency: float = 1.0
    """Share of the datasheet's peak that matrix products are taken to reach in estimates of the step time."""
    profile: bool = False
    """Also print the operations with the most cycles, statically estimated (TPU, small steps)."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self):
        super().__post_init__()
        share = self.matmul_efficiency
        require(0 < share <= 1, "--matmul-efficiency", share, "must be above 0 and at most 1")

    def config(self) -> RunConfig:
        return RunConfig(**{name: getattr(self, name) for name in RunConfig.__dataclass_fields__})


def main(args: Sequence[str]) -> None:
    """Compile, print the report, and exit with 1 if the step does not fit."""
    command = cli.parse_with_preset(Aot, args, prog="aot", description=(__doc__ or "").strip())
    from sparsezoo_jax.compilation.topologies import open_topology

    topology = open_topology(command.topology, command.mesh.slices)
    from sparsezoo_jax.compilation.report import compile_report

    context = command.context or command.data.seq_len
    # A program for a device that is not there can be written to a file, but not be loaded from one.
    with program_cache.no_programs_kept():
        report = compile_report(command.config(), topology, command.step, context, command.matmul_efficiency)
    profile = None
    if command.profile and report.fits:
        from sparsezoo_jax.compilation.profile import profile_command

        profile = profile_command(args, topology)
    if command.json:
        print(json.dumps(report.as_dict() | ({} if profile is None else {"profile": profile}), indent=2))
    else:
        print_report(report)
        if profile is not None:
            rows = [(row["op"], f"{row['cycles']:,}", f"{row['share']:.1%}") for row in profile["ops"]]
            clock = profile["clock_ghz"]
            time = f" = {profile['cycles'] / clock / 1e6:.3f} ms at an assumed {clock} GHz" if clock else ""
            title = f"Static estimate, {profile['note']}: {profile['cycles']:,} cycles{time} (loop bodies once)"
            cli.print_table(title, ("operation", "cycles", "share"), rows)
    if not report.fits:
        sys.exit(1)


def print_report(report: Report) -> None:
    """Print a report as tables."""
    mesh = " ".join(f"{name}={size}" for name, size in report.mesh.items() if size > 1) or "one device"
    title = f"{report.arch} {report.size}, {report.step} step on {report.topology} ({report.chips} chips; {mesh})"
    rows = [
        *((f"  {name}", f"{size / GIB:.3f}") for name, size in report.arguments.items() if size),
        *((name, f"{size / GIB:.3f}") for name, size in report.memory.items()),
        ("of the device", f"{report.hbm / GIB:.1f}"),
    ]
    if report.needed is not None:
        rows.append(("needed", f"{report.needed / GIB:.1f}"))
    print(title)
    cli.print_table("Memory of each device", ("kind", "GiB"), rows)
    meanings = {
        "sparse": "aimed-at sparsity, no remat",
        "dense": "of the dense decoder of equal parameters",
        "traced": "matrix products as traced",
        "xla": "compiler, loop bodies once",
        "compute": "traced FLOPs at peak",
        "hbm": "arguments in, outputs out",
        "interconnect": "bytes sent over all links",
    }
    flops = [(f"FLOPs, {name}", f"{value / 1e12:,.3f} T", meanings[name]) for name, value in report.flops.items()]
    times = [(f"bound, {name}", f"{value * 1e3:,.3f} ms", meanings[name]) for name, value in report.bounds.items()]
    rest = [
        ("tokens/s/chip", f"{report.tokens_per_second_per_chip:,.0f}", "at the largest bound"),
        ("tokens", f"{report.tokens:,}", "of a step, all devices"),
        ("parameters, activations", f"{report.param_dtype}, {report.dtype}", "as stored and as computed"),
        ("lowering, compiling", f"{report.lower_seconds:.1f}, {report.compile_seconds:.1f} s", "here"),
    ]
    cli.print_table("Work of each device in a step (static)", ("figure", "value", "meaning"), [*flops, *times, *rest])
    if report.traffic is not None:
        print_estimates(report)
        rows = [(name, f"{size / 1e9:,.2f}") for name, size in report.traffic_by_part.items()]
        cli.print_table("HBM traffic of each device in a step (estimated)", ("part", "GB"), rows)
    if report.collectives:
        rows = [
            (x["kind"], x["axes"], f"{x['count']:,.0f}", f"{x['payload'] / 1e9:.3f}", f"{x['moved'] / 1e9:.3f}")
            for x in report.collectives
        ]
        header = ("kind", "mesh axes", "count", "payload GB", "sent GB")
        cli.print_table("Collectives in a step, on each device", header, rows)
    if report.kernels:
        rows = [
            (x["name"], f"{x['count']:,.0f}", f"{x['flops'] / 1e12:.3f}", f"{x['bytes'] / 1e9:.3f}")
            for x in report.kernels
        ]
        cli.print_table("Pallas kernels in a step, by their own estimates", ("name", "calls", "TFLOP", "GB"), rows)
    for note in report.notes:
        print(note)
    if report.unknown_loops:
        print(f"Loops of an unknown number of trips, counted once: {', '.join(report.unknown_loops)}")
    if report.fits:
        print(f"fits: {max(report.memory['total'], report.memory['peak']) / report.hbm:.0%} of the memory")
        return
    cli.print_table("Largest buffers", ("buffer", "GiB"), [(b.name, f"{b.bytes / GIB:.2f}") for b in report.buffers])
    print("does not fit" + "".join(f"\n  try {text}" for text in report.suggestions))


def print_estimates(report: Report) -> None:
    """Print the estimated step time as a table."""
    share = f"{report.matmul_efficiency:.0%} of the peak"
    what = {"compute": f"traced FLOPs at {share}", "hbm": f"{(report.traffic or 0) / 1e9:,.1f} GB to and from HBM"}
    rows = [
        (name, f"{seconds * 1e3:,.3f}", *("",) * len(report.mfu), what.get(name, "bytes sent over all links"))
        for name, seconds in report.parts.items()
    ]
    meaning = {"none": "sum of the above", "half": "mean of sum and longest", "full": "longest of the above"}
    rows += [
        (
            f"step, {name} overlap",
            f"{seconds * 1e3:,.3f}",
            *(f"{x[name]:.1%}" for x in report.mfu.values()),
            meaning[name],
        )
        for name, seconds in report.seconds.items()
    ]
    header = ("part", "ms", *(f"MFU, {name}" for name in report.mfu), "meaning")
    cli.print_table("Estimated time of a step (static)", header, rows)


if __name__ == "__main__":
    cli.run(main)
