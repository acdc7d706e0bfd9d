import subprocess
import sys

import pytest

from sparsezoo_jax.training.phases import Phases, Watchdog, goodput


def test_seconds_are_counted_once_and_in_the_innermost_phase(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sparsezoo_jax.training.phases.time.monotonic", lambda: now[0])
    phases = Phases()
    now[0] += 1
    with phases("evaluation"):
        now[0] += 2
        with phases("data"):
            now[0] += 4
        assert phases.current == "evaluation"
        now[0] += 8
    now[0] += 16
    assert phases.current == "other"
    found = {name: seconds for name, seconds in phases.totals().items() if seconds}
    assert found == {"other": 17.0, "evaluation": 10.0, "data": 4.0}
    assert goodput({"step": 6.0, "data": 4.0}, lost=1.0) == pytest.approx(0.5)


STUCK = """
import sys, threading, time
from sparsezoo_jax.training.phases import Phases, Watchdog
phases = Phases()
def helper():
    time.sleep(60)
threading.Thread(target=helper, daemon=True).start()
with Watchdog(phases, {timeout}, lambda: "process 3 is missing"):
    with phases("data"):
        {body}
print("went on")
"""


def run(body, timeout=0.5):
    code = STUCK.format(body=body, timeout=timeout)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_a_stuck_phase_is_named_with_all_stacks_and_status_1():
    done = run("time.sleep(60)")
    assert done.returncode == 1
    first = done.stderr.splitlines()[0]
    assert first.startswith("error: phase 'data' made no progress for 0 s (train.hang_timeout); process 3 is missing;")

    assert "in helper" in done.stderr
    assert 'File "<string>", line 10 in <module>' in done.stderr


def test_a_standard_error_without_a_descriptor():
    done = run("sys.stderr = __import__('io').StringIO(); time.sleep(60)")
    assert done.returncode == 1
    assert 'File "<string>", line 10 in <module>' in done.stderr


def test_progress_compilation_and_no_timeout_are_no_hang():
    assert run("[(time.sleep(0.1), phases.beat()) for _ in range(12)]").stdout == "went on\n"
    assert run("phases.enter('compilation'); time.sleep(1.2)").stdout == "went on\n"
    assert run("time.sleep(1)", timeout=None).stdout == "went on\n"


@pytest.mark.parametrize(("gaps", "is_hang"), [([1000.0] * 8, False), ([5.0] * 19, False), ([5.0] * 20, True)])
def test_time_in_which_the_process_was_stopped_is_not_counted(monkeypatch, gaps, is_hang):
    """The clock jumps by `gaps` seconds from one look of the watchdog to the next; it looks every five."""
    now, left = [0.0], list(gaps)
    monkeypatch.setattr("sparsezoo_jax.training.phases.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sparsezoo_jax.training.phases.faulthandler.dump_traceback_later", lambda *_, **__: None)
    ended = []
    monkeypatch.setattr("sparsezoo_jax.training.phases.end_process", lambda message, **_: ended.append(message))

    class Looks:
        def wait(self, interval):
            assert interval == 5.0
            if not left:
                return True
            now[0] += left.pop(0)
            return False

    phases = Phases()
    phases.enter("step")
    watchdog = Watchdog(phases, 100.0)
    watchdog._ended = Looks()
    watchdog._watch(100.0)
    assert bool(ended) is is_hang


def test_the_watchdog_ends_with_its_block():
    with Watchdog(Phases(), 0.2) as watchdog:
        pass
    assert not watchdog._thread.is_alive()
