"""Detection and fuzzing: can a judge tell, by an explanation, where a feature is active?

Source: MoE-X (arXiv 2503.07639), section 5.2; the tasks are those of EleutherAI's delphi.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sparsezoo_jax.evaluation.features import Features
from sparsezoo_jax.evaluation.interpretability.config import InterpretEvaluation
from sparsezoo_jax.evaluation.interpretability.contexts import Batch, read_contexts, token_figures
from sparsezoo_jax.evaluation.interpretability.intervals import balanced, bootstrap
from sparsezoo_jax.evaluation.interpretability.judges import Judge
from sparsezoo_jax.evaluation.interpretability.windows import DECILES, Window, samples_of, windows_of
from sparsezoo_jax.evaluation.zipf import ZipfFit, zipf_fit

BUCKETS = ("Not", *(f"Q{i}" for i in range(1, DECILES + 1)))
"""Windows where the feature is not active, then tenths of its activation, the largest last."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """How a judge did on the windows of one feature."""

    accuracy: float | None
    """Balanced: mean of the shares of right answers on active and on other windows; None without both."""
    interval: tuple[float, float] | None
    """Its 95 % interval over windows."""
    by_bucket: tuple[float | None, ...]
    """Share of right answers, for each of `BUCKETS`."""
    answered: int
    failed: int
    """Windows without a usable answer: they count neither as right nor as wrong."""


@dataclasses.dataclass(frozen=True)
class FeatureScore:
    """One feature."""

    feature: int
    density: float
    """Share of tokens that activate it."""
    token_entropy: float
    """Entropy of its activation over tokens of the vocabulary, nats; exp of it is an effective number of tokens."""
    top_token_share: float
    """Share of its activation on the token that has most of it."""
    explanation: str
    tasks: dict[str, TaskScore]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over features with its 95 % interval by bootstrap; None where there is nothing to average."""

    mean: float | None
    low: float | None
    high: float | None
    """Bounds of the interval; None for fewer than two features."""


@dataclasses.dataclass(frozen=True)
class Interpretation:
    """The features of one layer."""

    judge: str
    judge_kind: str
    """model, surrogate or stub."""
    layer: int
    l0: float
    """Features of a token, mean."""
    dead: float
    """Share of features that no token activated."""
    density_histogram: dict[str, int]
    """Features by order of magnitude of their density."""
    zipf: ZipfFit | None
    """The law that densities follow over features' ranks; None for too few features that fire."""
    tokens: int
    accuracy: dict[str, Estimate]
    by_bucket: dict[str, tuple[Estimate, ...]]
    failed: dict[str, int]
    features: tuple[FeatureScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return {**dataclasses.asdict(self), "buckets": BUCKETS}


def judged(judge: Judge, explanation: Any, windows: Sequence[Window], at_once: int) -> TaskScore:
    """Ask the judge about all windows, some at a time."""
    right: list[list[bool]] = [[] for _ in BUCKETS]
    failed = 0
    for start in range(0, len(windows), at_once):
        shown = windows[start : start + at_once]
        answers = judge.answer(explanation, shown)
        if answers is None or len(answers) != len(shown):
            failed += len(shown)
            continue
        for window, answer in zip(shown, answers, strict=True):
            right[window.bucket].append(answer == window.active)
    active = [answer for bucket in right[1:] for answer in bucket]
    both = (right[0], active)
    accuracy = (float(np.mean(right[0])) + float(np.mean(active))) / 2 if all(both) else None
    interval = balanced([sum(answers) for answers in both], [len(answers) for answers in both]) if all(both) else None
    by_bucket = tuple(float(np.mean(bucket)) if bucket else None for bucket in right)
    return TaskScore(accuracy, interval, by_bucket, sum(map(len, right)), failed)


def estimate(values: Iterable[float | None]) -> Estimate:
    """Mean and 95 % interval over the values that are not None."""
    found = [value for value in values if value is not None]
    if not found:
        return Estimate(None, None, None)
    return Estimate(float(np.mean(found)), *(bootstrap(found) if len(found) > 1 else (None, None)))


def interpret(
    features: Features,
    batches: Callable[[], Iterable[Batch]],
    judge: Judge,
    config: InterpretEvaluation,
    pieces_of: Callable[[Sequence[int]], Sequence[str]],
    *,
    layer: int,
) -> Interpretation:
    """Explain a layer's features and test the explanations.

    Args:
      features: of every token.
      batches: makes an iterator over batches of the split, the same every time.
      pieces_of: the text of each token of a sequence, where it stands.
      layer: number to report.

    Raises:
      DataError: too little text for the number of windows asked for.
      UserError: the judge can't be reached.
    """
    rng = np.random.default_rng(config.seed)
    contexts = read_contexts(
        features,
        batches,
        count=config.contexts,
        most=config.features,
        window=config.window,
        min_active=config.min_windows,
        min_silent=config.train_windows + config.test_windows,
        rng=rng,
    )
    pieces_CT = [pieces_of(row.tolist()) for row in contexts.tokens_CT]
    scores: list[FeatureScore] = []
    for i, feature in enumerate(contexts.chosen_G):
        activations_CT = contexts.activations_CTG[..., i]
        windows = windows_of(contexts.tokens_CT, activations_CT, pieces_CT, config.window)
        samples = samples_of(windows, train=config.train_windows, test=config.test_windows, rng=rng)
        if samples is None:
            continue
        explanation = judge.explain(samples.train, samples.others)
        by_task = {"detection": samples.detection, "fuzzing": samples.fuzzing}
        tasks = {task: judged(judge, explanation, by_task[task], config.shown_at_once) for task in config.tasks}
        entropy, top = token_figures(contexts.tokens_CT, activations_CT)
        density = float(contexts.density_F[feature])
        scores.append(FeatureScore(int(feature), density, entropy, top, _shown(explanation, pieces_of), tasks))

    def over_features(task: str, value: Callable[[TaskScore], float | None]) -> Estimate:
        return estimate(value(score.tasks[task]) for score in scores)

    return Interpretation(
        judge=config.judge,
        judge_kind=judge.kind,
        layer=layer,
        l0=contexts.l0,
        dead=float(np.mean(contexts.density_F == 0)),
        density_histogram=_histogram(contexts.density_F),
        zipf=zipf_fit(contexts.density_F),
        tokens=contexts.tokens_CT.size,
        accuracy={task: over_features(task, lambda s: s.accuracy) for task in config.tasks},
        by_bucket={
            task: tuple(over_features(task, lambda s, b=b: s.by_bucket[b]) for b in range(len(BUCKETS)))
            for task in config.tasks
        },
        failed={task: sum(score.tasks[task].failed for score in scores) for task in config.tasks},
        features=tuple(scores),
    )


def _histogram(density_F: np.ndarray) -> dict[str, int]:
    edges = [0.0, *(10.0**-e for e in range(5, -1, -1))]
    counts = {"0": int(np.sum(density_F == 0))}
    for low, high in itertools.pairwise(edges):
        counts[f"to {high:g}"] = int(np.sum((density_F > low) & (density_F <= high)))
    return counts


def _shown(explanation: Any, pieces_of: Callable[[Sequence[int]], Sequence[str]]) -> str:
    if isinstance(explanation, str):
        return explanation
    tokens = sorted(explanation) if isinstance(explanation, frozenset) else []
    return ", ".join(repr("".join(pieces_of([token]))) for token in tokens)
