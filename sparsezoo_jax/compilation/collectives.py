"""Communication of a compiled step: which collectives, over which mesh axes, how often and how many bytes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsezoo_jax.compilation.hlo import Computation, Instruction, Module, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes."""

    kind: str
    """One of `KINDS`; "all-gather by all-reduce": pieces written into zeros and summed up; or one of `KINDS` and then
    " between slices"."""
    axes: str
    """Mesh axes within which devices exchange data, joined by "+"; "?" if the groups are no such product."""
    count: float
    """Executions a step, trips of loops multiplied in."""
    payload: float
    """Bytes a step of the whole arrays that are gathered, summed up or exchanged, as one device sees them."""
    moved: float
    """Bytes a step that a device sends with a ring algorithm: (n-1)/n of the payload, twice that for an all-reduce."""


def find_collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Collectives of one call of the module, most bytes first.

    An asynchronous collective counts where it starts. Groups number the devices of the mesh in row-major order.

    Args:
      mesh: size of each axis, in the mesh's order.
    """
    runs, _ = module.runs()
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, times in runs.items():
        computation = module.computations[name]
        for item in computation.instructions.values():
            if item.opcode == "send" and "_xla_megascale_transfer_type" in item.attributes:
                kind, payload, slices = _between_slices(computation, item)
                entry = totals[f"{kind} between slices", "data"]
                for index, value in enumerate((1, payload, _moved(kind, payload, slices))):
                    entry[index] += times * value
                continue
            opcode = item.opcode.removesuffix("-start")
            if opcode not in KINDS:
                continue
            group = _group(item, math.prod(mesh.values()))
            axes = _axes(group, mesh)
            group = group or list(
                range(math.prod(mesh.values()))
            )  # of an unknown form: all devices, the most it can be
            seen = set()
            for kind, payload in _payloads(module, computation, item, opcode, len(group)):
                entry = totals[kind, axes]
                entry[0] += times * (kind not in seen)
                entry[1] += times * payload
                entry[2] += times * _moved(kind, payload, len(group))
                seen.add(kind)
    found = [Collective(kind, axes, *values) for (kind, axes), values in totals.items()]
    return sorted(found, key=lambda item: -item.moved)


def _payloads(module: Module, computation: Computation, item: Instruction, opcode: str, size: int) -> Any:
    for name in item.operands:
        operand = computation.instructions.get(name)
        payload = sum(shape_bytes(operand.shape)) if operand else 0
        kind = opcode
        if opcode == "all-gather":
            payload *= size
        elif opcode == "all-reduce" and operand is not None and _writes_a_piece(module, computation, operand):
            kind = "all-gather by all-reduce"
        elif opcode == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"  # the TPU compiler's fusion of an all-reduce and the slice that is kept of it
        yield kind, payload


def _between_slices(computation: Computation, item: Instruction) -> tuple[str, int, int]:
    """Kind, payload and number of slices of a transfer that the hosts make over the data-center network.

    The TPU compiler spells it as a send to and a receive from the host, which does the rest.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', item.attributes)
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', item.attributes)
    operand = computation.instructions.get(item.operands[0])
    slices = len(target[1].split(",")) if target else 2
    return (
        kind[1].lower().replace("_", "-") if kind else "transfer",
        sum(shape_bytes(operand.shape)) if operand else 0,
        slices,
    )


def _writes_a_piece(module: Module, computation: Computation, operand: Instruction) -> bool:
    """Whether an operand is a piece in an array of zeros, as the TPU compiler spells a gather of unaligned pieces."""
    while operand.opcode in ("copy-done", "copy-start", "copy", "bitcast", "get-tuple-element"):
        source = computation.instructions.get(operand.operands[0])
        if source is None:
            return False
        operand = source
    if operand.opcode == "fusion":
        inner = module.computations.get(operand.attribute("calls") or "")
        root = inner.root if inner else None
        if inner is None or root is None:
            return False
        return root.opcode == "dynamic-update-slice" and _is_filled(inner, root.operands[0])
    return operand.opcode == "dynamic-update-slice" and _is_filled(computation, operand.operands[0])


def _is_filled(computation: Computation, name: str) -> bool:
    source = computation.instructions.get(name)
    return source is not None and source.opcode in ("broadcast", "constant")


def _moved(kind: str, payload: float, size: int) -> float:
    if kind == "collective-permute":
        return payload
    share = (size - 1) / size
    return payload * share * (2 if "all-reduce" in kind else 1)


def _group(item: Instruction, devices: int) -> list[int]:
    """The devices of the group that holds device 0 (for a permutation: a pair that moves data)."""
    text = item.attributes
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}(.*?)\}\}", text + "}}")
    if pairs:
        found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text[pairs.start() : pairs.end()])]
        return list(next(((a, b) for a, b in found if a != b), found[0]))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))?\s*\{([^}]*)\}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        kept = re.findall(r"'([^']+)'", named[3])
        if order is None or any(name not in sizes for name in kept):
            return []
        ids = order.reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if name in kept else 0 for name in sizes)].reshape(-1).tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape)[0].tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    return list(range(devices)) if "replica_groups={}" in text else []


def _iota(text: str) -> np.ndarray | None:
    """Device numbers written as "[2,4]T(1,0)", an enumerated array and its transposition."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return None
    shape = [int(n) for n in found[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids


def _axes(group: list[int], mesh: Mapping[str, int]) -> str:
    """Mesh axes along which the members of a group differ; "?" unless the group is all of their product."""
    if not group or max(group) >= math.prod(mesh.values()):
        return "?"
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    varying = [i for i in range(len(mesh)) if len(set(places[i].tolist())) > 1]
    names = [list(mesh)[i] for i in varying]
    full = math.prod(len(set(places[i].tolist())) for i in varying) == len(group)
    return "+".join(names) if names and full else ("none" if not names else "?")
