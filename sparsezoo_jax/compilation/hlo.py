"""Reads the text of a compiled XLA module: computations, how often each runs, and the bytes of shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
#: A kernel's metadata takes lines of its own, of which the last looks like the end of a computation.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n.*?\n\}", re.DOTALL)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    """The result's type as written, a tuple's in parentheses."""
    operands: tuple[str, ...]
    """Names."""
    attributes: str
    """What follows the operands."""
    is_root: bool = False

    def attribute(self, name: str) -> str | None:
        """The value of `name=%value`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """A function of the module."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction | None:
        return next((item for item in self.instructions.values() if item.is_root), None)


@dataclass
class Module:
    """A compiled module."""

    computations: dict[str, Computation]
    entry: str

    def runs(self) -> tuple[dict[str, float], list[str]]:
        """How often each computation runs in one call of the module, and the loops whose number of trips is not known.

        Loops of an unknown number of trips count as one trip; every branch of a conditional counts as taken.
        """
        runs: dict[str, float] = defaultdict(float)
        unknown: list[str] = []

        def visit(name: str, times: float) -> None:
            computation = self.computations.get(name)
            if computation is None:
                return
            runs[name] += times
            for item in computation.instructions.values():
                if item.opcode == "while":
                    trips = self.trip_count(item)
                    if trips is None:
                        unknown.append(item.name)
                    visit(item.attribute("body") or "", times * (1 if trips is None else trips))
                elif item.opcode in ("fusion", "call", "conditional", "async-start"):
                    # The *-update and *-done halves of an asynchronous call name the same computation again.
                    for called in _called(item):
                        visit(called, times)

        visit(self.entry, 1.0)
        return dict(runs), unknown

    def trip_count(self, loop: Instruction) -> int | None:
        """Trips of a while loop: what the compiler noted, or the bound that its condition compares a counter with.

        Loops made from `jax.lax.scan` count from 0 in steps of 1; a condition of another form gives None.
        """
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations.get(loop.attribute("condition") or "")
        root = condition.root if condition else None
        if condition is None or root is None:
            return None
        compare, constants = root, condition.instructions
        operands = root.operands
        if root.opcode == "fusion":
            inner = self.computations.get(root.attribute("calls") or "")
            found = inner.root if inner else None
            if inner is None or found is None:
                return None
            parameters = {
                item.name: root.operands[int(item.operands[0])]
                for item in inner.instructions.values()
                if item.opcode == "parameter"
            }
            operands = tuple(parameters.get(name, name) for name in found.operands)
            compare, constants = found, {**inner.instructions, **condition.instructions}
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        bounds = [constants[name] for name in operands[1:] if name in constants]
        if len(bounds) != 1 or bounds[0].opcode != "constant":
            return None
        return int(bounds[0].operands[0])


def _called(item: Instruction) -> list[str]:
    names = [] if item.opcode == "while" else _CALLED.findall(re.sub(r"to_apply=%?[\w.\-]+", "", item.attributes))
    if item.opcode == "call":
        names = _CALLED.findall(item.attributes)
    for branches in _BRANCHES.findall(item.attributes):
        names.extend(part.strip().lstrip("%") for part in branches.split(","))
    return names


def shape_bytes(shape: str) -> list[int]:
    """Bytes of each array in a type as written; layouts and memory spaces are ignored, padding of tiles too."""
    sizes = []
    for dtype, dimensions in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
        if dtype in _BYTES:
            count = 1
            for side in dimensions.split(","):
                count *= int(side) if side else 1
            sizes.append(int(count * _BYTES[dtype]))
    return sizes


def parse(text: str) -> Module:
    """Parse `compiled.as_text()`.

    Raises:
      ValueError: no entry computation, so this is no such text.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _KERNEL_METADATA.sub("", text).splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            item = _instruction(line)
            if item is not None:
                current.instructions[item.name] = item
    if entry is None:
        raise ValueError("no ENTRY computation in the text of the module")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    arguments = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing])
    # Operands may be written with their types: the name is the last word of each.
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(arguments) if part.split())
    return Instruction(found[2], rest[:opening], shape, operands, rest[closing + 1 :], bool(found[1]))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]
