"""The train command on a machine that misbehaves as `SURVIVE` (JSON) says; started by `benchmarks.survive`.

`slow`: seconds that each write and sync of Python takes. `jump`: seconds by which the clock is set, ahead or back, a
hundred readings after the start. `full`: path of a file; as long as it exists, Python's writes find the disk full.
"""

from __future__ import annotations

import errno
import json
import os
import sys
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


if __name__ == "__main__":
    misbehave(**json.loads(os.environ.get("SURVIVE", "{}")))
    from sparsezoo_jax import cli, train

    sys.argv[0] = "train"
    cli.run(train.main)
