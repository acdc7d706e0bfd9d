"""Drafts of the next tokens by looking the last ones up in the text so far."""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """Finds where the last tokens occurred before and proposes what followed there.

    The longest match of up to `ngram` tokens wins, of equally long ones the latest. Texts that repeat themselves or
    quote their prompt are continued well like this, without a second model.
    """

    def __init__(self, tokens: Sequence[int], *, drafts: int, ngram: int = 3):
        self.tokens: list[int] = []
        self.drafts, self.ngram = drafts, ngram
        # For each n-gram the place after its latest occurrence, and the one before: the last tokens themselves are the
        # latest occurrence of theirs.
        self._after: dict[tuple[int, ...], tuple[int, int | None]] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the text."""
        self.tokens.append(token)
        end = len(self.tokens)
        for length in range(1, min(self.ngram, end) + 1):
            key = tuple(self.tokens[end - length :])
            latest = self._after.get(key)
            self._after[key] = (end, None if latest is None else latest[0])

    def propose(self) -> list[int]:
        """`drafts` tokens: what followed the match, over and over; none where the last token is new."""
        for length in range(min(self.ngram, len(self.tokens)), 0, -1):
            _, before = self._after[tuple(self.tokens[-length:])]
            if before is not None:
                followed = self.tokens[before:]
                return [followed[i % len(followed)] for i in range(self.drafts)]
        return []
