"""What every source of batches has in common: the batch, the iterator protocol, and making batches ahead."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypedDict

import numpy as np

from sparsezoo_jax.data.packing import Records, positions_of, target_mask
from sparsezoo_jax.errors import ConfigError, DataError

State = dict[str, Any]


class Batch(TypedDict):
    """One batch: B sequences (of this process) of T tokens.

    Attributes:
      tokens: int32 [B, T].
      targets: int32 [B, T], the token that follows each input.
      segment_ids: int32 [B, T]; 1, 2, ... for the documents in a row, 0 for padding.
      positions: int32 [B, T]; restart at 0 with every segment.
      mask: bool [B, T]; whether the target is real, i.e. a token of the same document as its input.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray


class BatchIterator(Protocol):
    """An iterator over batches whose position can be saved (JSON) and restored exactly."""

    def __iter__(self) -> BatchIterator: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> State:
        """Where the next batch will come from; JSON-able."""
        ...

    def set_state(self, state: State) -> None:
        """Continues from a saved state; raises `DataError` saying what differs if it belongs to another stream."""
        ...

    def close(self) -> None:
        """Stops the background work."""
        ...


def batch_from_records(records: Records) -> Batch:
    """Splits records of T+1 tokens into inputs and targets."""
    segment_ids = np.ascontiguousarray(records.segment_ids[:, :-1])
    return Batch(
        tokens=np.ascontiguousarray(records.tokens[:, :-1]),
        targets=np.ascontiguousarray(records.tokens[:, 1:]),
        segment_ids=segment_ids,
        positions=positions_of(segment_ids),
        mask=target_mask(records.segment_ids),
    )


def endless_order(length: int, seed: int, *, shuffle: bool = True) -> Callable[[int], int]:
    """Maps position 0, 1, 2, ... of an endless stream to an index below `length`; every epoch is shuffled anew."""
    if not shuffle:
        return lambda position: position % length
    # Grain shuffles without a table, by drawing numbers of at least 16 bits until one is below `length`: milliseconds
    # an index when that is small.
    if length <= 2**16:
        return _table_order(length, seed)
    # For 4^k + 1 it gives one index twice and another never (seen in 0.2.18).
    power = (length - 1).bit_length() - 1
    if length - 1 == 1 << power and power % 2 == 0:
        return _narrowed(_grain_order(length + 1, seed), length)
    return _grain_order(length, seed)


def _narrowed(order: Callable[[int], int], length: int) -> Callable[[int], int]:
    """An order below `length` from one below `length + 1`: where the last index would be is what the last place has."""

    def index(position: int) -> int:
        epoch, place = divmod(position, length)
        value = order(epoch * (length + 1) + place)
        return order(epoch * (length + 1) + length) if value == length else value

    return index


def _table_order(length: int, seed: int) -> Callable[[int], int]:
    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        # Sorted raw bits, because NumPy promises only those to be the same in every version.
        return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(length), kind="stable")

    return lambda position: int(permutation(position // length)[position % length])


def _grain_order(length: int, seed: int) -> Callable[[int], int]:
    import grain

    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()

    def index(position: int) -> int:
        value = order[position]
        assert value is not None  # Grain's type allows for filtered elements
        return int(value)

    return index


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a global batch that a process feeds; raises `ConfigError` if they don't divide evenly."""
    if not 0 <= process_index < process_count:
        raise ConfigError("process_index", process_index, f"must be from 0 to {process_count - 1}")
    if batch_size % process_count:
        raise ConfigError("data.batch_size", batch_size, f"must be a multiple of the {process_count} processes")
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def check_state(state: State, expected: State) -> None:
    """Raises `DataError` unless `state` agrees with all of `expected`."""
    for name, value in expected.items():
        if name not in state:
            raise DataError(f"data state: has no '{name}', so it was not saved by this kind of data stream")
        if state[name] != value:
            raise DataError(f"data state: saved with {name}={state[name]}, but this run has {name}={value}")


def merge_states(states: Iterable[State]) -> State:
    """Joins the states that the processes of one run saved at the same step.

    What one of them alone has (the position of a row that only it feeds) is kept. Raises `DataError` if they don't fit
    together.
    """
    first, *others = states
    merged = dict(first)
    for state in others:
        for name, value in state.items():
            if isinstance(value, dict) and isinstance(merged.get(name), dict):
                merged[name] = merge_states([merged[name], value])
            elif merged.setdefault(name, value) != value:
                raise DataError(f"data state: one process has {name}={merged[name]}, another {name}={value}")
    return merged


class Prefetcher:
    """Calls `produce` ahead of its consumer in one background thread, results in order.

    `produce` returns None at the end. An exception is raised where its result would have been.
    """

    def __init__(self, produce: Callable[[], Any], depth: int):
        self._produce, self._depth = produce, depth
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "data-prefetch") if depth else None
        self._futures: collections.deque[concurrent.futures.Future] = collections.deque()

    def next(self) -> Any:
        """The next result, or None at the end."""
        if self._pool is None:
            return self._produce()
        while len(self._futures) <= self._depth:
            self._futures.append(self._pool.submit(self._produce))
        return self._futures.popleft().result()

    def close(self) -> None:
        """Drops what was made ahead and waits for the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._futures.clear()
