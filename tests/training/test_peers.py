"""One of two processes is lost: the other ends soon, with status 1 and a line that names it."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training import peers
from sparsezoo_jax.training.parameters import saved_steps
from tests.devices import with_devices

from .lost_process import TIMEOUT

pytestmark = pytest.mark.slow


def pair(workdir, victim, number, *more):
    """Exit status, output, errors, and when it ended, of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(1)}
    processes = []
    for i in (0, 1):
        arguments = [str(i), str(port), str(workdir), str(-1 if victim is None else victim), str(int(number)), *more]
        command = [sys.executable, "-m", "training.lost_process", *arguments]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_lost_process_is_named(tmp_path, victim, number):
    name = ("process 0 (the coordinator) of 2", "process 1 of 2")[victim]
    processes = pair(tmp_path, victim, number)
    try:
        if number == signal.SIGKILL:
            processes[victim].wait(timeout=300)
            lost = time.monotonic()
        _, error = processes[1 - victim].communicate(timeout=300)
        assert processes[1 - victim].returncode == 1, error
        if number == signal.SIGKILL:
            assert time.monotonic() - lost < TIMEOUT + 5
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert lines == [f"error: {name} stopped answering; start the run again to go on"], error
        assert "Traceback" not in error
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert saved_steps(tmp_path / "checkpoints")[-1] in (2, 4)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path):
    first, second = pair(tmp_path, 1, signal.SIGTERM)
    (out, error), (_, other) = (process.communicate(timeout=300) for process in (first, second))
    assert (first.returncode, second.returncode) == (0, 0), error + other
    assert "stopped on the signal of another process after step 5" in error
    assert out.splitlines()[-1] == "ended after step 5"
    checkpoints = tmp_path / "checkpoints"
    assert saved_steps(checkpoints) == [4, 5]
    # Both go on from the step before one that orbax could not even open.
    (checkpoints / "5" / "_CHECKPOINT_METADATA").write_text("[]")
    ends = [(process.communicate(timeout=300), process.returncode) for process in pair(tmp_path, None, 0)]
    assert [(out.splitlines()[-1], status) for (out, _), status in ends] == [("ended after step 40", 0)] * 2, ends
    errors = "".join(error for (_, error), _ in ends)
    assert errors.count("checkpoints/5 is damaged") == 1, errors
    assert "resuming from step 4" in errors
    assert (checkpoints / "5.damaged").is_dir()


def test_both_go_on_from_what_their_own_disks_hold(tmp_path):
    local = str(tmp_path / "local")
    for process in pair(tmp_path / "run", 1, signal.SIGKILL, local):
        process.communicate(timeout=300)
    (run,) = (tmp_path / "local").iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["0-of-2", "1-of-2"]
    assert saved_steps(tmp_path / "run" / "checkpoints") == []
    ends = [
        (process.communicate(timeout=300), process.returncode) for process in pair(tmp_path / "run", None, 0, local)
    ]
    assert [(out.splitlines()[-1], status) for (out, _), status in ends] == [("ended after step 40", 0)] * 2, ends
    assert re.search(r"resuming from step [24] in ", ends[0][0][1]), ends
    assert saved_steps(tmp_path / "run" / "checkpoints") == [40]


def test_processes_that_never_come_are_waited_for_no_longer_than_the_timeout():
    code = "from sparsezoo_jax.training.peers import join; join('127.0.0.1:{port}', 2, 0, 2.0)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code = code.format(port=free.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: --distributed: not all 2 processes came to 127.0.0.1:" in done.stderr
    assert "within 2 s" in done.stderr


@pytest.mark.parametrize(
    ("cause", "is_one"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("INTERNAL"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("OUT_OF_RANGE: File too large"), False),
    ],
)
def test_a_save_that_a_lost_process_took_along_is_not_the_disks_fault(cause, is_one):
    error = StorageError("saving a checkpoint failed")
    error.__cause__ = ValueError("of orbax")
    error.__cause__.__cause__ = cause
    assert peers._looks_like_a_lost_peer(error) is is_one
    assert not peers._looks_like_a_lost_peer(UserError("no such file"))
    assert peers._looks_like_a_lost_peer(ValueError("of a collective in a step"))
