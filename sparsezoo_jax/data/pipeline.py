"""Batches of prepared corpora: batch n is a pure function of (fingerprints, weights, seed, n)."""

from __future__ import annotations

import abc
import collections
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sparsezoo_jax import storage
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
from sparsezoo_jax.data.mixtures import Prepared, PreparedMixture
from sparsezoo_jax.data.packing import Records
from sparsezoo_jax.data.record_file import open_reader
from sparsezoo_jax.data.schedule import row_order, seed_of
from sparsezoo_jax.errors import ConfigError

#: An open file has an index in memory, of about 20 bytes a record: files of so many records together are kept open.
_OPEN_RECORDS, _OPEN_FILES = 4_000_000, 64
#: Files that are opened and read at the same time.
_THREADS = 8


class RecordReader:
    """Random access to the records of a prepared split.

    Which file has a record is arithmetic on the manifest. Files are opened when they are read, several at a time, and
    kept open while their indexes stay small (`_OPEN_RECORDS`), so that memory does not grow with the corpus.

    Args:
      prepared: the split.
      readers: that share the memory.
    """

    def __init__(self, prepared: PreparedSplit, readers: int = 1):
        self._prepared, self._starts = prepared, prepared.starts
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._records = 0
        self._most_records, self._most_files = _OPEN_RECORDS // readers, max(_OPEN_FILES // readers, 1)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max(_THREADS // readers, 1), "data-shards")

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
        reader = open_reader(storage.path(self._prepared.path) / known.name)
        if not reader.ok() or reader.num_records() != known.records:
            raise ValueError(f"does not hold {known.records:,} records")
        with self._lock:
            while self._open and (
                self._records + known.records > self._most_records or len(self._open) >= self._most_files
            ):
                # Another thread may be reading it: it is closed when nobody holds it any more.
                oldest, _ = self._open.popitem(last=False)
                self._records -= self._prepared.shards[oldest].records
            if shard not in self._open:
                self._records += known.records
            self._open[shard] = reader
        return reader


class _MixedReader:
    """Random access to the records of several prepared splits, as (split, record)."""

    def __init__(self, mixture: PreparedMixture):
        count = len(mixture.components)
        self._readers = [RecordReader(component.split, count) for component in mixture.components]

    def read(self, places: Sequence[tuple[int, int]]) -> Records:
        """Records by split and index; raises `StorageError` if a file is missing or damaged."""
        rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for number, reader in enumerate(self._readers):
            wanted = [row for row, (split, _) in enumerate(places) if split == number]
            if wanted:
                found = reader.read([places[row][1] for row in wanted])
                rows.update(zip(wanted, zip(found.tokens, found.segment_ids, strict=True), strict=True))
        tokens, segment_ids = zip(*(rows[row] for row in range(len(places))), strict=True)
        return Records(np.stack(tokens), np.stack(segment_ids))

    def close(self) -> None:
        """Closes all files."""
        for reader in self._readers:
            reader.close()


class NumberedBatches(abc.ABC):
    """A `BatchIterator` whose batches are known by their numbers.

    Args:
      identity: what determines the batches.
      num_batches: how many there are; may be infinity.
      start: number of the first.
      prefetch: batches made ahead in the background.
    """

    def __init__(self, identity: State, num_batches: float, start: int, prefetch: int):
        self._identity, self.num_batches, self._prefetch = identity, num_batches, prefetch
        self._next_batch = start
        self._counts: dict[str, int] = {}
        self._prefetcher = self._start()

    @abc.abstractmethod
    def batch_at(self, n: int) -> Batch:
        """Batch n of the run (this process's rows), in O(1); raises `IndexError` outside the epochs."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stops the background thread and closes the files."""

    def _draw(self, n: int) -> tuple[Batch, dict[str, int]]:
        return self.batch_at(n), {}

    def tokens_by_corpus(self) -> dict[str, int]:
        """Target tokens of each corpus of a mixture in the last batch given (this process's rows)."""
        return self._counts

    def __iter__(self) -> NumberedBatches:
        return self

    def __next__(self) -> Batch:
        drawn = self._prefetcher.next()
        if drawn is None:
            raise StopIteration
        self._next_batch += 1
        batch, self._counts = drawn
        return batch

    def get_state(self) -> State:
        """What determines the batches, and `next_batch`."""
        return {**self._identity, "next_batch": self._next_batch}

    def set_state(self, state: State) -> None:
        """Continues at the saved batch; raises `DataError` if corpus, tokenizer, seed or batch size differ."""
        check_state(state, self._identity)
        self._prefetcher.close()
        self._next_batch = int(state["next_batch"])
        self._prefetcher = self._start()

    def _check(self, n: int) -> None:
        if not 0 <= n < self.num_batches:
            raise IndexError(f"batch {n} of {self.num_batches}")

    def _start(self) -> Prefetcher:
        n = self._next_batch

        def produce() -> tuple[Batch, dict[str, int]] | None:
            nonlocal n
            if n >= self.num_batches:
                return None
            n += 1
            return self._draw(n - 1)

        return Prefetcher(produce, self._prefetch)


class PreparedBatches(NumberedBatches):
    """Batches of a prepared split; see `prepared_batches`. Its state is `fingerprint`, `seed`, `batch_size`, `shuffle`
    and `next_batch`.
    """

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
        self._reader = RecordReader(prepared)
        self._batch_size, self._rows = batch_size, rows
        identity = {
            "fingerprint": prepared.fingerprint,
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
        }
        num_batches = math.inf if epochs is None else epochs * prepared.num_records // batch_size
        super().__init__(identity, num_batches, start, prefetch)

    def batch_at(self, n: int) -> Batch:
        """Batch n of the run (this process's rows), in O(1); raises `IndexError` outside the epochs."""
        self._check(n)
        first = n * self._batch_size
        return batch_from_records(self._reader.read([self._order(first + row) for row in self._rows]))

    def close(self) -> None:
        """Stops the background thread and closes the files."""
        self._prefetcher.close()
        self._reader.close()


class MixedBatches(NumberedBatches):
    """Batches of a mixture; see `prepared_batches`. Its state is that of `PreparedBatches` with the fingerprints of all
    corpora, their `weights` and `epochs`.

    Sequence p of the run has a corpus by `Schedule`, and is the next one of that corpus's own endless order. Batch n
    has sequences nB to (n+1)B - 1, in rows that are drawn by (seed, n).
    """

    def __init__(
        self,
        mixture: PreparedMixture,
        *,
        batch_size: int,
        seed: int,
        start: int,
        rows: range,
        shuffle: bool,
        epochs: int | None,
        prefetch: int,
    ):
        parts = mixture.components
        self._names = [part.name for part in parts]
        self._orders = [
            endless_order(part.split.num_records, seed_of(seed, number), shuffle=shuffle)
            for number, part in enumerate(parts)
        ]
        times = [part.epochs if epochs is None else epochs for part in parts]
        self.schedule = mixture.schedule(epochs=times)
        self._reader = _MixedReader(mixture)
        self._batch_size, self._seed, self._rows, self._shuffle = batch_size, seed, rows, shuffle
        identity = {
            "fingerprint": mixture.fingerprint,
            "weights": [part.given_weight for part in parts],
            "epochs": times,
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
        }
        length = self.schedule.length
        super().__init__(identity, length if math.isinf(length) else length // batch_size, start, prefetch)

    def batch_at(self, n: int) -> Batch:
        """Batch n of the run (this process's rows), in O(1); raises `IndexError` outside the epochs."""
        return self._draw(n)[0]

    def corpora_at(self, n: int) -> list[str]:
        """The corpus of each row of batch n (of this process's rows)."""
        return [self._names[number] for number, _ in self._places(n)]

    def _places(self, n: int) -> list[tuple[int, int]]:
        self._check(n)
        order = row_order(self._batch_size, self._seed, n) if self._shuffle else range(self._batch_size)
        first = n * self._batch_size
        return [self.schedule.at(first + order[row]) for row in self._rows]

    def _draw(self, n: int) -> tuple[Batch, dict[str, int]]:
        places = self._places(n)
        batch = batch_from_records(self._reader.read([(part, self._orders[part](number)) for part, number in places]))
        targets = batch["mask"].sum(axis=1).tolist()
        counts = dict.fromkeys(self._names, 0)
        for (part, _), count in zip(places, targets, strict=True):
            counts[self._names[part]] += count
        return batch, counts

    def close(self) -> None:
        """Stops the background thread and closes the files."""
        self._prefetcher.close()
        self._reader.close()


def prepared_batches(
    prepared: Prepared,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    epochs: int | None = None,
    prefetch: int = 2,
) -> PreparedBatches | MixedBatches:
    """Training batches from a prepared split, or from those of a mixture in the shares of their weights.

    Args:
      prepared: the split, or the mixture.
      batch_size: sequences of the global batch B; process p of P gets rows p*B/P to (p+1)*B/P of it.
      seed: of the order; every epoch is shuffled anew. A batch may span two epochs.
      start: first batch; O(1).
      process_index: this process, 0 to process_count - 1.
      process_count: processes that share the global batch.
      shuffle: False reads the records in order.
      epochs: stop after so many, dropping an incomplete last batch; None never stops. Of each corpus of a mixture;
        None there: as the mixture says.
      prefetch: batches made ahead in the background.

    Raises `ConfigError` for impossible sizes, `StorageError` if the files are damaged.
    """
    _check_sizes(batch_size, start, epochs)
    rows = rows_of_process(batch_size, process_index, process_count)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "start": start,
        "rows": rows,
        "shuffle": shuffle,
        "epochs": epochs,
        "prefetch": prefetch,
    }
    if isinstance(prepared, PreparedMixture):
        return MixedBatches(prepared, **options)
    return PreparedBatches(prepared, **options)


def _check_sizes(batch_size: int, start: int, epochs: int | None) -> None:
    if batch_size < 1:
        raise ConfigError("data.batch_size", batch_size, "must be at least 1")
    if start < 0:
        raise ConfigError("start", start, "must be at least 0")
    if epochs is not None and epochs < 1:
        raise ConfigError("epochs", epochs, "must be at least 1")


def evaluation_batches(
    prepared: Prepared,
    batch_size: int,
    max_batches: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All records once, in order, for evaluation; of a mixture in the shares of their weights while all have some.

    Every target has `mask` set exactly once over the batches of all processes. The last batch is filled up with empty
    rows (mask and segment ids 0), so that all batches have one shape. At most `max_batches` are given. Raises
    `ConfigError` for impossible sizes, `StorageError` if the files are damaged.
    """
    _check_sizes(batch_size, 0, None)
    if max_batches is not None and max_batches < 1:
        raise ConfigError("max_batches", max_batches, "must be at least 1")
    rows = rows_of_process(batch_size, process_index, process_count)
    return _in_order(prepared, batch_size, max_batches, rows)


def _in_order(prepared: Prepared, batch_size: int, max_batches: int | None, rows: range) -> Iterator[Batch]:
    reader: Any
    if isinstance(prepared, PreparedMixture):
        reader, place = _MixedReader(prepared), prepared.schedule(epochs=[1] * len(prepared.components)).at
    else:
        reader, place = RecordReader(prepared), int
    try:
        count = -(-prepared.num_records // batch_size)
        for n in range(count if max_batches is None else min(count, max_batches)):
            places = [place(i) for row in rows if (i := n * batch_size + row) < prepared.num_records]
            yield batch_from_records(_fill_up(reader.read(places) if places else None, len(rows), prepared))
    finally:
        reader.close()


def _fill_up(records: Records | None, count: int, prepared: Prepared) -> Records:
    tokens = np.full((count, prepared.seq_len + 1), prepared.pad_id, np.int32)
    segment_ids = np.zeros((count, prepared.seq_len + 1), np.int32)
    if records is not None:
        tokens[: len(records.tokens)], segment_ids[: len(records.tokens)] = records
    return Records(tokens, segment_ids)
