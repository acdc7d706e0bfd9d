"""Who makes which shard: any number of processes, started by anybody on any machine that sees the directory.

A process takes the lease of a shard that nobody has, makes it, and goes on with the next. So several that prepare the
same corpus share the work, one that was killed leaves its shard to the others, and nothing is made twice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from sparsezoo_jax.data.manifest import MANIFEST_FILE
from sparsezoo_jax.data.shards import Advance, Job, make_shard
from sparsezoo_jax.data.tokenizer import Tokenizer
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.lease import Lease, Owner
from sparsezoo_jax.untrusted import printable

_POLL_SECONDS = 0.5


def is_done(job: Job, shard: int) -> bool:
    """Whether a shard is complete: it has a result, or the manifest has replaced all results."""
    return job.result_path(shard).exists() or (job.directory / MANIFEST_FILE).exists()


def shard_lease(job: Job, shard: int) -> Lease:
    """The lease of a shard."""
    return Lease(job.directory / f".{job.path(shard).stem}.lease")


def make_free_shards(job: Job, shards: Iterable[int], tokenizer: Tokenizer, advance: Advance) -> None:
    """Makes those of `shards` that are neither done nor somebody else's."""
    for shard in shards:
        _make_if_free(job, shard, shard_lease(job, shard), tokenizer, advance)


def _make_if_free(job: Job, shard: int, lease: Lease, tokenizer: Tokenizer, advance: Advance) -> Owner | None:
    """Who makes the shard at the moment; None if it is done now."""
    if is_done(job, shard):
        return None
    owner = lease.try_acquire()
    if owner is not None:
        return owner
    try:
        if not is_done(job, shard):  # another process may have finished it before we had the lease
            make_shard(job, shard, tokenizer, advance)
    finally:
        lease.release()
    return None


def wait_for_shards(
    job: Job,
    shards: Iterable[int],
    tokenizer: Tokenizer,
    advance: Advance,
    *,
    minutes: float,
) -> None:
    """Returns when all of `shards` are done. A shard whose owner is gone is made here.

    Args:
      minutes: wait no longer than this without another process finishing a shard.

    Raises `StorageError` if the time is up.
    """
    leases = {shard: shard_lease(job, shard) for shard in shards}
    patience = Patience(job.directory, minutes)
    while leases:
        holder: Owner | None = None
        for shard, lease in list(leases.items()):
            owner = _make_if_free(job, shard, lease, tokenizer, advance)
            if owner is None:
                del leases[shard]
                patience.renew()
            else:
                holder = owner
        if leases:
            patience.wait(holder, f"{len(leases)} of {job.count} shards")


class Patience:
    """Waiting for another process: with a line that says so, and not for ever."""

    def __init__(self, directory: Path, minutes: float):
        self._directory, self._minutes = directory, minutes
        self._announced = False
        self.renew()

    def renew(self) -> None:
        """Something was done: the time begins again."""
        self._deadline = time.monotonic() + 60 * self._minutes

    def wait(self, owner: Owner | None, what: str) -> None:
        """A moment's wait for `owner`, who makes `what`; raises `StorageError` if the time is up."""
        who = printable(owner or "another process")
        if time.monotonic() >= self._deadline:
            raise StorageError(
                f"{self._directory}: {who} prepares {what} and finished nothing for {self._minutes:g} minutes "
                "(data.wait_minutes); see whether it still works, stop it, and run this command again"
            )
        if not self._announced:
            print(
                f"waiting for {who}, which prepares {what} in {self._directory} "
                f"(at most {self._minutes:g} minutes without progress: data.wait_minutes)",
                file=sys.stderr,
            )
            self._announced = True
        time.sleep(_POLL_SECONDS)
