"""The documents of several files: a split of them, in parts or one by its index."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsezoo_jax.data.documents import PART_BYTES, BadDocumentError, Document, Part, Skipped, SourceFile, digest
from sparsezoo_jax.data.local_files.file import Entry, File
from sparsezoo_jax.data.local_files.unpacked import UnpackedFile
from sparsezoo_jax.data.sources import scan_all

#: Changes whenever the same files give other documents.
_RECIPE = "local-2"
#: Random access begins to read at most so many documents before the one that is wanted.
_BLOCK = 16


@dataclass(frozen=True)
class Share:
    """The documents of a split: those whose id has a sha256 value below a threshold are held out.

    Attributes:
      fraction: held out; None: the split is all documents.
      held: whether the split is those that are held out.
      exception: the one document that is held out although none is below the threshold, or not although all are.
    """

    fraction: float | None
    held: bool = False
    exception: str | None = None

    @property
    def whole(self) -> bool:
        """Whether all documents are in the split."""
        return self.fraction is None

    def has(self, id: str) -> bool:
        """Whether a document is in the split."""
        if self.fraction is None:
            return True
        below = _hash(id) < self.threshold
        return (below != (id == self.exception)) == self.held

    @functools.cached_property
    def threshold(self) -> int:
        """Of the first 64 bits of the hash."""
        return int((self.fraction or 0) * 2**64)

    def __str__(self) -> str:
        return "all" if self.fraction is None else f"{'validation' if self.held else 'train'}:{self.fraction}"


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def held_out(files: Sequence[File], fraction: float, held: bool) -> Share | None:
    """The share of a split: at least one document is held out, and never all; None if there is but one document.

    It looks at documents only until it has seen one of either kind, which are few unless `fraction` is near 0 or 1.
    """
    share = Share(fraction, held)
    lowest = highest = None
    below = above = False
    for id in (file.id(number) for file in files for number in file.numbers()):
        value = (_hash(id), id)
        below, above = below or value[0] < share.threshold, above or value[0] >= share.threshold
        if below and above:
            return share
        lowest = min(lowest or value, value)
        highest = max(highest or value, value)
    if lowest is None or highest is None or lowest == highest:
        return None
    return Share(fraction, held, exception=highest[1] if below else lowest[1])


class LocalDocuments:
    """Some of the documents in a list of files, in the order of the files."""

    def __init__(self, files: Sequence[File], share: Share, cache: Path):
        self._files, self._share, self._cache = files, share, cache

    @property
    def fingerprint(self) -> str:
        """Of `contents` and what decides which texts are read."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return digest(_RECIPE, self._files[0].text_field, self._share, list(self.contents.items()))

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """Name -> digest of each file. The first call reads those that are not remembered, several at a time."""
        scan_all(self.files, PART_BYTES, self._cache)
        return {file.name: file.digest() for file in self._files}

    @property
    def files(self) -> Sequence[SourceFile]:
        """Those of them that are files on this machine."""
        return [SourceFile(file.name, file.path) for file in self._files if file.path.is_file()]

    def __bool__(self) -> bool:
        return True  # `open_local` opens no empty ones, and their length takes a pass

    def __len__(self) -> int:
        return self._index.total

    def __getitem__(self, index: int, /) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file, entry = self._index.find(index)
        return Document(file.id(entry.number), file.text(entry))

    def __iter__(self) -> Iterator[Document]:
        for part in range(len(self.parts())):
            yield from (document for document in self.read(part) if isinstance(document, Document))

    def parts(self) -> Sequence[Part]:
        """Pieces of files, small ones together: about `PART_BYTES` each."""
        parts = []
        for pieces in self._plan:
            (first, piece, _), (last, _, _) = pieces[0], pieces[-1]
            one = self._files[first].name + (f"#{piece}" if len(self._files[first].pieces()) > 1 else "")
            name = one if len(pieces) == 1 else f"{one} to {self._files[last].name}"
            parts.append(Part(name, sum(size for _, _, size in pieces)))
        return parts

    def read(self, part: int) -> Iterator[Document | Skipped]:
        """The documents of the split in a part, in order."""
        for number, piece, _ in self._plan[part]:
            file = self._files[number]
            for entry in file.entries(piece):
                id = file.id(entry.number)
                if not self._share.has(id):
                    continue
                try:
                    yield Document(id, file.text(entry))
                except BadDocumentError as error:
                    yield error.skipped

    @functools.cached_property
    def _plan(self) -> list[list[tuple[int, int, int]]]:
        """The (file, piece, bytes) of each part."""
        plan: list[list[tuple[int, int, int]]] = []
        filled = 0
        for number, file in enumerate(self._files):
            for piece, size in enumerate(file.pieces()):
                if not plan or filled + size > PART_BYTES:
                    plan.append([])
                    filled = 0
                plan[-1].append((number, piece, size))
                filled += size
        return plan

    @functools.cached_property
    def _index(self) -> _Index:
        files = [file if file.seekable else UnpackedFile(file, self._cache) for file in self._files]
        return _Index(files, self._share)


class _Index:
    """Where to begin reading for each document of a split: a place for every `_BLOCK`-th of them."""

    def __init__(self, files: Sequence[File], share: Share):
        self._share, self._files = share, files
        # Of each block: its file, where it begins there, and how many documents are before it.
        self._numbers, self._places, self._entries, self._firsts = (array("q") for _ in range(4))
        self.total = 0
        for number, file in enumerate(files):
            if share.whole and file.rows is not None:
                if file.rows:
                    self._begin(number, 0, 0)
                    self.total += file.rows
                continue
            for place, entry in enumerate(self._chosen(file, self._all(file))):
                if place % _BLOCK == 0:
                    self._begin(number, entry.place, entry.number)
                self.total += 1

    def _begin(self, file: int, place: int, entry: int) -> None:
        self._numbers.append(file)
        self._places.append(place)
        self._entries.append(entry)
        self._firsts.append(self.total)

    def _all(self, file: File) -> Iterator[Entry]:
        if file.rows is not None:
            return (Entry(row, row, None) for row in range(file.rows))
        return itertools.chain.from_iterable(file.entries(piece) for piece in range(len(file.pieces())))

    def _chosen(self, file: File, entries: Iterator[Entry]) -> Iterator[Entry]:
        return (entry for entry in entries if self._share.has(file.id(entry.number)))

    def find(self, index: int) -> tuple[File, Entry]:
        """The file and the entry of a document of the split."""
        block = bisect.bisect_right(self._firsts, index) - 1
        file, ahead = self._files[self._numbers[block]], index - self._firsts[block]
        place, number = self._places[block], self._entries[block]
        if self._share.whole and file.rows is not None:
            return file, next(file.entries_at(place + ahead, number + ahead))
        return file, next(itertools.islice(self._chosen(file, file.entries_at(place, number)), ahead, None))
