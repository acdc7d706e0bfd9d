"""Windows of text with one feature's activations, and the samples of them that explain and test a feature.

Source: the protocol of MoE-X (arXiv 2503.07639), section 5.2 and appendix D, which is that of EleutherAI's delphi.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DECILES = 10
_OTHERS = 5
"""Most windows that don't activate, for each activating one, that a feature is explained with."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one sequence, and how a feature responds to them."""

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    """Text of each token."""
    activations: tuple[float, ...]
    bucket: int = 0
    """0: not active; 1 to 10: tenth of the activating windows by largest activation, 10 the largest."""
    marks: tuple[int, ...] = ()
    """Positions that are shown as marked."""

    @property
    def active(self) -> bool:
        """What a judge is to find out."""
        return self.bucket > 0

    @property
    def text(self) -> str:
        """The text, marked tokens between << and >>."""
        return "".join(f"<<{piece}>>" if i in self.marks else piece for i, piece in enumerate(self.pieces))


@dataclass(frozen=True)
class Samples:
    """What one feature is explained and tested with."""

    train: tuple[Window, ...]
    """Activating windows, the activating tokens marked."""
    others: tuple[Window, ...]
    """Windows that don't activate, none of them tested on: what the training windows are told apart from."""
    detection: tuple[Window, ...]
    """Test windows without marks: as many activating ones of each tenth, and as many others in all."""
    fuzzing: tuple[Window, ...]
    """The same with marks: on the activating tokens, or on as many random ones where nothing activates."""


def windows_of(
    tokens_CT: np.ndarray, activations_CT: np.ndarray, pieces_CT: Sequence[Sequence[str]], size: int
) -> list[Window]:
    """The sequences cut into windows of `size` tokens (what is left of a sequence is dropped); buckets are 0.

    `pieces_CT` is the text of each token where it stands.
    """
    count = tokens_CT.shape[1] // size
    tokens = tokens_CT[:, : count * size].reshape(-1, size)
    activations = activations_CT[:, : count * size].reshape(-1, size)
    pieces = (tuple(row[i * size : (i + 1) * size]) for row in pieces_CT for i in range(count))
    return [
        Window(tuple(int(t) for t in row), text, tuple(float(a) for a in values))
        for row, text, values in zip(tokens, pieces, activations, strict=True)
    ]


def sample(
    peak_W: np.ndarray, *, train: int, test: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray] | None:
    """Indices of windows by their largest activation: for training, for each tenth, not activating, and more of those.

    None where there are too few. Tests are drawn from what training leaves over; the last ones are in no test.
    """
    active, silent = np.flatnonzero(peak_W > 0), np.flatnonzero(peak_W <= 0)
    if len(active) < train + test or len(silent) < train + test:
        return None
    shuffled = rng.permutation(active)
    rest = shuffled[train:]
    ranked = rest[np.argsort(peak_W[rest], kind="stable")]
    slices = np.array_split(ranked, DECILES)
    each = test // DECILES
    if min(len(part) for part in slices) < each:
        return None
    tests = [rng.choice(part, each, replace=False) for part in slices]
    silent = rng.permutation(silent)
    return shuffled[:train], tests, silent[:test], silent[test : test + _OTHERS * train]


def samples_of(windows: list[Window], *, train: int, test: int, rng: np.random.Generator) -> Samples | None:
    """Samples of one feature from all its windows; None where there are too few."""
    peak_W = np.array([max(window.activations) for window in windows])
    drawn = sample(peak_W, train=train, test=test, rng=rng)
    if drawn is None:
        return None
    shown, tenths, silent, rest = drawn
    explained = tuple(_marked(windows[i], 1) for i in shown)
    buckets = [(int(i), bucket) for bucket, part in enumerate(tenths, 1) for i in part]
    buckets += [(int(i), 0) for i in silent]
    order = [buckets[i] for i in rng.permutation(len(buckets))]
    active = [(i, bucket) for i, bucket in order if bucket]
    number = math.ceil(np.mean([sum(a > 0 for a in windows[i].activations) for i, _ in active]))
    plain, fuzzed = [], []
    for i, bucket in order:
        window = windows[i]
        plain.append(_with(window, bucket, ()))
        if bucket:
            fuzzed.append(_marked(window, bucket))
        else:
            size = len(window.tokens)
            marks = rng.choice(size, min(number, size), replace=False)
            fuzzed.append(_with(window, 0, tuple(sorted(int(m) for m in marks))))
    return Samples(explained, tuple(windows[i] for i in rest), tuple(plain), tuple(fuzzed))


def _marked(window: Window, bucket: int) -> Window:
    """With marks on the tokens that reach 30 % of the largest activation."""
    limit = 0.3 * max(window.activations)
    return _with(window, bucket, tuple(i for i, a in enumerate(window.activations) if a > 0 and a >= limit))


def _with(window: Window, bucket: int, marks: tuple[int, ...]) -> Window:
    return Window(window.tokens, window.pieces, window.activations, bucket, marks)
