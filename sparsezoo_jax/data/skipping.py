"""What is done with documents that can't be read: skipped and counted up to a share of them, or an error at the first.

A document that is read, but that a corpus leaves out by its own rule (a game of Chess960), is counted too, and is no
fault.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsezoo_jax.data.chess.pgn import NULL_MOVE, OTHER_START, VARIANT
from sparsezoo_jax.data.documents import BadDocumentError, Document, Skipped
from sparsezoo_jax.errors import DataError, SparsezooWarning

if TYPE_CHECKING:
    from sparsezoo_jax.data.config import DataConfig

# The reasons of `Skipped`, besides those of `chess.pgn`.
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_CSV = "not a row of the table"
NO_TEXT = "no text in data.text_field"
NULL_TEXT = "null in data.text_field"
NOT_TEXT = "no string in data.text_field"
HALF_SURROGATE = "half a surrogate pair"
TOO_LONG = "too long"
#: What is left out by rule: counted, but neither an error nor part of `data.max_bad_fraction`.
LEFT_OUT = frozenset({OTHER_START, VARIANT, NULL_MOVE})

#: So many documents at least are what `data.max_bad_fraction` is a fraction of, or one bad line in fifty would be 2 %.
FEWEST = 1000
#: So many bad documents are named.
NAMED = 3


@dataclass
class Skips:
    """Counts of the documents that were read and skipped, under the policy of a configuration.

    `take` one document after another (or `add` the counts of another process), then `finish`.

    Attributes:
      documents: seen, the skipped ones included.
      reasons: reason -> how many.
      named: the first few, as "file:line: what was found".
      failed: whether they have led to an error, which says what there is to say.
    """

    stop: bool = False
    max_bad_fraction: float = 0.01
    documents: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    failed: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> Skips:
        """Nothing counted yet, under the policy that `config` names."""
        return cls(config.on_bad_document == "stop", config.max_bad_fraction)

    @property
    def bad(self) -> int:
        """Documents that could not be read; those left out by rule are none of them."""
        return sum(count for reason, count in self.reasons.items() if reason not in LEFT_OUT)

    @property
    def skipped(self) -> int:
        """All documents that were skipped."""
        return sum(self.reasons.values())

    def take(self, item: Document | Skipped) -> Document | None:
        """Counts a document and gives it back, None if it is a skipped one.

        Raises:
          DataError: it can't be read and `data.on_bad_document` is stop, or too many can't be.
        """
        self.documents += 1
        if isinstance(item, Document):
            return item
        self.reasons[item.reason] = self.reasons.get(item.reason, 0) + 1
        bad = item.reason not in LEFT_OUT
        if self.stop and bad:
            self.failed = True
            raise BadDocumentError(*item)
        # Faults are named before what is left out by rule.
        if bad and len(self.named) < NAMED:
            self.named.append(f"{item.where}: {item.detail or item.reason}")
        self.check()
        return None

    def add(self, other: Skips) -> None:
        """Adds what another process counted, of later parts of the corpus.

        Raises:
          DataError: as for `take`.
        """
        self.documents += other.documents
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.named += other.named[: NAMED - len(self.named)]
        self.check()

    def check(self) -> None:
        """Raises `DataError` if more than `data.max_bad_fraction` of the documents can't be read."""
        if self.bad > self.max_bad_fraction * max(self.documents, FEWEST):
            self.failed = True
            raise DataError(
                f"data.max_bad_fraction={self.max_bad_fraction:g}: {self.bad:,} of {self.documents:,} documents "
                f"can't be read ({self._counts()}): {'; '.join(self.named)}"
            )

    def summary(self) -> str | None:
        """How many were skipped, why, and the first of them, in one line; None if none was."""
        if not self.skipped:
            return None
        first = f"; first {'; '.join(self.named)}" if self.named else ""
        return f"{self.skipped:,} of {self.documents:,} documents skipped ({self._counts()}){first}"

    def warn(self, name: str) -> None:
        """Shows the summary, if there is one, as a warning about `name`."""
        summary = self.summary()
        if summary is not None and not self.failed:
            warnings.warn(f"{name}: {summary}", SparsezooWarning, stacklevel=2)

    def as_dict(self) -> dict[str, Any]:
        """What was counted, for JSON."""
        return {"documents": self.documents, "reasons": dict(self.reasons), "named": list(self.named)}

    def _counts(self) -> str:
        counts = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count:,} {reason}" for reason, count in counts)


def accepted(items: Iterable[Document | Skipped], skips: Skips) -> Iterator[Document]:
    """The documents that can be read; others are counted in `skips`, which may raise `DataError`."""
    for item in items:
        document = skips.take(item)
        if document is not None:
            yield document
