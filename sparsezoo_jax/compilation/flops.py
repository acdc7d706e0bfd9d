"""FLOPs of the matrix products in a traced function, and what its kernels take; a multiply-add counts 2."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

from jax.interpreters import partial_eval


def live(jaxpr: Any) -> Any:
    """The jaxpr without equations whose results nothing reads, as compilers leave them out.

    Rematerialisation traces some: kernels run again for results that were kept.
    """
    # By the rule of jax 0.10 every kernel stays. Later versions, whose rules take three arguments, have a better one.
    kernels = {
        primitive: _unread
        for primitive, rule in partial_eval.dce_rules.items()
        if primitive.name == "pallas_call" and len(inspect.signature(rule).parameters) == 2
    }
    with mock.patch.dict(partial_eval.dce_rules, kernels):
        return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _unread(used: list[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Which arguments of a kernel are needed, and its equation; None where nothing reads its results."""
    needed = any(used) or bool(eqn.effects)
    return [needed] * len(eqn.invars), eqn if needed else None


def matmul_flops(jaxpr: Any, platform: str) -> float:
    """FLOPs of all matrix products of a jaxpr on all of its devices, trips of loops multiplied in.

    What the backward pass computes again is counted, for it is traced. Products by group (`ragged_dot`) count every row
    once, whatever the form that the compiler gives them. Kernels count what they declare (`pl.CostEstimate`), and their
    products in every step of their grid where they declare nothing. What a `shard_map` calls is one device's part and
    counts for each. Of a choice by platform the branch of `platform` counts, of other branches the costliest. Loops
    whose number of trips the trace does not tell (`while`) count once.

    Args:
      platform: as jax calls it: "cpu", "tpu" or "cuda".
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in _COUNTED:
            total += _COUNTED[name](eqn)
        elif name == "pallas_call" and params["cost_estimate"] is not None:
            total += params["cost_estimate"].flops
        elif name == "cond":
            branches = params["branches"]
            if (platforms := params.get("branches_platforms")) is not None:
                branches = [branches[_branch(platforms, platform)]]
            total += max(matmul_flops(branch.jaxpr, platform) for branch in branches)
        else:
            inner = [matmul_flops(found, platform) for value in params.values() for found in _jaxprs(value)]
            total += _times(eqn) * sum(inner)
    return total


class KernelCall(NamedTuple):
    """What one call of a Pallas kernel takes on one device."""

    flops: float
    bytes: float
    """Moved to and from HBM."""


def kernel_calls(jaxpr: Any, platform: str) -> dict[str, KernelCall]:
    """What the kernels of a jaxpr take for each call, by name; the mean where the calls of a name differ.

    As they declare it (`pl.CostEstimate`). A kernel that declares nothing takes the products in all steps of its grid,
    and the bytes of its arguments and results. Of a choice by platform the branch of `platform` counts.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for times, eqn in _kernels(jaxpr, platform, 1):
        declared = eqn.params["cost_estimate"]
        if declared is None:
            flops = _times(eqn) * matmul_flops(eqn.params["jaxpr"], platform)
            moved = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars))
        else:
            flops, moved = declared.flops, declared.bytes_accessed
        entry = totals[eqn.params["name"] or "pallas_call"]
        for index, value in enumerate((1, flops, moved)):
            entry[index] += times * value
    return {name: KernelCall(flops / calls, moved / calls) for name, (calls, flops, moved) in totals.items()}


def _kernels(jaxpr: Any, platform: str, times: int) -> Iterator[tuple[int, Any]]:
    """The equations that call kernels, and how often each runs."""
    for eqn in jaxpr.eqns:
        params = eqn.params
        if eqn.primitive.name == "pallas_call":
            yield times, eqn
        elif (platforms := params.get("branches_platforms")) is not None:
            yield from _kernels(params["branches"][_branch(platforms, platform)].jaxpr, platform, times)
        else:
            inside = times * (1 if eqn.primitive.name == "shard_map" else _times(eqn))
            for value in params.values():
                for found in _jaxprs(value):
                    yield from _kernels(found, platform, inside)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(left[axis] for axis in contracted) * math.prod(eqn.outvars[0].aval.shape)


def _ragged_dot(eqn: Any) -> float:
    """Each number of the left side meets the columns of one group.

    Columns are the axes of the right side that are neither contracted, nor of the batch, nor the groups themselves.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    met = {*contracted, *batch, *numbers.rhs_group_dimensions}
    left, right = (variable.aval.shape for variable in eqn.invars[:2])
    return 2.0 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in met)


_COUNTED: Mapping[str, Callable[[Any], float]] = {"dot_general": _dot, "ragged_dot_general": _ragged_dot}


def _times(eqn: Any) -> int:
    """How often the jaxprs among an equation's parameters run."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        return math.prod(size for size in grid if isinstance(size, int))
    return 1


def _branch(platforms: tuple[tuple[str, ...] | None, ...], platform: str) -> int:
    """Place of the branch of `platform`: one that names it, or else the one of all others."""
    for i, names in enumerate(platforms):
        if names is not None and platform in names:
            return i
    return platforms.index(None)


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return _jaxprs(value.jaxpr)
    if isinstance(value, tuple | list):
        return [found for item in value for found in _jaxprs(item)]
    return []
