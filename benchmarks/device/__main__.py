"""Prove the kernels on the accelerator there is, and measure them: `python -m benchmarks.device`; see docs/device.md.

Prints a row as soon as it has one: the machine; values and gradients of every kernel against plain JAX in float32;
their times beside plain JAX and libraries; train steps; decoding. A failure is a row and not the end. Stages are cut to
the time that is left. Exit status 1 if a row failed, 2 without an accelerator.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.rows import Clock, Job, Report, Row, first_line, run_jobs

#: How the time is divided among those of the stages that run.
SHARES = {"values": 3.0, "times": 2.0, "training": 2.5, "decoding": 1.5, "tune": 1.0}


def parsed(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_positive, default=8.0, help="time for everything (8)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help=f"stages ({', '.join(SHARES)}) or parts of rows' names"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows in this file, written after each")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the good rows of this file")
    parser.add_argument("--tune", action="store_true", help="search tiles instead, and print lines for the table")
    parser.add_argument("--table", action="store_true", help="write the tables of all results to docs, and end")
    parser.add_argument(
        "--interpret",
        choices=("gpu", "tpu"),
        help="tiny shapes and interpreted kernels of this platform, on any machine: to try the command itself",
    )
    options = parser.parse_args(args)
    if options.resume is not None and not options.resume.is_file():
        parser.error(f"--resume {options.resume}: no such file")
    return options


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def accelerator() -> tuple[str | None, str]:
    """The accelerator's platform (gpu or tpu) and kind, or None and why there is none."""
    import jax

    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        return None, first_line(error)
    if device.platform == "gpu" and "rocm" in device.client.platform_version.lower():
        return None, f"the kernels are for NVIDIA's GPUs and TPUs, not for {device.device_kind}"
    if device.platform in ("gpu", "tpu"):
        return device.platform, device.device_kind
    return None, f"jax sees only {device.platform}; --interpret tries the command without one"


def stages(platform: str, tiny: bool, tune: bool) -> dict[str, Callable[[], list[Job]]]:
    """What makes the jobs of each stage, in order."""
    import jax

    from benchmarks.device import case, cases, decoding, machine, times, training, values
    from benchmarks.device import tune as tuning

    sizes = case.FULL
    if tiny:
        sizes = case.TINY_TPU if platform == "tpu" else case.TINY
    if tune:
        return {tuning.STAGE: lambda: tuning.jobs(tuning.searches(sizes, platform, tiny), platform, tiny)}
    peaks = machine.peaks_of(jax.local_devices()[0])
    every = cases.cases(sizes)
    timed = [found for found in every if found.cost is not None]
    if tiny:
        every, timed = cases.one_of_each(every), cases.one_of_each(timed)

    def of(stage: Any) -> Any:
        return stage.TINY if tiny else stage.FULL

    return {
        values.STAGE: lambda: values.jobs(every, platform, tiny),
        times.STAGE: lambda: [machine.measured_peaks(tiny), *times.jobs(timed, platform, tiny, peaks)],
        training.STAGE: lambda: training.jobs(of(training), platform, peaks, tiny),
        decoding.STAGE: lambda: decoding.jobs(of(decoding), platform, peaks, tiny),
    }


def main(args: Sequence[str] | None = None) -> int:
    """Run the stages; the exit status."""
    options = parsed(args)
    if options.table:
        from benchmarks.device import results

        results.write()
        return 0
    clock = Clock(60 * options.minutes)
    platform, why = (options.interpret, "") if options.interpret else accelerator()
    if platform is None:
        print(f"benchmarks.device: no accelerator: {why}", file=sys.stderr)
        return 2
    import jax

    from benchmarks.device import dense_attention, machine

    tiny = options.interpret is not None
    report = Report(machine.describe(jax.local_devices()[0]), options.json, options.resume, options.only)
    for row in machine.machine_rows(report.machine):
        report.add(row)
    left = {
        stage: [job for job in make() if report.wanted(stage, job.name)]
        for stage, make in stages(platform, tiny, options.tune).items()
    }
    with dense_attention.installed(f"pallas_{platform}{'_interpret' * tiny}"):
        while left:
            shares = [SHARES[stage] for stage, jobs in left.items() if jobs]
            stage, jobs = next(iter(left.items()))
            del left[stage]
            if jobs:
                run_jobs(report, stage, jobs, clock.part(shares[0] / sum(shares)), ahead=1 if tiny else AHEAD[stage])
    for row in report.rows:
        if "line" in row.figures:
            print(f"    {row.figures['line']}")
    report.add(Row("machine", "end", "ok", {"minutes": options.minutes - clock.left() / 60, "rows": len(report.rows)}))
    return 0 if report.good else 1


#: Jobs that are compiled at a time: where times are taken, only the next one beside the one that runs.
AHEAD = {"values": 6, "times": 2, "training": 2, "decoding": 2, "tune": 2}


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A compilation that the time was up for goes on in its thread, and would be waited for.
    os._exit(status)
