"""A corpus as a sequence of documents with random access, whatever it is stored in."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple, Protocol

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """One text and an id that is unique in its corpus."""

    id: str
    text: str


class Documents(Protocol):
    """A split of a corpus: random access to its documents, and a fingerprint that changes when any of them does."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def digest(*parts: object) -> str:
    """A short fingerprint of some values (32 hex digits)."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]
