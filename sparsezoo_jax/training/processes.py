"""Decisions that all processes of a run take together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparsezoo_jax.errors import StorageError, UserError

Result = TypeVar("Result")


class DamagedCheckpointError(Exception):
    """A step that can't be read back as it was written."""


def worst(verdict: int) -> int:
    """The largest verdict of all processes; each must call this at the same place."""
    if jax.process_count() == 1:
        return verdict
    return int(np.max(multihost_utils.process_allgather(np.int32(verdict))))


def any_of(flags: int) -> int:
    """Bits that are set in any process; each must call this at the same place."""
    if jax.process_count() == 1:
        return flags
    return int(np.bitwise_or.reduce(multihost_utils.process_allgather(np.int32(flags))))


def from_first(numbers: Sequence[int]) -> list[int]:
    """The numbers that process 0 gives, in every process; what the others give is not looked at."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.zeros(count, np.int32)
    if jax.process_index() == 0:
        mine[:] = numbers
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tolist()


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order and in every process; each must call this at the same place.

    Args:
      value: JSON.
    """
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # An array has one shape in all processes: the longest text's.
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(mine)] = mine
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def in_all(attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, if it succeeds in all processes; each process has to call this.

    Raises:
      DamagedCheckpointError, UserError, StorageError: the worst of them that it raised in any process.
    """
    kinds = (type(None), DamagedCheckpointError, UserError, StorageError)
    raised: Exception | None = None
    result: Any = None
    try:
        result = attempt()
    except kinds[1:] as error:
        raised = error
    verdict = max(i for i, kind in enumerate(kinds) if isinstance(raised, kind))
    agreed = worst(verdict)
    if agreed == 0:
        return result
    if raised is not None and verdict == agreed:
        raise raised
    raise (DamagedCheckpointError if agreed == 1 else StorageError)("failed in another process, which says why")
