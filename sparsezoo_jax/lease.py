"""Leases: one process at a time uses what a file stands for, a run directory or a shard of a corpus.

A lease is a small file that names its owner (host, process, a random token) and is touched every few seconds. An
owner on this machine is looked up among the running processes; one elsewhere is watched for longer than it may stay
silent, which needs no clocks that agree. All access to the store is in the last classes of this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsezoo_jax import storage
from sparsezoo_jax.storage import conditions
from sparsezoo_jax.untrusted import MAX_CONFIG_BYTES, parse_json, read_json

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
        self._store = _ObjectStore(path) if storage.is_object(path) else _FileStore(path)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: tuple[Owner, conditions.Generation | None, float] | None = None

    def try_acquire(self) -> Owner | None:
        """Take the lease if it is free or its owner is gone: None then, else who holds it. Does not wait.

        That an owner on another machine is gone shows only when this is called again, `stale_seconds` later.

        Raises:
          OSError: the directory can't be written.
        """
        while True:
            found = self.owner()
            if found is not None and not self._is_abandoned(found):
                return found
            if self._store.replace(found, self._owner):  # else another starter was faster
                break
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return None

    def owner(self) -> Owner | None:
        """Who holds the lease now."""
        return self._store.read()

    def touched(self) -> conditions.Generation | None:
        """Changes whenever the owner shows that it lives; None without a lease."""
        return self._store.touched()

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
                self._store.remove()

    def _is_abandoned(self, owner: Owner) -> bool:
        if owner.is_local():
            return not owner.is_running()
        touched, now = self._store.touched(), time.monotonic()
        if self._seen is None or self._seen[:2] != (owner, touched):
            self._seen = (owner, touched, now)
        return now - self._seen[2] >= self._stale_seconds

    def _keep(self) -> None:
        while not self._ended.wait(self._touch_seconds):
            with contextlib.suppress(OSError):
                self._store.touch()


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
class _FileStore:
    """A lease in a file of this machine or of a file server: touched by its time of change, replaced under a lock."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> Owner | None:
        """The owner; None without a lease, or with one that says nothing (cut short by a crash of the machine)."""
        try:
            return Owner(**read_json(self._path))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def replace(self, found: Owner | None, owner: Owner) -> bool:
        """Make `owner` the owner, unless another starter replaced `found` meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Between reading and replacing no other starter may do the same; the kernel drops this lock with us.
        with storage.locked(self._path.parent):
            if self.read() not in (found, None):
                return False
            storage.replace_file(self._path, _encoded(owner))
        return True

    def touch(self) -> None:
        """Show that the owner lives."""
        os.utime(self._path)

    def touched(self) -> int | None:
        """Changes whenever the owner shows that it lives; opened, because NFS looks at the server only then."""
        try:
            with storage.open_read(self._path) as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _ObjectStore:
    """A lease in an object, whose generation changes when it is touched; each write demands the one that it follows.

    So of several starters one wins, and an owner that was taken over can't touch or remove the lease of the next.
    """

    def __init__(self, path: Path):
        self._path = path
        self._read: tuple[Owner | None, conditions.Generation] = (None, 0)  # what `replace` follows
        self._own: tuple[bytes, conditions.Generation] | None = None

    def read(self) -> Owner | None:
        """The owner; None without a lease, or with one that says nothing."""
        found = conditions.read_versioned(self._path)
        owner = None
        if found is not None:
            with contextlib.suppress(ValueError, TypeError):
                owner = Owner(**parse_json(found[0], max_bytes=MAX_CONFIG_BYTES))
        self._read = owner, 0 if found is None else found[1]
        return owner

    def replace(self, found: Owner | None, owner: Owner) -> bool:
        """Make `owner` the owner, unless the lease is another one than when `found` was read, or was touched."""
        before, generation = self._read
        return before == found and self._write(_encoded(owner), generation)

    def touch(self) -> None:
        """Write it again; nothing, once somebody else has it."""
        if self._own is not None:
            self._write(*self._own)

    def _write(self, content: bytes, generation: conditions.Generation) -> bool:
        made = conditions.write_if(self._path, content, generation)
        if made is None:
            # Somebody else's now; or ours, by an earlier attempt of the client whose answer it did not get.
            found = conditions.read_versioned(self._path)
            made = found[1] if found is not None and found[0] == content else None
        self._own = None if made is None else (content, made)
        return made is not None

    def touched(self) -> conditions.Generation | None:
        """The generation."""
        found = conditions.read_versioned(self._path)
        return None if found is None else found[1]

    def remove(self) -> None:
        """Remove the own lease. Its generation is asked for: the answer to the last touch may have been lost."""
        found = conditions.read_versioned(self._path)
        if self._own is not None and found is not None and found[0] == self._own[0]:
            conditions.remove_if(self._path, found[1])


def _encoded(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()
