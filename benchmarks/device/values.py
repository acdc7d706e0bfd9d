"""Values and gradients of every kernel against plain JAX in float32, and against themselves bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.case import F32, TOLERANCES, Case, Draw, Result
from benchmarks.device.rows import OK, WRONG, Job, Row

STAGE = "values"
#: The largest single error, over the reference's size and its root mean square, in tolerances.
WORST = 16
#: Of all that could be selected, how much may be selected otherwise: scores are made in other tilings, and their last
#: bits differ.
SELECTED_OTHERWISE = 1e-4


def jobs(cases: list[Case], platform: str, interpret: bool) -> list[Job]:
    """One for each case that the platform has a kernel for."""
    return [
        Job(case.name, partial(_compiled, case, form_of(case, platform, interpret), platform in case.poisoned_on))
        for case in cases
    ]


def form_of(case: Case, platform: str, interpret: bool) -> str:
    """The implementation to try."""
    return case.kernel or f"pallas_{platform}{'_interpret' * interpret}"


def both(case: Case, form: str) -> Callable[..., tuple[Result, tuple[jax.Array, ...]]]:
    """The result of a form, and its gradients for that of y, as a function of (g, *arguments)."""

    def function(g, *arguments):
        def of_differentiable(*some):
            mixed = list(arguments)
            for i, x in zip(case.differentiable, some, strict=True):
                mixed[i] = x
            found = case.call(form, *mixed)
            return found.y, found.selected

        if not case.differentiable:
            return case.call(form, *arguments), ()
        y, pull, selected = jax.vjp(of_differentiable, *(arguments[i] for i in case.differentiable), has_aux=True)
        return Result(y, selected), pull(g.astype(y.dtype))

    return function


def _compiled(case: Case, form: str, poisoned: bool) -> Callable[[], Iterator[Row]]:
    arguments = list(case.make(Draw()))
    wide = jax.tree.map(lambda x: x.astype(F32) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)
    given = list(case.poisoned(*arguments)) if poisoned and case.poisoned is not None else arguments
    shape = jax.eval_shape(lambda *a: case.call("xla", *a), *arguments).y
    g = Draw(1)(*shape.shape, dtype=case.dtype)
    # Products of float32 are otherwise rounded to 10 bits on a GPU and 8 on a TPU.
    precision = "highest" if case.dtype == F32 else None
    with jax.default_matmul_precision(precision):
        kernel = jax.jit(both(case, form)).lower(g, *given).compile()
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(both(case, "xla")).lower(g.astype(F32), *wide).compile()

    def run() -> Iterator[Row]:
        started = time.perf_counter()
        first, again = kernel(g, *given), kernel(g, *given)
        expected = reference(g.astype(F32), *wide)
        agree, otherwise = _agreement(case, first[0], expected[0])
        if case.differentiable and otherwise:
            # Gradients of rows that select something else are something else.
            kept = jnp.where(agree, g, 0)
            first, again = kernel(kept, *given), kernel(kept, *given)
            expected = reference(kept.astype(F32), *wide)
        same = _identical(first, again)
        y = _errors(first[0].y, expected[0].y, jnp.broadcast_to(agree, g.shape))
        gradients = [
            _errors(x, wanted, jnp.ones(x.shape, bool)) for x, wanted in zip(first[1], expected[1], strict=True)
        ]
        yield _row(case, form, y, gradients, float(otherwise), same, time.perf_counter() - started)

    return run


def _row(case: Case, form: str, y, gradients, otherwise: float, same: bool, seconds: float) -> Row:
    tolerance = TOLERANCES[jnp.dtype(case.dtype)]
    found = {"form": form, "error": y[0], "worst": y[1]}
    if gradients:
        found |= {"gradient": max(e[0] for e in gradients), "gradient worst": max(e[1] for e in gradients)}
    found |= {"tolerance": tolerance, "selected otherwise": otherwise, "s": seconds}
    faults = []
    for name, (error, worst) in [("y", y), *((f"gradient {i}", e) for i, e in enumerate(gradients))]:
        if not error <= tolerance:  # NaN too
            faults.append(f"{name}: error {error:.2g}")
        elif not worst <= WORST * tolerance:
            faults.append(f"{name}: worst error {worst:.2g}")
    if otherwise > SELECTED_OTHERWISE:
        faults.append(f"{otherwise:.2g} selected otherwise")
    if not same:
        faults.append("a second call gave other bits")
    return Row(STAGE, case.name, WRONG if faults else OK, found, "; ".join(faults))


def _agreement(case: Case, found: Result, expected: Result) -> tuple[Any, float]:
    """The rows of y that select the same (or as many), and the share of all that could be selected that differs."""
    if found.selected is None or expected.selected is None:
        return jnp.ones((1,), bool), 0.0
    if found.selected.dtype == jnp.bool_:
        differs = found.selected != expected.selected
        return ~jnp.any(differs, axis=-1, keepdims=True), float(jnp.mean(differs))
    apart = jnp.abs(found.selected - expected.selected)
    return (apart == 0)[..., None], float(jnp.mean(apart) / case.of)


def _errors(found: jax.Array, expected: jax.Array, where: jax.Array) -> tuple[float, float]:
    error, worst = _jitted_errors(found, expected, where)
    return float(error), float(worst)


@jax.jit
def _jitted_errors(found, expected, where):
    """Root mean square of the error over the reference's, and the largest error over that plus the value there."""
    count = jnp.maximum(jnp.sum(where), 1)
    expected = jnp.where(where, expected.astype(F32), 0)
    error = jnp.where(where, found.astype(F32) - expected, 0)
    size = jnp.sqrt(jnp.sum(jnp.square(expected)) / count)
    size = jnp.where(size == 0, 1, size)
    return jnp.sqrt(jnp.sum(jnp.square(error)) / count) / size, jnp.max(jnp.abs(error) / (jnp.abs(expected) + size))


def _identical(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bool(jnp.array_equal(x, y, equal_nan=bool(jnp.issubdtype(x.dtype, jnp.floating)))) for x, y in pairs)
