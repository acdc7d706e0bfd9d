"""Batches tokenised while training, for corpora that should not be prepared.

Every row of the global batch is a lane of its own: of the shuffled documents, lane r of B reads number r, r + B, r +
2B, ... and packs them one after another. So batch n does not depend on the number of processes, rows of a batch come
from different documents, and a position is two numbers a lane (document, offset), which restores exactly without
replaying anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sparsezoo_jax.data import sources
from sparsezoo_jax.data.batches import Batch, Prefetcher, State, check_state, endless_order, rows_of_process
from sparsezoo_jax.data.config import DataConfig, cache_directory
from sparsezoo_jax.data.corpora import corpus_name, open_documents
from sparsezoo_jax.data.documents import BadDocumentError, Document, Documents, Skipped, Split, files_of
from sparsezoo_jax.data.packing import positions_of, with_specials
from sparsezoo_jax.data.preparation import prepared_directory
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


class StreamingBatches:
    """The `BatchIterator` that tokenises as it goes; see `streaming_batches`."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, *, config: DataConfig, rows: range):
        self._documents, self._tokenizer, self._rows = documents, tokenizer, rows
        self._seq_len, self._lanes_count, self._prefetch = config.seq_len, config.batch_size, config.prefetch
        self._order = endless_order(len(documents), config.seed)
        self._pool = ThreadPoolExecutor(config.workers, "data-read") if config.workers else None
        self._identity = {
            "documents": documents.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seed": config.seed,
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
        }
        self._skips = Skips.of(config)
        self._dataset, self._cache = config.dataset, cache_directory(config)
        sources.keep(documents.fingerprint, files_of(documents), self._cache)
        self._lanes = {row: _Lane() for row in rows}
        self._positions = self._snapshot()
        self._prefetcher = Prefetcher(self._produce, self._prefetch)

    def __iter__(self) -> StreamingBatches:
        return self

    def __next__(self) -> Batch:
        batch, self._positions = self._prefetcher.next()
        return batch

    def get_state(self) -> State:
        """The identity of the stream, and `lanes`: row -> [document, offset] for the rows of this process."""
        return {**self._identity, "lanes": self._positions}

    def set_state(self, state: State) -> None:
        """Continues exactly; raises `DataError` if the stream differs or rows of this process are missing.

        States of several processes are joined by `merge_states` before a restore on another number of processes.
        """
        if state.get("documents", documents := self._identity["documents"]) != documents:
            before = sources.kept(state["documents"], self._cache)
            raise DataError(sources.changed(self._dataset, before, files_of(self._documents)))
        check_state(state, self._identity)
        lanes = state.get("lanes", {})
        missing = [row for row in self._rows if str(row) not in lanes]
        if missing:
            raise DataError(f"data state: has no position for rows {missing}; join the states of all processes first")
        self._prefetcher.close()
        self._lanes = {row: _Lane(*lanes[str(row)]) for row in self._rows}
        self._positions = self._snapshot()
        self._prefetcher = Prefetcher(self._produce, self._prefetch)

    def close(self) -> None:
        """Stops the background threads."""
        self._prefetcher.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._skips.warn("data.dataset")
        self._skips = Skips()

    def _snapshot(self) -> dict[str, list[int]]:
        return {str(row): [lane.document, lane.offset] for row, lane in self._lanes.items()}

    def _produce(self) -> tuple[Batch, dict[str, list[int]]]:
        parts: dict[int, list[np.ndarray]] = {row: [] for row in self._lanes}
        missing = dict.fromkeys(self._lanes, self._seq_len)
        empty = 0
        while missing:
            for row in list(missing):
                taken, filled = self._lanes[row].take(missing[row])
                parts[row] += taken
                missing[row] -= filled
                empty = 0 if filled else empty
                if not missing[row]:
                    del missing[row]
            if missing:
                empty += self._refill(missing)
                if empty > max(_MAX_EMPTY, 2 * len(self._documents)):
                    found = self._skips.summary() or "every document is empty"
                    raise DataError(f"data.dataset: no text to predict, {found}")
        return _batch(list(parts.values()), self._seq_len), self._snapshot()

    def _refill(self, rows: Iterable[int]) -> int:
        """Tokenises the next documents of some lanes together (the tokenizer works in parallel); returns how many."""
        wanted = [
            (lane, lane.document + i, self._order(row + (lane.document + i) * self._lanes_count))
            for row, lane in ((row, self._lanes[row]) for row in rows)
            for i in range(_LOOKAHEAD)
        ]
        documents = (self._pool.map if self._pool else map)(self._document, (index for _, _, index in wanted))
        texts = list(map(self._text, documents))
        for (lane, number, _), ids in zip(wanted, self._tokenizer.encode_batch(texts), strict=True):
            lane.ready[number] = with_specials(ids, self._tokenizer.bos_id, self._tokenizer.eos_id)
        return len(wanted)

    def _document(self, index: int) -> Document | Skipped:
        try:
            return self._documents[index]
        except BadDocumentError as error:
            return error.skipped

    def _text(self, item: Document | Skipped) -> str:
        """Its text, nothing for one that is skipped. The first of these are named as they are met."""
        named = len(self._skips.named)
        document = self._skips.take(item)
        for fault in self._skips.named[named:]:
            warnings.warn(f"data.dataset: skipped {fault}", SparsezooWarning, stacklevel=2)
        return "" if document is None else document.text


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
    """Endless shuffled batches of `split`, tokenised on the way.

    As in prepared mode every token after the first of its document is a target exactly once an epoch; unlike there,
    the last token of a document is no input (nothing follows it), so rows have no gaps and `mask` is all true. A
    document cut by the end of a row continues in the same row of the next batch. Raises `DataError` for a corpus that
    can't be read or has no text.
    """
    rows = rows_of_process(config.batch_size, process_index, process_count)
    if prepared_directory(config, split) is not None:
        raise DataError(
            f"data.dataset={corpus_name(config, split)}: is a prepared corpus; data.mode=streaming reads text"
        )
    return StreamingBatches(open_documents(config, split), tokenizer, config=config, rows=rows)
