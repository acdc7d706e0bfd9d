"""Batches from a prepared split: batch n is a pure function of (fingerprint, seed, n)."""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sparsezoo_jax.data.batches import (
    Batch,
    Prefetcher,
    State,
    batch_from_records,
    check_state,
    endless_order,
    rows_of_process,
)
from sparsezoo_jax.data.manifest import PreparedSplit, damaged, decode_records
from sparsezoo_jax.data.packing import Records
from sparsezoo_jax.data.record_file import open_reader
from sparsezoo_jax.errors import ConfigError

#: An open file has an index in memory, of about 20 bytes a record: files of so many records together are kept open.
_OPEN_RECORDS, _OPEN_FILES = 4_000_000, 64
#: Files that are opened and read at the same time.
_THREADS = 8


class RecordReader:
    """Random access to the records of a prepared split.

    Which file has a record is arithmetic on the manifest. Files are opened when they are read, several at a time, and
    kept open while their indexes stay small (`_OPEN_RECORDS`), so that memory does not grow with the corpus.
    """

    def __init__(self, prepared: PreparedSplit):
        self._prepared, self._starts = prepared, prepared.starts
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._records = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, "data-shards")

    def read(self, indices: Sequence[int]) -> Records:
        """Records by index; raises `StorageError` if a file is missing or damaged."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        wanted = [(shard, np.flatnonzero(shards == shard).tolist()) for shard in np.unique(shards).tolist()]
        numbers = [[int(indices[place] - self._starts[shard]) for place in places] for shard, places in wanted]
        reads = (map if len(wanted) == 1 else self._pool.map)(self._read, (shard for shard, _ in wanted), numbers)
        rows: list[bytes] = [b""] * len(indices)
        for (_, places), found in zip(wanted, reads, strict=True):
            for place, row in zip(places, found, strict=True):
                rows[place] = row
        try:
            return decode_records(rows, self._prepared)
        except ValueError as error:
            raise damaged(self._prepared.path, error) from error

    def close(self) -> None:
        """Closes all files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def _read(self, shard: int, numbers: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(numbers)
        # Of ArrayRecord: a checksum that is not that of the bytes, or an index beyond the file.
        except (RuntimeError, ValueError, OSError) as error:
            name = self._prepared.shards[shard].name
            raise damaged(self._prepared.path, f"{name}: {getattr(error, 'strerror', None) or error}") from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        known = self._prepared.shards[shard]
        reader = open_reader(Path(self._prepared.path) / known.name)
        if not reader.ok() or reader.num_records() != known.records:
            raise ValueError(f"does not hold {known.records:,} records")
        with self._lock:
            while self._open and (self._records + known.records > _OPEN_RECORDS or len(self._open) >= _OPEN_FILES):
                # Another thread may be reading it: it is closed when nobody holds it any more.
                oldest, _ = self._open.popitem(last=False)
                self._records -= self._prepared.shards[oldest].records
            if shard not in self._open:
                self._records += known.records
            self._open[shard] = reader
        return reader


class PreparedBatches:
    """The `BatchIterator` over a prepared split; see `prepared_batches`."""

    def __init__(
        self,
        prepared: PreparedSplit,
        *,
        batch_size: int,
        seed: int,
        start: int,
        rows: range,
        shuffle: bool,
        epochs: int | None,
        prefetch: int,
    ):
        self._order = endless_order(prepared.num_records, seed, shuffle=shuffle)
        self._num_batches = math.inf if epochs is None else epochs * prepared.num_records // batch_size
        self._reader = RecordReader(prepared)
        self._batch_size, self._rows, self._prefetch = batch_size, rows, prefetch
        self._identity = {
            "fingerprint": prepared.fingerprint,
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
        }
        self._next_batch = start
        self._prefetcher = self._start()

    def batch_at(self, n: int) -> Batch:
        """Batch n of the run (this process's rows), in O(1); raises `IndexError` outside the epochs."""
        if not 0 <= n < self._num_batches:
            raise IndexError(f"batch {n} of {self._num_batches}")
        first = n * self._batch_size
        return batch_from_records(self._reader.read([self._order(first + row) for row in self._rows]))

    def __iter__(self) -> PreparedBatches:
        return self

    def __next__(self) -> Batch:
        batch = self._prefetcher.next()
        if batch is None:
            raise StopIteration
        self._next_batch += 1
        return batch

    def get_state(self) -> State:
        """`fingerprint`, `seed`, `batch_size`, `shuffle` and `next_batch`."""
        return {**self._identity, "next_batch": self._next_batch}

    def set_state(self, state: State) -> None:
        """Continues at the saved batch; raises `DataError` if corpus, tokenizer, seed or batch size differ."""
        check_state(state, self._identity)
        self._prefetcher.close()
        self._next_batch = int(state["next_batch"])
        self._prefetcher = self._start()

    def close(self) -> None:
        """Stops the background thread and closes the file."""
        self._prefetcher.close()
        self._reader.close()

    def _start(self) -> Prefetcher:
        n = self._next_batch

        def produce() -> Batch | None:
            nonlocal n
            if n >= self._num_batches:
                return None
            n += 1
            return self.batch_at(n - 1)

        return Prefetcher(produce, self._prefetch)


def prepared_batches(
    prepared: PreparedSplit,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    epochs: int | None = None,
    prefetch: int = 2,
) -> PreparedBatches:
    """Training batches from a prepared split.

    Args:
      prepared: the split.
      batch_size: sequences of the global batch B; process p of P gets rows p*B/P to (p+1)*B/P of it.
      seed: of the order; every epoch is shuffled anew. A batch may span two epochs.
      start: first batch; O(1).
      process_index: this process, 0 to process_count - 1.
      process_count: processes that share the global batch.
      shuffle: False reads the records in order.
      epochs: stop after so many, dropping an incomplete last batch; None never stops.
      prefetch: batches made ahead in the background.

    Raises `ConfigError` for impossible sizes, `StorageError` if the files are damaged.
    """
    _check_sizes(batch_size, start, epochs)
    rows = rows_of_process(batch_size, process_index, process_count)
    return PreparedBatches(
        prepared,
        batch_size=batch_size,
        seed=seed,
        start=start,
        rows=rows,
        shuffle=shuffle,
        epochs=epochs,
        prefetch=prefetch,
    )


def _check_sizes(batch_size: int, start: int, epochs: int | None) -> None:
    if batch_size < 1:
        raise ConfigError("data.batch_size", batch_size, "must be at least 1")
    if start < 0:
        raise ConfigError("start", start, "must be at least 0")
    if epochs is not None and epochs < 1:
        raise ConfigError("epochs", epochs, "must be at least 1")


def evaluation_batches(
    prepared: PreparedSplit,
    batch_size: int,
    max_batches: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All records once, in order, for evaluation.

    Every target has `mask` set exactly once over the batches of all processes. The last batch is filled up with empty
    rows (mask and segment ids 0), so that all batches have one shape. At most `max_batches` are given. Raises
    `ConfigError` for impossible sizes, `StorageError` if the files are damaged.
    """
    _check_sizes(batch_size, 0, None)
    if max_batches is not None and max_batches < 1:
        raise ConfigError("max_batches", max_batches, "must be at least 1")
    rows = rows_of_process(batch_size, process_index, process_count)
    return _in_order(prepared, batch_size, max_batches, rows)


def _in_order(prepared: PreparedSplit, batch_size: int, max_batches: int | None, rows: range) -> Iterator[Batch]:
    reader = RecordReader(prepared)
    try:
        count = -(-prepared.num_records // batch_size)
        for n in range(count if max_batches is None else min(count, max_batches)):
            indices = [i for row in rows if (i := n * batch_size + row) < prepared.num_records]
            yield batch_from_records(_fill_up(reader.read(indices) if indices else None, len(rows), prepared))
    finally:
        reader.close()


def _fill_up(records: Records | None, count: int, prepared: PreparedSplit) -> Records:
    tokens = np.full((count, prepared.seq_len + 1), prepared.pad_id, np.int32)
    segment_ids = np.zeros((count, prepared.seq_len + 1), np.int32)
    if records is not None:
        tokens[: len(records.tokens)], segment_ids[: len(records.tokens)] = records
    return Records(tokens, segment_ids)
