"""Bytes that a compiled TPU program moves to and from HBM, read from its text."""

from __future__ import annotations

import re
from collections import defaultdict

from sparsezoo_jax.compilation.hlo import Computation, Instruction, Module, parse, shape_bytes

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


#: Their work is that of the computations that they call.
_CALLS = ("while", "call", "conditional")
#: The first half of an asynchronous operation was counted; the halves of transfers to other devices move nothing here.
_DONE = ("-done", "-update")


#: Scopes of a model and its train step (`jax.named_scope`), which the names of their operations hold.
PARTS = ("embedding", "layers", "attention", "ffn", "logits", "loss", "optimizer")


def step_traffic(module: Module) -> dict[str, float]:
    """Estimates of the bytes that one call of a compiled module reads from and writes to HBM, on one device, by part.

    A part is the innermost of `PARTS` that an operation's name holds, and "NAME, backward" what is its gradient or
    recomputed for it; "rest" has none. A fusion has one name, and belongs to one part. An operation without a name is
    the part's whose loop it is in.

    Trips of loops are multiplied in. Every operation reads its operands and writes its result once, as far as they are
    in HBM; of an array that it slices, or updates in place, only the part. Kernels count what they declare. It is no
    bound: an operation that reads an array twice moves more, and one that stops early (a kernel that skips tiles) less
    than it declares.
    """
    runs, _ = module.runs()
    fused = {
        item.attribute("calls")
        for computation in module.computations.values()
        for item in computation.instructions.values()
        if item.opcode in ("fusion", "async-start")
    }
    loops = {
        item.attribute("body"): (item, computation.name)
        for computation in module.computations.values()
        for item in computation.instructions.values()
        if item.opcode == "while"
    }

    def part(item: Instruction, computation: str) -> str:
        found = _part_of(item)
        if found is None and computation in loops:
            return part(*loops[computation])
        return found or "rest"

    reader, totals = _Reader(module), defaultdict[str, float](float)
    for name, times in runs.items():
        if name not in fused:
            computation = module.computations[name]
            for item in computation.instructions.values():
                moved = times * reader.moved(item, computation)
                if moved:
                    totals[part(item, name)] += moved
    return dict(sorted(totals.items(), key=lambda entry: -entry[1]))


def _part_of(item: Instruction) -> str | None:
    """The part of an operation by its name; None: it has none, or none of a part."""
    found = re.search(r'op_name="([^"]*)"', item.attributes)
    words = re.findall(r"[\w\-]+", found[1]) if found else []
    parts = [word for word in words if word in PARTS]
    if not parts:
        return None
    return f"{parts[-1]}, backward" if {"transpose", "rematted_computation"} & set(words) else parts[-1]


class _Reader:
    """What operations read and write, fusions looked into."""

    def __init__(self, module: Module):
        self._module = module
        self._users: dict[str, dict[str, list[Instruction]]] = {}

    def moved(self, item: Instruction, computation: Computation) -> float:
        """Bytes that an operation of an entry, a loop's body or a branch moves."""
        opcode, instructions = item.opcode, computation.instructions
        if opcode in _FREE or opcode in _CALLS or opcode.endswith(_DONE):
            return 0
        if opcode in ("custom-call", "copy-start", "slice-start"):
            return _moved(item, instructions)
        if opcode.endswith("-start"):  # its result holds its operands again
            return _in_hbm(item.shape)
        read = 0.0
        for place, name in enumerate(item.operands):
            if name in instructions and name not in item.operands[:place]:
                whole = _in_hbm(instructions[name].shape)
                read += min(whole, self._part(item, place)) if whole else 0
        return read + (min(_in_hbm(item.shape), self._written(item, computation)))

    def _part(self, item: Instruction, place: int) -> float:
        """Bytes that an operation reads of one of its operands, wherever that is; infinite: all of it."""
        if place == 0 and item.opcode in ("dynamic-slice", "slice", "gather"):
            return sum(shape_bytes(item.shape))
        if place == 0 and item.opcode == "dynamic-update-slice":
            return 0
        inner = self._module.computations.get(item.attribute("calls") or "") if item.opcode == "fusion" else None
        if inner is None:
            return float("inf")
        parameter = next(
            (x for x in inner.instructions.values() if x.opcode == "parameter" and x.operands == (str(place),)), None
        )
        return self._read(inner, parameter.name) if parameter else float("inf")

    def _read(self, computation: Computation, name: str) -> float:
        """Bytes that a fused computation reads of one of its values."""
        users = self._users.get(computation.name)
        if users is None:
            users = self._users[computation.name] = defaultdict(list)
            for item in computation.instructions.values():
                for operand in dict.fromkeys(item.operands):
                    users[operand].append(item)
        total = 0.0
        for user in users[name]:
            if user.opcode == "bitcast":
                total += self._read(computation, user.name)
            else:
                total += max(self._part(user, i) for i, operand in enumerate(user.operands) if operand == name)
        return total

    def _written(self, item: Instruction, computation: Computation) -> float:
        """Bytes that an operation writes, wherever its result is."""
        if item.opcode == "dynamic-update-slice":
            update = computation.instructions.get(item.operands[1])
            return sum(shape_bytes(update.shape)) if update else float("inf")
        if item.opcode in ("bitcast", "tuple"):
            sources = [computation.instructions.get(name) for name in item.operands]
            return sum(float("inf") if x is None else self._written(x, computation) for x in sources)
        inner = self._module.computations.get(item.attribute("calls") or "") if item.opcode == "fusion" else None
        if inner is not None and inner.root is not None:
            return self._written(inner.root, inner)
        return sum(shape_bytes(item.shape))


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
