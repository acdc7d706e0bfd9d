"""What NVIDIA's assembler says of the kernels of a program compiled for a GPU, taken in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsezoo_jax.errors import UserError

#: Of an H100: 32-bit registers, threads and bytes of shared memory of a multiprocessor. CUDA's tables for compute
#: capability 9.0; a block takes 1 KiB of shared memory for itself.
REGISTERS, THREADS, SHARED, BLOCK_SHARED = 65_536, 2048, 233_472, 1024


@dataclass(frozen=True)
class Kernel:
    """One kernel as it would be launched."""

    name: str
    blocks: int
    """Of the whole grid."""
    threads: int
    """Of a block."""
    registers: int
    """Of a thread."""
    shared: int
    """Bytes of a block."""
    spills: int
    """Bytes that a thread stores to and loads from memory for want of registers."""

    @property
    def occupancy(self) -> float:
        """Share of an H100 multiprocessor's threads that can be resident at once."""
        # Registers are handed out to warps in units of 256.
        per_warp = -(-self.registers * 32 // 256) * 256
        warps = -(-self.threads // 32)
        fitting = min(REGISTERS // (per_warp * warps), SHARED // (self.shared + BLOCK_SHARED), THREADS // self.threads)
        return min(fitting, 32) * self.threads / THREADS


def assembler() -> Path:
    """The program `ptxas`.

    Raises:
      UserError: the package that has it is not installed.
    """
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (path := Path(folder) / "cuda_nvcc/bin/ptxas").exists():
            return path
    raise UserError("registers of GPU kernels need ptxas: pip install nvidia-cuda-nvcc-cu12")


def kernels(command: Sequence[str]) -> list[list[Kernel]]:
    """The kernels of each program that `command` compiles for a GPU, in the order in which they are launched.

    Programs are in the order in which they are compiled; one without kernels is left out.

    Raises:
      UserError: it failed, or there is no `ptxas`.
    """
    assembler()
    with tempfile.TemporaryDirectory() as folder:
        # newer compilers write a kernel only if it matches the expression
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_emitter_re=.*".strip()
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            # While it writes so much down, LLVM names the functions of call stacks that nobody sees: most of the time.
            "LLVM_DISABLE_SYMBOLIZATION": "1",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the compiler ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
        found = []
        # module_0001 and so on are in all names of a program's files.
        for launches in sorted(Path(folder).glob("*thunk_sequence.txt")):
            module = launches.name.partition(".")[0]
            reports = [_assembled(path) for path in sorted(Path(folder).glob(f"{module}.*.ptx"))]
            found.append(summarise(launches.read_text(), "".join(reports)))
    return [program for program in found if program]


def _assembled(path: Path) -> str:
    """What the assembler says of a file of PTX, in the order of its kernels."""
    if not path.stat().st_size:
        return ""
    target = re.findall(r"^\.target (\w+)", path.read_text(), re.MULTILINE)[0]
    command = [str(assembler()), "-v", f"-arch={target}", str(path), "-o", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def summarise(launches: str, assembled: str) -> list[Kernel]:
    """Join XLA's list of launches with the assembler's report, by kernel."""
    reports = {}
    for report in assembled.split("Compiling entry function ")[1:]:
        name = report.split("'")[1]
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
        reports[name] = (int(re.findall(r"Used (\d+) registers", report)[0]), spills)
    found = []
    pattern = r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]\s+shared_memory: (\d+) bytes"
    for name, *numbers in re.findall(pattern, launches):
        a, b, c, x, y, z, shared = map(int, numbers)
        registers, spills = reports[name]
        found.append(Kernel(name, a * b * c, x * y * z, registers, shared, spills))
    return found
