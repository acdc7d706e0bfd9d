"""Batches tokenised while training, for corpora that should not be prepared.

Every row of the global batch is a lane of its own: of the shuffled documents, lane r of B reads number r, r + B, r +
2B, ... and packs them one after another. So batch n does not depend on the number of processes, rows of a batch come
from different documents, and a position is two numbers a lane (document, offset), which restores exactly without
replaying anything.

Of a mixture every row has such a lane in each corpus. Whole sequences are of one corpus, chosen as in prepared mode; a
corpus that is read a number of times at most ends lane by lane, and the row goes on in another, where it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sparsezoo_jax.data import sources
from sparsezoo_jax.data.batches import Batch, Prefetcher, State, check_state, endless_order, rows_of_process
from sparsezoo_jax.data.config import DataConfig, local_cache
from sparsezoo_jax.data.corpora import corpus_name, open_documents
from sparsezoo_jax.data.documents import BadDocumentError, Document, Documents, Skipped, Split, files_of
from sparsezoo_jax.data.packing import positions_of, with_specials
from sparsezoo_jax.data.preparation import prepared_directory
from sparsezoo_jax.data.schedule import Schedule, row_order, seed_of
from sparsezoo_jax.data.skipping import Skips
from sparsezoo_jax.data.tokenizer import Tokenizer
from sparsezoo_jax.errors import DataError, SparsezooWarning

#: Documents of a lane that are tokenised in one go; bounds the memory to this many per row.
_LOOKAHEAD = 4
#: So many documents in a row without a target mean that the corpus has none.
_MAX_EMPTY = 10_000


class _Lane:
    """One row's stream. `document` counts the lane's documents, `offset` the targets already used of the current
    one.
    """

    def __init__(self, document: int = 0, offset: int = 0):
        self.document, self.offset = document, offset
        self.ready: dict[int, np.ndarray] = {}  # tokenised documents by number

    def take(self, seq_len: int) -> tuple[list[np.ndarray], int]:
        """As many [input, target] pairs as are ready (each int32 [2, L]), at most `seq_len` columns, and how many
        columns.
        """
        parts, filled = [], 0
        while filled < seq_len and self.document in self.ready:
            tokens = self.ready[self.document]
            end = min(self.offset + seq_len - filled, len(tokens) - 1)
            if end > self.offset:
                parts.append(np.stack([tokens[self.offset : end], tokens[self.offset + 1 : end + 1]]))
                filled += end - self.offset
            if end >= len(tokens) - 1:
                del self.ready[self.document]
                self.document, self.offset = self.document + 1, 0
            else:
                self.offset = end
        return parts, filled


class _Stream:
    """A corpus that is read by lanes.

    Args:
      number: of the corpus in a mixture.
      name: in a mixture, else None.
      epochs: how often it is read at most; None: without end.
    """

    def __init__(
        self, config: DataConfig, split: Split, rows: range, number: int, name: str | None, epochs: int | None
    ):
        if prepared_directory(config, split) is not None:
            raise DataError(
                f"data.dataset={corpus_name(config, split)}: is a prepared corpus; data.mode=streaming reads text"
            )
        self.documents: Documents = open_documents(config, split)
        self.name, self._dataset, self._cache = name, config.dataset, local_cache(config)
        self._batch_size = config.batch_size
        self._limit = None if epochs is None else epochs * len(self.documents)
        self._order: Callable[[int], int] = endless_order(len(self.documents), seed_of(config.seed, number))
        self.skips = Skips.of(config)
        sources.keep(self.documents.fingerprint, files_of(self.documents), self._cache)
        self.lanes = {row: _Lane() for row in rows}

    @property
    def where(self) -> str:
        """Names it in errors and warnings."""
        return "data.dataset" if self.name is None else f"data.mixture[{self.name}]"

    def has_ended(self, row: int) -> bool:
        """Whether the lane of a row has been read as often as it may."""
        return self._limit is not None and row + self.lanes[row].document * self._batch_size >= self._limit

    def wanted(self, row: int) -> list[tuple[int, int]]:
        """The documents that a lane has next: their numbers there and in the corpus."""
        first = self.lanes[row].document
        places = [(number, row + number * self._batch_size) for number in range(first, first + _LOOKAHEAD)]
        return [(number, self._order(place)) for number, place in places if self._limit is None or place < self._limit]

    def read(self, index: int) -> Document | Skipped:
        """A document of the corpus."""
        try:
            return self.documents[index]
        except BadDocumentError as error:
            return error.skipped

    def text(self, item: Document | Skipped) -> str:
        """Its text, nothing for one that is skipped. The first of these are named as they are met."""
        named = len(self.skips.named)
        document = self.skips.take(item)
        for fault in self.skips.named[named:]:
            warnings.warn(f"{self.where}: skipped {fault}", SparsezooWarning, stacklevel=2)
        return "" if document is None else document.text

    def check(self, fingerprint: Any) -> None:
        """Raises `DataError` unless the corpus has this fingerprint."""
        if fingerprint != self.documents.fingerprint:
            before = sources.kept(fingerprint, self._cache)
            raise DataError(sources.changed(self._dataset, before, files_of(self.documents)))

    def close(self) -> None:
        """Warns of the documents that were left out."""
        self.skips.warn(self.where)
        self.skips = Skips()


class StreamingBatches:
    """The `BatchIterator` that tokenises as it goes; see `streaming_batches`."""

    def __init__(self, config: DataConfig, streams: Sequence[_Stream], tokenizer: Tokenizer, *, rows: range):
        self._streams, self._tokenizer, self._rows = streams, tokenizer, rows
        self._seq_len, self._batch_size, self._seed = config.seq_len, config.batch_size, config.seed
        self._prefetch = config.prefetch
        self._pool = ThreadPoolExecutor(config.workers, "data-read") if config.workers else None
        fingerprints = [stream.documents.fingerprint for stream in streams]
        self._weights = None if config.mixture is None else [part.weight for part in config.mixture]
        self._identity: State = {
            "documents": fingerprints[0] if config.mixture is None else fingerprints,
            "tokenizer": tokenizer.fingerprint,
            "seed": config.seed,
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
        }
        if config.mixture is not None:
            self._identity |= {"weights": self._weights, "epochs": [part.epochs for part in config.mixture]}
        self._schedules: dict[tuple[int, ...], Schedule] = {}
        self._next_batch = 0
        self._counts: dict[str, int] = {}
        self._positions = self._snapshot()
        self._prefetcher = Prefetcher(self._produce, self._prefetch)

    def __iter__(self) -> StreamingBatches:
        return self

    def __next__(self) -> Batch:
        batch, self._counts, self._positions = self._prefetcher.next()
        return batch

    def tokens_by_corpus(self) -> dict[str, int]:
        """Target tokens of each corpus of a mixture in the last batch given (this process's rows)."""
        return self._counts

    def get_state(self) -> State:
        """The identity of the stream, and `lanes`: row -> [document, offset] for the rows of this process; of a mixture
        for each corpus by its number, and `next_batch`.
        """
        return {**self._identity, **self._positions}

    def set_state(self, state: State) -> None:
        """Continues exactly; raises `DataError` if the stream differs or rows of this process are missing.

        States of several processes are joined by `merge_states` before a restore on another number of processes.
        """
        before = state.get("documents")
        before = before if isinstance(before, list) else [before]
        if before != [None] and len(before) == len(self._streams):
            for stream, fingerprint in zip(self._streams, before, strict=True):
                stream.check(fingerprint)
        check_state(state, self._identity)
        lanes = [self._lanes_of(state, number) for number in range(len(self._streams))]
        self._prefetcher.close()
        for stream, positions in zip(self._streams, lanes, strict=True):
            stream.lanes = {row: _Lane(*positions[str(row)]) for row in self._rows}
        self._next_batch = int(state.get("next_batch", 0))
        self._positions = self._snapshot()
        self._prefetcher = Prefetcher(self._produce, self._prefetch)

    def _lanes_of(self, state: State, number: int) -> dict[str, Any]:
        lanes = state.get("lanes", {})
        lanes = lanes if self._weights is None else lanes.get(str(number), {})
        missing = [row for row in self._rows if str(row) not in lanes]
        if missing:
            raise DataError(f"data state: has no position for rows {missing}; join the states of all processes first")
        return lanes

    def close(self) -> None:
        """Stops the background threads."""
        self._prefetcher.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for stream in self._streams:
            stream.close()

    def _snapshot(self) -> State:
        lanes = [
            {str(row): [lane.document, lane.offset] for row, lane in stream.lanes.items()} for stream in self._streams
        ]
        if self._weights is None:
            return {"lanes": lanes[0]}
        return {"lanes": {str(i): positions for i, positions in enumerate(lanes)}, "next_batch": self._next_batch}

    def _produce(self) -> tuple[Batch, dict[str, int], State]:
        order = row_order(self._batch_size, self._seed, self._next_batch) if self._weights is not None else None
        numbers = {row: self._next_batch * self._batch_size + (order[row] if order else 0) for row in self._rows}
        parts: dict[int, list[np.ndarray]] = {row: [] for row in self._rows}
        missing = dict.fromkeys(self._rows, self._seq_len)
        streams = {row: self._choose(row, numbers[row]) for row in self._rows}
        counts = dict.fromkeys((stream.name for stream in self._streams if stream.name is not None), 0)
        empty = 0
        while missing:
            for row in list(missing):
                filled = 0
                while True:
                    stream = streams[row]
                    taken, columns = stream.lanes[row].take(missing[row])
                    parts[row] += taken
                    missing[row] -= columns
                    filled += columns
                    if stream.name is not None:
                        counts[stream.name] += columns
                    if not (missing[row] and stream.has_ended(row)):
                        break
                    streams[row] = self._choose(row, numbers[row])
                empty = 0 if filled else empty
                if not missing[row]:
                    del missing[row]
            if missing:
                empty += self._refill({row: streams[row] for row in missing})
                longest = max(len(streams[row].documents) for row in missing)
                if empty > max(_MAX_EMPTY, 2 * longest):
                    stream = streams[next(iter(missing))]
                    found = stream.skips.summary() or "every document is empty"
                    raise DataError(f"{stream.where}: no text to predict, {found}")
        self._next_batch += 1
        return _batch(list(parts.values()), self._seq_len), counts, self._snapshot()

    def _choose(self, row: int, number: int) -> _Stream:
        """The corpus of a sequence by its number in the run: of those that have not ended in this row."""
        if self._weights is None:
            return self._streams[0]
        going = tuple(i for i, stream in enumerate(self._streams) if not stream.has_ended(row))
        if going not in self._schedules:
            self._schedules[going] = Schedule([self._weights[i] for i in going])
        return self._streams[going[self._schedules[going].at(number)[0]]]

    def _refill(self, streams: dict[int, _Stream]) -> int:
        """Tokenises the next documents of some rows together (the tokenizer works in parallel); returns how many."""
        wanted = [
            (stream, stream.lanes[row], number, index)
            for row, stream in streams.items()
            for number, index in stream.wanted(row)
        ]
        read = self._pool.map if self._pool else map
        documents = read(lambda place: place[0].read(place[3]), wanted)
        texts = [stream.text(item) for (stream, *_), item in zip(wanted, documents, strict=True)]
        for (_, lane, number, _), ids in zip(wanted, self._tokenizer.encode_batch(texts), strict=True):
            lane.ready[number] = with_specials(ids, self._tokenizer.bos_id, self._tokenizer.eos_id)
        return len(wanted)


def _batch(lanes: list[list[np.ndarray]], seq_len: int) -> Batch:
    pairs = np.stack([np.concatenate(parts, axis=1) for parts in lanes])
    segment_ids = np.stack(
        [np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [part.shape[1] for part in parts]) for parts in lanes]
    )
    return Batch(
        tokens=np.ascontiguousarray(pairs[:, 0]),
        targets=np.ascontiguousarray(pairs[:, 1]),
        segment_ids=segment_ids,
        positions=positions_of(segment_ids),
        mask=np.ones((len(lanes), seq_len), bool),
    )


def streaming_batches(
    config: DataConfig,
    split: Split,
    tokenizer: Tokenizer,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> StreamingBatches:
    """Endless shuffled batches of `split`, tokenised on the way; of all corpora of a mixture.

    As in prepared mode every token after the first of its document is a target exactly once an epoch; unlike there,
    the last token of a document is no input (nothing follows it), so rows have no gaps and `mask` is all true. A
    document cut by the end of a row continues in the same row of the next batch (of a mixture: when that row has its
    corpus again). Raises `DataError` for a corpus that can't be read or has no text.
    """
    rows = rows_of_process(config.batch_size, process_index, process_count)
    if config.mixture is None:
        streams = [_Stream(config, split, rows, 0, None, None)]
    else:
        streams = [
            _Stream(config.of(part), split, rows, number, part.label, part.epochs)
            for number, part in enumerate(config.mixture)
        ]
    return StreamingBatches(config, streams, tokenizer, rows=rows)
