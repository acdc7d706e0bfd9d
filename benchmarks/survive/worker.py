"""The train command on a machine that misbehaves as `SURVIVE` (JSON) says; `benchmarks.survive` starts it in a process.

`slow`: seconds that each write and sync of Python takes. `jump`: seconds by which the clock is set, ahead or back, a
hundred readings after the start. `full`: path of a file; as long as it exists, Python's writes find the disk full.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any


def misbehave(slow: float = 0.0, jump: float = 0.0, full: str | None = None) -> None:
    """Replace the calls that Python code of this process writes and reads the clock with."""
    write, sync, now = os.write, os.fsync, time.time
    readings = 0

    def bad_write(descriptor: int, data: Any) -> int:
        time.sleep(slow)
        if full is not None and descriptor > 2 and os.path.exists(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    def bad_sync(descriptor: int) -> None:
        time.sleep(slow)
        sync(descriptor)

    def bad_clock() -> float:
        nonlocal readings
        readings += 1
        return now() + (jump if readings > 100 else 0.0)

    os.write, os.fsync, time.time = bad_write, bad_sync, bad_clock


def work(arguments: list[str], environment: dict[str, str], compiled: str, log: str, limit: int | None) -> None:
    """Run the command as a process of its own would, to its exit status.

    Args:
      arguments: of the command.
      environment: variables to set.
      compiled: directory of compiled programs.
      log: file for both outputs.
      limit: bytes beyond which no file may grow.
    """
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: what a driver that was cut off has left running would write into the next one's directory.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(descriptor, output)
    os.environ.update(environment)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    misbehave(**json.loads(environment["SURVIVE"]))

    import jax

    from sparsezoo_jax import cli, train

    # jax has read its variables already.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    sys.argv = ["train", *arguments]
    try:
        cli.run(train.main)
    finally:
        # What an interpreter does at its end, and a forked process leaves out.
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
