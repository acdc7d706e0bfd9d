"""Pallas kernels and XLA's own estimate of cycles in a compiled step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sparsezoo_jax.compilation.flops import KernelCall
from sparsezoo_jax.compilation.hlo import Instruction, Module

#: Targets of the custom calls that Pallas makes for TPUs (Mosaic) and GPUs (Triton).
_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True)
class Kernel:
    """All calls of the kernels of one name."""

    name: str
    count: float
    """Calls a step, trips of loops multiplied in."""
    flops: float
    """Of all these calls, by the kernel's own cost estimate."""
    bytes: float
    """Moved to and from HBM, likewise."""


def find_kernels(module: Module, traced: Mapping[str, KernelCall]) -> list[Kernel]:
    """Pallas kernels in one call of the module, by name.

    Args:
      traced: what a call of each kernel takes by the trace. It counts where the compiled program carries no estimate,
        as on GPUs.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for computation, times in module.runs()[0].items():
        for item in module.computations[computation].instructions.values():
            target = re.search(r'custom_call_target="([^"]*)"', item.attributes)
            if item.opcode == "custom-call" and target and target[1] in _TARGETS:
                name = _name(item)
                entry, known = totals[name], traced.get(name, KernelCall(0.0, 0.0))
                flops = _estimate(item, "flops") or known.flops
                moved = _estimate(item, "bytes_accessed") or known.bytes
                for index, value in enumerate((1, flops, moved)):
                    entry[index] += times * value
    return [Kernel(name, *values) for name, values in sorted(totals.items())]


def _name(item: Instruction) -> str:
    """The `name` of the `pallas_call`: the last scope before it, such as "transpose(jvp(NAME))"."""
    scopes = re.search(r'op_name="([^"]*)/pallas_call"', item.attributes)
    words = re.findall(r"[\w.\-]+", scopes[1].rpartition("/")[2]) if scopes else []
    return words[-1] if words else item.name


def _estimate(item: Instruction, what: str) -> float:
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{what}":"(\d+)"', item.attributes)
    return int(found[1]) if found else 0


def scheduled_cycles(module: Module) -> float:
    """Cycles that the TPU compiler's scheduler gives its own operations in one call, trips of loops multiplied in.

    Coarse; Pallas kernels, sorts and transfers between devices have none and count as 0. On a GPU all do.
    """
    total = 0.0
    for computation, times in module.runs()[0].items():
        for item in module.computations[computation].instructions.values():
            found = _CYCLES.search(item.attributes)
            total += times * int(found[1]) if found else 0
    return total
