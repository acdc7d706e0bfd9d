"""The lease on a run directory: one run at a time trains there."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sparsezoo_jax import lease
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.lease import STALE_SECONDS, TOUCH_SECONDS, Owner
from sparsezoo_jax.untrusted import printable

LEASE = ".lease"


class RunInUseError(UserError):
    """Another process trains in the directory. Exit status 1."""

    exit_status = 1


class Lease:
    """Exclusive use of a run directory, from `acquire` to `release`."""

    def __init__(self, directory: Path, *, touch_seconds: float = TOUCH_SECONDS, stale_seconds: float = STALE_SECONDS):
        self._directory, self._stale_seconds = directory, stale_seconds
        self._lease = lease.Lease(directory / LEASE, touch_seconds=touch_seconds, stale_seconds=stale_seconds)

    def acquire(self) -> None:
        """Take the lease; a lease whose owner is gone is taken over.

        Raises:
          RunInUseError: another process holds it.
          StorageError: the directory can't be written.
        """
        try:
            owner = self._lease.try_acquire()
            if owner is not None and not owner.is_local():
                owner = self._watch(owner)
        except OSError as error:
            raise StorageError(f"{self._directory / LEASE}: {error.strerror or error}") from None
        if owner is not None:
            raise self._in_use(owner)

    def refuse_taken(self) -> None:
        """Raise `RunInUseError` where a process of this machine holds the lease; takes nothing.

        A starter can say so before it reads what that process is changing; whether it may train, `acquire` decides.
        """
        try:
            owner = self._lease.owner()
        except OSError:  # said by who needs the directory
            return
        if owner is not None and owner.is_local() and owner.is_running():
            raise self._in_use(owner)

    def _in_use(self, owner: Owner) -> RunInUseError:
        return RunInUseError(f"--workdir={self._directory}: {owner} trains there; wait for it or stop it")

    def _watch(self, owner: Owner) -> Owner | None:
        """Who holds the lease after looking for a sign of life of an owner elsewhere; None if it was taken over."""
        seconds = f"{self._stale_seconds:.0f} s"
        print(f"{self._directory}: watching {seconds} whether {printable(owner)} still runs", file=sys.stderr)
        touched = self._lease.touched()
        found: Owner | None = owner
        while found == owner and self._lease.touched() == touched:
            time.sleep(min(1.0, self._stale_seconds / 10))
            found = self._lease.try_acquire()
        return found

    def check(self) -> None:
        """Raise `RunInUseError` if the lease was lost: to somebody who saw no sign of life for long enough."""
        if not self._lease.is_held():
            taker = self._lease.owner() or "somebody who removed the lease"
            raise RunInUseError(f"{self._directory}: this process lost the directory to {taker}")

    def release(self) -> None:
        """Give the lease back, if it is still held."""
        self._lease.release()
