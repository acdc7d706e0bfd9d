"""Grouped products and attention beside those of other libraries, as compilers see them: `python -m
benchmarks.compiled_peers --peer PYTHON`, with a Python that has tokamax. No accelerator is needed, and nothing is
measured on one.

Every program is compiled in a process of its own: ours and XLA's by this Python, tokamax's and cuDNN's by the other one
(`compiled_worker.py`), with

    pip install tokamax 'jax[tpu]==VERSION' jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION nvidia-cuda-nvcc-cu12

and nvidia-cudnn-cu12 for cuDNN. Newer releases of tokamax want Python 3.12. Its attention on TPUs is in
`benchmarks.attention_bundles --tokamax PYTHON`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.compiled_worker import Job, compile_for, program, report
from benchmarks.shapes import MOE_FFN, TPUS
from sparsezoo_jax.compilation.ptx import Kernel, kernels
from sparsezoo_jax.compilation.topologies import lowering_for, open_topology, prepare_environment
from sparsezoo_jax.compilation.traffic import hbm_bytes
from sparsezoo_jax.errors import UserError

GPU = "h100"
OURS, XLA = "ours", "XLA"
NOTES = """
Bytes are the operands and results of every operation, of kernels for TPUs what they declare, which may count an array
once or for every tile that reads it. Times are bounds: bytes by the memory's bandwidth, FLOPs (the compiler's count,
which there is for TPUs alone) by the matrix units' peak. Kernels are those that hold products; occupancy is the share
of a multiprocessor's threads that fits. cuDNN's kernels are chosen on a device: its calls have no workspace here.
"""


class Case(NamedTuple):
    """Shapes that all forms are compiled for."""

    name: str
    shape: tuple[int, ...]
    attention: bool = False
    softcap: float | None = None


TOKENS = 4096
#: Rows are pairs of token and expert; the product is that of the first matrices of a layer.
PRODUCTS = [
    Case("48 experts 2,048 x 1,408, 6 a token", (6 * TOKENS, 2048, 48, 1408)),
    Case("1,024 experts 1,792 x 64, 16 a token", (16 * TOKENS, MOE_FFN["moe_xlarge"][0], 1024, 64)),
]
#: Tokens, heads, heads of keys, width, as in `benchmarks.gpu_kernels`.
ATTENTIONS = [
    Case("8/4 heads of 256, cap 50", (8192, 8, 4, 256), True, 50.0),
    Case("32/8 heads of 128", (8192, 32, 8, 128), True),
]


def forms(target: str, case: Case) -> list[tuple[str, tuple[int, ...] | None]]:
    """What a case is compiled in, with tiles where tokamax is told of some."""
    if case.attention:
        return [(OURS, None), ("tokamax triton", None), ("tokamax mosaic", None), ("cudnn", None)]
    if target == GPU:
        return [(OURS, None), (XLA, None), ("tokamax triton", None), ("tokamax mosaic", None)]
    peers = [("tokamax mosaic", None), ("tokamax mosaic", (512, 1024, 1024)), ("tokamax mosaic_tpu_v2", None)]
    return [(OURS, None), (XLA, None), *peers]


def topology_arguments(target: str) -> dict[str, Any]:
    """What jax's `get_topology_desc` needs to open one chip."""
    if target == GPU:
        config = resources.files("sparsezoo_jax.compilation").joinpath(f"{GPU}.textproto").read_text()
        return {"platform": "cuda", "target_config": config, "topology": "1x1x1"}
    return {"platform": "tpu", "topology_name": TPUS[target], "chips_per_host_bounds": (1, 1, 1)}


def compile_here(target: str, job: Job) -> None:
    """Compile our form, or XLA's, in this process."""
    import jax

    from sparsezoo_jax.pallas_kernels import flash_attention
    from sparsezoo_jax.pallas_kernels.ragged import ragged_matmul
    from sparsezoo_jax.pallas_kernels.spark_attention import Visibility

    signal.alarm(int(60 * job.minutes))

    def attend(q, k, v):
        visible = Visibility.of_tokens(jax.numpy.ones(q.shape[:2], jax.numpy.int32))
        return flash_attention(q, k, v, visible, softcap=job.softcap)

    ours = attend if job.attention else ragged_matmul
    device = open_topology(TPUS.get(target, f"{target}:1x1x1")).devices[0]
    with lowering_for(device):
        report(job, compile_for(device, *program(job, jax.lax.ragged_dot if job.form == XLA else ours)))


def launches_of_mosaic(folder: Path) -> list[Kernel]:
    """The kernels that Mosaic's compiler for GPUs has dumped, in the order of their compilation."""
    found = []
    for path in sorted(folder.glob("*.ptxas"), key=lambda path: int(path.stem.rsplit("_", 1)[1])):
        said = path.read_text()
        registers = int(re.findall(r"Used (\d+) registers", said)[-1])
        spills = re.findall(r"^ .*?(\d+) bytes spill stores, (\d+) bytes spill loads", said, re.MULTILINE)
        with path.with_suffix(".mlir-passes.log").open() as passes:  # up to 100 MB, of which the start is enough
            launch = next(line for line in passes if "gpu.launch" in line)
        # Sizes are constants, which are named by their values.
        blocks, threads = (
            [int(size) for size in re.findall(r"= %c(\d+)", part)]
            for part in re.findall(r"(?:blocks|threads)\([^)]*\) in \(([^)]*)\)", launch)
        )
        shared = re.search(r"dynamic_shared_memory_size %c(\d+)", launch)
        found.append(
            Kernel(
                path.stem.rsplit("_", 1)[0],
                math.prod(blocks),
                math.prod(threads),
                registers,
                int(shared[1]) if shared else 0,
                sum(map(int, spills[-1])) if spills else 0,
            )
        )
    return found


class Compiled(NamedTuple):
    """What is known of a program."""

    answer: dict[str, Any]
    """As `compiled_worker.report` writes it, or "failed" alone."""
    kernels: list[Kernel]
    """Of a GPU, those with products."""
    launches: int
    """Of a GPU."""


def compiled(target: str, job: Job, peer: str | None) -> Compiled:
    """Compile a job in another process: ours or XLA's with this Python."""
    start = [sys.executable, "-m", "benchmarks.compiled_peers", "--compile-only", target]
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # a program from the cache has no costs
    if job.form not in (OURS, XLA):
        assert peer is not None
        start = [peer, str(Path(__file__).parent / "compiled_worker.py")]
        environment["PYTHONPATH"] = ""  # that Python has its own packages
    with tempfile.TemporaryDirectory() as folder:
        job = dataclasses.replace(job, answer=f"{folder}/answer.json")
        command, own = [*start, json.dumps(dataclasses.asdict(job))], Path(folder) / "mosaic"
        own.mkdir()
        triton: list[Kernel] = []
        try:
            with mock.patch.dict(os.environ, environment | {"MOSAIC_GPU_DUMP_TO": str(own)}):
                if target == GPU:
                    triton = [kernel for found in kernels(command) for kernel in found]
                else:
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise UserError(
                            f"the compiler ended with status {done.returncode}: {done.stderr.strip()[-200:]}"
                        )
            answer = json.loads(Path(job.answer).read_text())
        except UserError as error:
            ended = f"does not compile in {job.minutes:.0f} minutes" if "status -14" in str(error) else str(error)
            return Compiled({"failed": ended}, [], 0)
        mosaic = launches_of_mosaic(own)
        # XLA's own kernels are named after fusions, copies and the like.
        made = [kernel for kernel in triton if not re.search("fusion|wrapped|copy|transpose|memset", kernel.name)]
        return Compiled(answer, made + mosaic, len(triton) + len(mosaic))


def rows(target: str, case: Case, job: Job, peer: str | None) -> Iterator[str]:
    """The lines of one program."""
    found = compiled(target, job, peer)
    tiles = f", tiles {' x '.join(map(str, job.tiles))}" if job.tiles else ""
    shown = f"| {case.name}{' and its gradient' * job.gradient} | {job.form}{tiles} | "
    if why := found.answer.get("failed"):
        yield f"{shown}{' '.join(why.split())} |"
        return
    chip = open_topology(TPUS.get(target, f"{target}:1x1x1")).chip
    size, flops = hbm_bytes(found.answer["text"]), found.answer["flops"]
    shown += f"{size / 1e6:,.0f} | {found.answer['temporaries'] / 1e6:,.1f} | "
    shown += f"{1e3 * size / chip.hbm_bandwidth * chip.devices:.3f} | "
    if target != GPU:
        yield f"{shown}{flops / 1e9:,.0f} | {1e3 * flops / chip.bf16_flops * chip.devices:.3f} |"
        return
    shown += f"{found.launches or ''} | "
    if not found.kernels:
        yield shown
    for kernel in found.kernels:
        yield (
            f"{shown}`{kernel.name}` | {kernel.blocks:,} x {kernel.threads} | {kernel.registers} | "
            f"{kernel.shared / 1e3:.1f} | {kernel.spills:,} | {kernel.occupancy:.2f} |"
        )
        shown = "| | | | | | | "


def main() -> None:
    """Print a table for each target, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with tokamax; without it only ours and XLA's are compiled")
    parser.add_argument("--target", nargs="*", default=[GPU, "v5p", "v6e"], choices=[GPU, *TPUS])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--forms", nargs="*", help="these alone: ours, XLA, 'tokamax triton', cudnn and so on")
    parser.add_argument("--minutes", type=float, default=10, help="for one compilation")
    parser.add_argument("--compile-only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare_environment()
    if options.compile_only:
        target, job = options.compile_only
        compile_here(target, Job(**json.loads(job)))
        return
    for target in options.target:
        last = "GFLOP | by FLOPs ms |"
        if target == GPU:
            last = "launches | kernel | blocks x threads | registers | shared kB | spilled bytes | occupancy |"
        print(f"\n{target}\n\n| program | form | MB | temporaries MB | by bytes ms | {last}")
        print("|" + "---|" * (5 + last.count("|")))
        for case in PRODUCTS + (ATTENTIONS if target == GPU else []):
            for form, tiles in forms(target, case):
                if options.only not in case.name or form not in (options.forms or [form]):
                    continue
                if form not in (OURS, XLA) and options.peer is None:
                    continue
                for gradient in (False, True):
                    job = Job(
                        form, case.shape, case.softcap, gradient, topology_arguments(target), "", case.attention, tiles,
                        options.minutes,
                    )  # fmt: skip
                    for row in rows(target, case, job, options.peer):
                        print(row, flush=True)
    print(NOTES)


if __name__ == "__main__":
    main()
