"""A corpus as documents in a fixed order, whatever it is stored in: read part by part, or one by its index.

Preparing reads parts, several at a time on several cores; streaming needs random access. Both give the same texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sparsezoo_jax.errors import DataError

Split = Literal["train", "validation"]

#: Raw bytes that a part has, about.
PART_BYTES = 32_000_000
#: Documents in a part of a corpus that tells nothing of its size.
PART_DOCUMENTS = 4096


class Document(NamedTuple):
    """One text and an id that is unique in its corpus."""

    id: str
    text: str


class Skipped(NamedTuple):
    """A document that has no text to give."""

    where: str
    """Its place, as file:line."""
    reason: str
    """Why, one of few texts, by which such documents are counted."""
    detail: str = ""
    """What was found there, in one line."""


class BadDocumentError(DataError):
    """Raised by random access for a document that reading in order gives as `skipped`."""

    def __init__(self, where: str, reason: str, detail: str = ""):
        self.skipped = Skipped(where, reason, detail)
        super().__init__(f"{where}: {detail or reason}")


class Part(NamedTuple):
    """A piece of a corpus that can be read without the others."""

    name: str
    bytes: int
    """Its raw size, about."""


class SourceFile(NamedTuple):
    """A file of a corpus."""

    name: str
    """Relative to the corpus."""
    path: Path


class Documents(Protocol):
    """A split of a corpus, and a fingerprint that changes when any of its documents does.

    Documents that can't be read have an index and a place in a part like others. Objects can be pickled, and what
    `parts` found out goes with them.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document:
        """Document number `index` of the split.

        Raises:
          BadDocumentError: it can't be read. IndexError: there is none. StorageError: the disk can't be read.
        """
        ...

    def parts(self) -> Sequence[Part]:
        """The parts in the order of the corpus; the same wherever and whenever it is opened."""
        ...

    def read(self, part: int) -> Iterator[Document | Skipped]:
        """Those documents of a part that are in the split, in order, held in memory one (or one row group) at a time.

        Raises:
          StorageError: the disk can't be read, or a file is damaged.
        """
        ...


class InRanges:
    """`parts` and `read` for documents with random access alone: ranges of indices.

    A base class; `PART_DOCUMENTS` documents are a part.
    """

    total_bytes = 0
    """Raw bytes of all documents; 0 if they are not known."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int, /) -> Document:
        raise NotImplementedError

    def parts(self) -> Sequence[Part]:
        """Ranges of `PART_DOCUMENTS` documents."""
        parts, count = [], len(self)
        for start in range(0, count, PART_DOCUMENTS):
            end = min(start + PART_DOCUMENTS, count)
            parts.append(Part(f"documents {start}-{end - 1}", self.total_bytes * (end - start) // count))
        return parts

    def read(self, part: int) -> Iterator[Document | Skipped]:
        """The documents of one range."""
        start = part * PART_DOCUMENTS
        for index in range(start, min(start + PART_DOCUMENTS, len(self))):
            try:
                document = self[index]
            except BadDocumentError as error:
                yield error.skipped
            else:
                yield document


class _Adapted(InRanges):
    """Documents with random access alone, in ranges."""

    def __init__(self, documents: Indexed):
        self._documents = documents

    @property
    def fingerprint(self) -> str:
        return self._documents.fingerprint

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int, /) -> Document:
        return self._documents[index]


def changed_files(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """What differs between the contents of a corpus at two times (`LocalDocuments.contents`), in one line; "" if
    nothing does.
    """
    kinds = {
        "changed": [name for name in before if name in after and before[name] != after[name]],
        "gone": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
    }
    shown = []
    for kind, names in kinds.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        shown += [f"{kind}: {', '.join(names[:3])}{more}"] if names else []
    return "; ".join(shown)


def with_parts(documents: Indexed) -> Documents:
    """`documents` with `parts` and `read`, which are made of random access where a corpus has none of its own."""
    whole: Any = documents
    return whole if hasattr(whole, "parts") and hasattr(whole, "read") else _Adapted(documents)


def files_of(documents: Documents) -> Sequence[SourceFile]:
    """The files that a corpus is read from; empty for one that does not tell (`files`) and answers for its fingerprint
    itself.
    """
    return getattr(documents, "files", ())


def read_all(documents: Documents) -> Iterator[Document | Skipped]:
    """All documents of the split in order."""
    for part in range(len(documents.parts())):
        yield from documents.read(part)


def readable(documents: Iterable[Document | Skipped]) -> Iterator[Document]:
    """Those that have a text."""
    return (document for document in documents if isinstance(document, Document))


class Indexed(Protocol):
    """What a corpus must offer at least: documents by their index, and a fingerprint of them. `with_parts` makes the
    rest of `Documents` of it.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def digest(*parts: object) -> str:
    """A short fingerprint of some values (32 hex digits)."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]
