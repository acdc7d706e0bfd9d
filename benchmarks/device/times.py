"""Times of the kernels beside plain JAX and the libraries, and their share of what the device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from benchmarks.device.case import Case, Cost, Draw
from benchmarks.device.machine import Peaks
from benchmarks.device.rows import ABSENT, FAILED, OK, Job, Row, first_line
from benchmarks.device.values import form_of
from benchmarks.timing import interleaved

STAGE = "times"


def jobs(cases: list[Case], platform: str, interpret: bool, peaks: Peaks) -> list[Job]:
    """Of the cases that have a cost: forward, and forward with backward."""
    found = []
    for case in cases:
        if case.cost is None:
            continue
        forms: dict[str, Callable] = {"kernel": partial(_value, case, form_of(case, platform, interpret))}
        forms["xla"] = partial(_value, case, "xla")
        for name, rival in case.rivals.items():
            where, _, rest = name.rpartition(": ")
            if where in ("", platform) and not (interpret and where):
                forms[rest] = rival
        if not (interpret and case.backward):  # to try the command, the gradient is enough
            found.append(_job(case, case.name, forms, case.cost, peaks, interpret))
        if case.backward:
            cost = Cost(case.backward * case.cost.flops, case.backward * case.cost.bytes)
            forms = {name: _with_gradient(case, form) for name, form in forms.items() if not name.startswith("lax.")}
            found.append(_job(case, f"{case.name}, forward and backward", forms, cost, peaks, interpret))
    return found


def _value(case: Case, form: str, *arguments: Any) -> jax.Array:
    return case.call(form, *arguments).y


def _with_gradient(case: Case, function: Callable) -> Callable:
    """Y and the gradients of a form, as in a train step."""

    def called(*arguments: Any):
        def of_differentiable(*some):
            mixed = list(arguments)
            for i, x in zip(case.differentiable, some, strict=True):
                mixed[i] = x
            return function(*mixed)

        y, pull = jax.vjp(of_differentiable, *(arguments[i] for i in case.differentiable))
        return y, pull(y)

    return called


def _job(case: Case, name: str, forms: dict[str, Callable], cost: Cost, peaks: Peaks, interpret: bool) -> Job:
    def compiled() -> Callable[[], Iterator[Row]]:
        draw = Draw()
        layers = [list(case.make(draw)) for _ in range(case.chained)]
        with ThreadPoolExecutor(max_workers=len(forms)) as pool:
            programs = {form: pool.submit(_program, function, layers) for form, function in forms.items()}

        def run() -> Iterator[Row]:
            ready, failed = {}, {}
            for form, future in programs.items():
                try:
                    program = future.result()
                    jax.block_until_ready(program(layers))
                    ready[form] = partial(program, layers)
                except Exception as error:
                    failed[form] = error
            # A call of a few microseconds is timed many times at once: sending it takes as long as it does.
            repeats = {form: 1 if interpret else _repeats(call) for form, call in ready.items()}
            rounds = {form: partial(_repeat, call, repeats[form]) for form, call in ready.items()}
            times = interleaved(rounds, 2 if interpret else 15)
            medians = {form: statistics.median(t) / repeats[form] / len(layers) for form, t in times.items()}
            bound = peaks.seconds(*cost)
            for form in forms:
                row = f"{name}: {form}"
                if form in failed:
                    status = FAILED if form in ("kernel", "xla") else ABSENT
                    yield Row(STAGE, row, status, note=first_line(failed[form]), job=name)
                    continue
                found = {"ms": 1e3 * medians[form]}
                if bound is not None:
                    found |= {"bound ms": 1e3 * bound, "of bound": bound / medians[form]}
                if "xla" in medians:
                    found["x xla"] = medians["xla"] / medians[form]
                yield Row(STAGE, row, OK, found, job=name)

        return run

    return Job(name, compiled)


def _program(function: Callable, layers: list) -> Any:
    """All layers, each on an input that depends on the one before."""

    def run(layers):
        if len(layers) == 1:
            return function(*layers[0])
        x = layers[0][0]
        for _, *rest in layers:
            x = x + (1e-6 * function(x, *rest)).astype(x.dtype)
        return x

    return jax.jit(run).lower(layers).compile()


def _repeat(call: Callable[[], Any], times: int) -> Any:
    found = None
    for _ in range(times):
        found = call()
    return found


def _repeats(call: Callable[[], Any], seconds: float = 0.005) -> int:
    """Calls that take so long."""
    started = time.perf_counter()
    jax.block_until_ready(_repeat(call, 3))
    return max(1, min(100, round(3 * seconds / (time.perf_counter() - started))))
