"""Documents to fixed-length records in which no document sees another.

Names of shapes: N records, T sequence length, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Records(NamedTuple):
    """Packed records.

    Attributes:
      tokens: int32 [N, T+1].
      segment_ids: int32 [N, T+1]; 1, 2, ... for the documents in a record, 0 for padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


class Packer:
    """Concatenates documents and cuts the stream into records of T+1 tokens that start every T tokens.

    The last token of a record is the first of the next, so that with inputs `[:, :-1]` and targets `[:, 1:]` every
    token after the first of its document is a target exactly once. Only a tail shorter than a record is padded.
    """

    dropped = 0

    def __init__(self, seq_len: int, pad_id: int):
        self._seq_len, self._pad_id = seq_len, pad_id
        self._tokens = np.zeros(0, np.int32)
        self._documents = np.zeros(0, np.int64)
        self._count = 0

    def push(self, documents: Sequence[np.ndarray]) -> Records:
        """Adds token documents (int [L] each); returns the records that are complete now."""
        lengths = [len(document) for document in documents]
        numbers = np.arange(self._count, self._count + len(documents), dtype=np.int64)
        self._count += len(documents)
        self._tokens = np.concatenate([self._tokens, *documents]).astype(np.int32, copy=False)
        self._documents = np.concatenate([self._documents, np.repeat(numbers, lengths)])
        count = max(len(self._tokens) - 1, 0) // self._seq_len
        return self._cut(count)

    def finish(self) -> Records:
        """Returns the padded tail: one record, or none if every target is in a record already."""
        missing = self._seq_len + 1 - len(self._tokens)
        if len(self._tokens) <= 1:
            return self._cut(0)
        self._tokens = np.pad(self._tokens, (0, missing), constant_values=self._pad_id)
        self._documents = np.pad(self._documents, (0, missing), constant_values=-1)
        return self._cut(1)

    def _cut(self, count: int) -> Records:
        size = self._seq_len + 1
        rows = np.arange(count)[:, None] * self._seq_len + np.arange(size)[None, :]
        tokens, documents = self._tokens[rows], self._documents[rows]
        self._tokens = self._tokens[count * self._seq_len :]
        self._documents = self._documents[count * self._seq_len :]
        starts = documents[:, 1:] != documents[:, :-1]
        segment_ids = np.ones((count, size), np.int32)
        segment_ids[:, 1:] += np.cumsum(starts, axis=1, dtype=np.int32)
        return Records(tokens, np.where(documents >= 0, segment_ids, 0).astype(np.int32))


class BlockPacker:
    """Begins every record of T+1 tokens with a document, fills it with the next ones, and leaves out what of the last
    one does not fit. A tail shorter than a record is padded.
    """

    def __init__(self, seq_len: int, pad_id: int):
        self._size, self._pad_id = seq_len + 1, pad_id
        self._block: list[np.ndarray] = []
        self._filled = 0
        self.dropped = 0
        """Tokens that were left out."""

    def push(self, documents: Sequence[np.ndarray]) -> Records:
        """Adds token documents (int [L] each); returns the records that are complete now."""
        complete = []
        for document in documents:
            if not len(document):
                continue
            kept = document[: self._size - self._filled]
            self._block.append(kept)
            self._filled += len(kept)
            self.dropped += len(document) - len(kept)
            if self._filled == self._size:
                complete.append(self._take())
        return self._records(complete)

    def finish(self) -> Records:
        """Returns the padded tail: one record, or none."""
        return self._records([self._take()] if self._block else [])

    def _take(self) -> Records:
        lengths = [len(part) for part in self._block]
        gap = (0, self._size - self._filled)
        tokens = np.pad(np.concatenate(self._block), gap, constant_values=self._pad_id)
        segment_ids = np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths), gap)
        self._block, self._filled = [], 0
        return Records(tokens.astype(np.int32), segment_ids.astype(np.int32))

    def _records(self, rows: list[Records]) -> Records:
        if not rows:
            return Records(*(np.zeros((0, self._size), np.int32) for _ in Records._fields))
        return Records(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 with every segment of a row; int32 [N, T] for segment ids [N, T]. 0 in padding."""
    index = np.arange(segment_ids.shape[1], dtype=np.int32)
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return np.where(segment_ids > 0, index - first, 0).astype(np.int32)


def target_mask(segment_ids: np.ndarray) -> np.ndarray:
    """Whether token t+1 is a target of token t: both in the same document; bool [N, T] for segment ids [N, T+1]."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)


def with_specials(ids: Sequence[int], bos_id: int | None, eos_id: int | None) -> np.ndarray:
    """`<bos> ids <eos>` as int32, leaving out a special the tokenizer lacks; nothing at all for a document without
    text.
    """
    if not len(ids):
        return np.zeros(0, np.int32)
    bos = [] if bos_id is None else [bos_id]
    eos = [] if eos_id is None else [eos_id]
    return np.array([*bos, *ids, *eos], np.int32)
