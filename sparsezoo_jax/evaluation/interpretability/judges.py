"""Judges that need no language model: stubs that test the measurement, and surrogates for want of a judge.

A judge sees windows' tokens, text and marks. Only the stubs look at the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from sparsezoo_jax.evaluation.interpretability.windows import Window


class Judge(Protocol):
    """Explains features and finds out by the explanation in which windows they are active."""

    @property
    def kind(self) -> str:
        """model, surrogate or stub."""
        ...

    def explain(self, train: Sequence[Window], others: Sequence[Window]) -> Any:
        """An explanation from activating windows; `others` are windows that don't activate."""
        ...

    def answer(self, explanation: Any, windows: Sequence[Window]) -> list[bool] | None:
        """Whether each window fits the explanation; None if there was no usable answer."""
        ...


class Stub:
    """Answers by a rule that knows the truth; for tests of the measurement."""

    kind = "stub"

    def __init__(self, rule: Callable[[Window], bool]):
        self.rule = rule

    def explain(self, train: Sequence[Window], others: Sequence[Window]) -> None:
        return None

    def answer(self, explanation: Any, windows: Sequence[Window]) -> list[bool]:
        return [self.rule(window) for window in windows]


class TokenSetJudge:
    """The tokens that carry 80 % of the activation in the training windows: active iff one of them is there.

    Marks, where there are any, must be on one of them instead.
    """

    kind = "surrogate"
    share = 0.8

    def explain(self, train: Sequence[Window], others: Sequence[Window]) -> frozenset[int]:
        mass: Counter[int] = Counter()
        for window in train:
            for token, activation in zip(window.tokens, window.activations, strict=True):
                mass[token] += max(activation, 0)  # pyright: ignore[reportArgumentType]
        chosen, covered, total = set(), 0.0, sum(mass.values())
        for token, weight in mass.most_common():
            if covered >= self.share * total:
                break
            chosen.add(token)
            covered += weight
        return frozenset(chosen)

    def answer(self, explanation: frozenset[int], windows: Sequence[Window]) -> list[bool]:
        def looked_at(window: Window) -> set[int]:
            return {window.tokens[i] for i in window.marks} if window.marks else set(window.tokens)

        return [bool(explanation & looked_at(window)) for window in windows]


def ngrams(window: Window, longest: int = 3) -> set[tuple[int, ...]]:
    """All runs of up to `longest` tokens; of a marked window those that end with a marked token."""
    n = len(window.tokens)
    ends = window.marks if window.marks else range(n)
    return {
        window.tokens[end + 1 - size : end + 1] for end in ends for size in range(1, longest + 1) if end + 1 >= size
    }


class NGramJudge:
    """Logistic regression on which runs of up to three tokens a window contains, fitted to the training windows."""

    kind = "surrogate"

    def __init__(self, steps: int = 1000, rate: float = 0.5, decay: float = 1e-3):
        self.steps, self.rate, self.decay = steps, rate, decay

    def explain(self, train: Sequence[Window], others: Sequence[Window]) -> tuple[dict, np.ndarray, float]:
        # Marks of training windows would make them differ from the others by length alone.
        bare = [Window(w.tokens, w.pieces, w.activations, w.bucket) for w in train]
        bags = [ngrams(window) for window in (*bare, *others)]
        counts = Counter(gram for bag in bags for gram in bag)
        index = {gram: i for i, gram in enumerate(g for g, c in counts.items() if c > 1)}
        x = np.zeros((len(bags), len(index)))
        for row, bag in enumerate(bags):
            x[row, [index[gram] for gram in bag if gram in index]] = 1
        y = np.array([1.0] * len(bare) + [0.0] * len(others))
        # Both classes weigh the same.
        weight = np.where(y > 0, 0.5 / max(len(bare), 1), 0.5 / max(len(others), 1))
        w, b = np.zeros(x.shape[1]), 0.0
        for _ in range(self.steps):
            error = weight * (1 / (1 + np.exp(-(x @ w + b))) - y)
            w -= self.rate * (x.T @ error + self.decay * w)
            b -= self.rate * error.sum()
        return index, w, b

    def answer(self, explanation: tuple[dict, np.ndarray, float], windows: Sequence[Window]) -> list[bool]:
        index, w, b = explanation
        return [bool(w[[index[gram] for gram in ngrams(x) if gram in index]].sum() + b > 0) for x in windows]


class SimilarityJudge:
    """TF-IDF cosine: active iff a window is more like the training windows than like those that don't activate."""

    kind = "surrogate"

    def explain(self, train: Sequence[Window], others: Sequence[Window]) -> tuple[dict[int, float], dict, dict]:
        documents = [set(w.tokens) for w in (*train, *others)]
        seen = Counter(token for tokens in documents for token in tokens)
        idf = {token: float(np.log(len(documents) / count)) for token, count in seen.items()}
        return idf, self._mean(train, idf), self._mean(others, idf)

    def answer(self, explanation: Any, windows: Sequence[Window]) -> list[bool]:
        idf, near, far = explanation

        def dot(a: dict[int, float], b: dict[int, float]) -> float:
            return sum(value * b.get(token, 0.0) for token, value in a.items())

        vectors = [self._vector(window, idf) for window in windows]
        return [dot(vector, near) > dot(vector, far) for vector in vectors]

    def _vector(self, window: Window, idf: dict[int, float]) -> dict[int, float]:
        tokens = [window.tokens[i] for i in window.marks] if window.marks else window.tokens
        raw = {token: count * idf.get(token, 0.0) for token, count in Counter(tokens).items()}
        norm = sum(value**2 for value in raw.values()) ** 0.5
        return {token: value / norm for token, value in raw.items()} if norm else {}

    def _mean(self, windows: Sequence[Window], idf: dict[int, float]) -> dict[int, float]:
        total: Counter[int] = Counter()
        for window in windows:
            bare = Window(window.tokens, window.pieces, window.activations)
            total.update(self._vector(bare, idf))  # pyright: ignore[reportArgumentType]
        return {token: value / max(len(windows), 1) for token, value in total.items()}


def built_in_judge(name: str, seed: int = 0) -> Judge:
    """A surrogate (tokens, ngrams, similarity) or a stub (oracle, constant, coin, noisy_oracle: 1 in 5 wrong)."""
    rng = np.random.default_rng(seed)
    judges: dict[str, Callable[[], Judge]] = {
        "tokens": TokenSetJudge,
        "ngrams": NGramJudge,
        "similarity": SimilarityJudge,
        "oracle": lambda: Stub(lambda window: window.active),
        "constant": lambda: Stub(lambda window: True),
        "coin": lambda: Stub(lambda window: bool(rng.random() < 0.5)),
        "noisy_oracle": lambda: Stub(lambda window: window.active != (rng.random() < 0.2)),
    }
    return judges[name]()
