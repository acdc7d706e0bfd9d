import os
import signal
import subprocess
import sys
import time

import pytest

from sparsezoo_jax.training.phases import Phases, Watchdog, goodput


def test_seconds_are_counted_once_and_in_the_innermost_phase():
    phases = Phases()
    with phases("evaluation"):
        time.sleep(0.02)
        with phases("data"):
            time.sleep(0.02)
        assert phases.current == "evaluation"
    assert phases.current == "other"
    assert phases.seconds["evaluation"] >= 0.02 <= phases.seconds["data"]
    before = phases.totals()
    time.sleep(0.01)
    assert phases.totals()["other"] > before["other"]
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


def test_progress_compilation_and_no_timeout_are_no_hang():
    assert run("[(time.sleep(0.1), phases.beat()) for _ in range(12)]").stdout == "went on\n"
    assert run("phases.enter('compilation'); time.sleep(1.2)").stdout == "went on\n"
    assert run("time.sleep(1)", timeout=None).stdout == "went on\n"


def test_a_stopped_process_is_no_hang():
    code = STUCK.format(body="print('ready', flush=True); time.sleep(0.6)", timeout=1.0)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    out, error = process.communicate(timeout=60)
    assert (out, process.returncode) == ("went on\n", 0), error


def test_the_watchdog_ends_with_its_block():
    with Watchdog(Phases(), 0.2) as watchdog:
        pass
    assert not watchdog._thread.is_alive()
