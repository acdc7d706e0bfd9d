"""Leases: one process at a time uses what a file stands for, a run directory or a shard of a corpus.

A lease is a small file that names its owner (host, process, a random token) and is touched every few seconds. An
owner on this machine is looked up among the running processes; one elsewhere is watched for longer than it may stay
silent, which needs no clocks that agree. All access to the store is in the last functions of this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsezoo_jax.untrusted import read_json

TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0
"""An owner on another machine that has not touched its lease for so long while it was watched has lost it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    host: str
    boot: str
    """Boot and process namespace: with `host`, where `pid` has a meaning."""
    pid: int
    started: str
    """When the process started, so that a process that got its number later is not taken for it."""
    token: str

    @classmethod
    def here(cls) -> Owner:
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()) or "", secrets.token_hex(8))

    def is_local(self) -> bool:
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    def is_running(self) -> bool:
        """Whether the process of an owner on this machine still runs."""
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Exclusive use of what a file stands for, from a successful `try_acquire` to `release`."""

    def __init__(self, path: Path, *, touch_seconds: float = TOUCH_SECONDS, stale_seconds: float = STALE_SECONDS):
        self.path = path
        self._touch_seconds, self._stale_seconds = touch_seconds, stale_seconds
        self._owner = Owner.here()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: tuple[Owner, int | None, float] | None = None

    def try_acquire(self) -> Owner | None:
        """Take the lease if it is free or its owner is gone: None then, else who holds it. Does not wait.

        That an owner on another machine is gone shows only when this is called again, `stale_seconds` later.

        Raises:
          OSError: the directory can't be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = self.owner()
        if found is not None and not self._is_abandoned(found):
            return found
        with _critical(self.path):
            # Who waited for the lock may find what another starter wrote meanwhile.
            newer = self.owner()
            if newer not in (found, None):
                return newer
            _write(self.path, self._owner)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return None

    def owner(self) -> Owner | None:
        """Who holds the lease now."""
        return _read(self.path)

    def touched(self) -> int | None:
        """Changes whenever the owner shows that it lives; None without a lease."""
        return _touched(self.path)

    def is_held(self) -> bool:
        """Whether this object holds the lease still: somebody who saw no sign of life for long enough may have it."""
        with contextlib.suppress(OSError):  # what can't be read was not lost
            return self.owner() == self._owner
        return True

    def release(self) -> None:
        """Give the lease back, if it is still held."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.owner() == self._owner:
                _remove(self.path)

    def _is_abandoned(self, owner: Owner) -> bool:
        if owner.is_local():
            return not owner.is_running()
        touched, now = _touched(self.path), time.monotonic()
        if self._seen is None or self._seen[:2] != (owner, touched):
            self._seen = (owner, touched, now)
        return now - self._seen[2] >= self._stale_seconds

    def _keep(self) -> None:
        while not self._ended.wait(self._touch_seconds):
            with contextlib.suppress(OSError):
                _touch(self.path)


def _boot() -> str:
    """Names this boot of this machine and this namespace of process numbers; empty where that can't be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:  # no /proc, as on macOS: that a process of this number runs must do
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    fields = stat.rpartition(")")[2].split()
    # A zombie holds nothing any more.
    return None if fields[0] in "ZX" else fields[19]


# ------------------------------------------------------------------------------------------------------------ The store
def _read(path: Path) -> Owner | None:
    """The owner; None without a lease, or with one that says nothing (cut short by a crash of the machine)."""
    try:
        return Owner(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None


def _write(path: Path, owner: Owner) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(owner), file)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _touch(path: Path) -> None:
    os.utime(path)


def _touched(path: Path) -> int | None:
    """Changes whenever the owner shows that it lives; opened, because NFS looks at the server only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _critical(path: Path) -> Iterator[None]:
    """Between reading and replacing a lease no other starter may do the same; the kernel drops this lock with us."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: reading back in `check` must do
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
