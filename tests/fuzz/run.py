"""Trying an input on a target."""

import contextlib
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.untrusted import printable
from tests.fuzz.targets import TARGETS

#: Seconds of this process's time, so that a busy machine fails nothing.
LIMIT = 20


@contextlib.contextmanager
def limited():
    def stop(*_):
        raise AssertionError(f"took more than {LIMIT} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attempt(name: str, value: Any) -> None:
    """Read `value`: all is well, or a `UserError` that shows as one line. Anything else is a fault."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name].read(folder, value)
    except UserError as error:
        (line,) = f"error: {printable(error)}".splitlines()
        assert line == printable(line, limit=None)
    finally:
        shutil.rmtree(folder)


def property_of(name: str, examples: int, start: int | None = None):
    """A property of hypothesis over `examples` inputs of a target; without `start` the same ones each time."""

    @settings(
        max_examples=examples,
        derandomize=start is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(TARGETS[name].inputs)
    def holds(value):
        attempt(name, value)

    return holds if start is None else seed(start)(holds)
