"""Bytes that a compiled TPU program moves to and from HBM, read from its text."""

from __future__ import annotations

import re

from sparsezoo_jax.compilation.hlo import Instruction, parse, shape_bytes

#: Move nothing by themselves, or were counted where they started.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "copy-done",
    "slice-done",
    "after-all",
    "partition-id",
)
_ARRAY = re.compile(r"[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?")
_ESTIMATE = re.compile(r'"bytes_accessed":"(\d+)"')


def hbm_bytes(text: str) -> int:
    """Bytes that the entry computation of `compiled.as_text()` reads from and writes to HBM.

    Arrays that the compiler keeps in VMEM (memory space 1) are not counted, which `cost_analysis` does, and more than
    once where it prefetches them. Every operation counts its whole operands, kernels what they declare; loops and other
    calls of computations count as one operation.
    """
    entry = parse(text)
    instructions = entry.computations[entry.entry].instructions
    return sum(_moved(item, instructions) for item in instructions.values() if item.opcode not in _FREE)


def _moved(item: Instruction, instructions: dict[str, Instruction]) -> int:
    operands = [instructions[name].shape for name in dict.fromkeys(item.operands) if name in instructions]
    estimate = _ESTIMATE.search(item.attributes) if item.opcode == "custom-call" else None
    if estimate:
        shapes = [item.shape, *operands]
        return max(0, int(estimate[1]) - sum(sum(shape_bytes(shape)) - _in_hbm(shape) for shape in shapes))
    if item.opcode == "slice-start":
        # Its result is the whole source, the piece and a semaphore; only the piece is read.
        piece = _ARRAY.findall(item.shape)[1]
        return sum(shape_bytes(piece)) + _in_hbm(piece)
    # The result of a copy that starts is its destination, its source again and a semaphore.
    result = _ARRAY.findall(item.shape)[0] if item.opcode == "copy-start" else item.shape
    return _in_hbm(result) + sum(map(_in_hbm, operands))


def _in_hbm(shape: str) -> int:
    return sum(sum(shape_bytes(array)) for array in _ARRAY.findall(shape) if "S(" not in array)
