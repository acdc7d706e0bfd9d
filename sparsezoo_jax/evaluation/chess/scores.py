"""Coverage and board reconstruction of binary properties by features (Karvonen et al., arXiv 2408.00113, Eqs. 2-5).

A feature fires in a state at threshold t where f > t f_max, for t = 0, 0.1, ..., 0.9. All that matters of an activation
is therefore how many of the ten thresholds it exceeds, its level: one byte, from which everything here is computed, a
few hundred features at a time.

Shapes: S states, F features, G properties, T thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsezoo_jax.evaluation.chess.positions import Properties

#: In float64: a float32 0.6 times a maximum can land on the other side of an activation.
THRESHOLDS = tuple(k / 10 for k in range(10))
#: A feature classifies a property if at least 19 of 20 states in which it fires, and 10 at least, have the property.
_PRECISION, _SUPPORT = (19, 20), 10
_CHUNK = 512


def levels_of(features_SF: np.ndarray, max_F: np.ndarray) -> np.ndarray:
    """How many thresholds each activation exceeds: uint8 [S, F].

    Args:
      features_SF: activations, float [S, F].
      max_F: the largest magnitude of each feature, float [F].
    """
    wide, top = features_SF.astype(np.float64), max_F.astype(np.float64)
    levels = np.zeros(features_SF.shape, np.uint8)
    for threshold in THRESHOLDS:
        levels += wide > threshold * top
    return levels


@dataclass(frozen=True)
class Fitted:
    """What the states to learn from say of features and properties."""

    f1_TG: np.ndarray
    """The best F1 of any single feature as a classifier of each property."""
    classifiers_TFG: np.ndarray
    """bool: the feature classifies the property with high precision."""


def fit(levels_SF: np.ndarray, labels_SG: np.ndarray) -> Fitted:
    """F1 of the best features, and the features of high precision, at every threshold."""
    labels = labels_SG.astype(np.float32)
    positives_G = labels_SG.sum(0)
    features, count = levels_SF.shape[1], labels.shape[1]
    f1_TG = np.zeros((len(THRESHOLDS), count))
    classifiers = np.zeros((len(THRESHOLDS), features, count), bool)
    for chunk, t, rows, fires in _firing(levels_SF):
        true = np.rint(fires.T @ labels[rows]).astype(np.int64)  # exact: counts are far below 2**24
        on = np.rint(fires.sum(0, dtype=np.float64)).astype(np.int64)[:, None]
        # 2 P R / (P + R) of precision TP / on and recall TP / positives.
        np.maximum(f1_TG[t], np.max(2 * true / np.maximum(on + positives_G, 1), axis=0), out=f1_TG[t])
        classifiers[t, chunk] = (_PRECISION[1] * true >= _PRECISION[0] * on) & (true >= _SUPPORT)
    return Fitted(f1_TG, classifiers)


def _firing(levels_SF: np.ndarray) -> Iterator[tuple[slice, int, np.ndarray, np.ndarray]]:
    """Chunks of features at each threshold: the features, threshold, states where any fires, and float32 0/1 there."""
    for start in range(0, levels_SF.shape[1], _CHUNK):
        chunk = slice(start, min(start + _CHUNK, levels_SF.shape[1]))
        levels = np.ascontiguousarray(levels_SF[:, chunk])
        highest = levels.max(axis=1)
        for t in range(len(THRESHOLDS)):
            # An expert's features are silent wherever it was not chosen.
            rows = np.flatnonzero(highest > t)
            if len(rows):
                yield chunk, t, rows, (levels[rows] > t).astype(np.float32)


@dataclass(frozen=True)
class Coverage:
    """How well single features classify properties: means over a set of the best F1."""

    score: float
    """At the one threshold that is best for the whole set (what the published code reports)."""
    threshold: float
    per_property: float
    """Each property at its own best threshold (the formula as it is printed)."""
    by_threshold: list[float]


def coverage(fitted: Fitted, weights_G: np.ndarray) -> Coverage:
    """Coverage of a set of properties whose weights sum to 1."""
    means = fitted.f1_TG @ weights_G
    best = int(np.argmax(means))
    own = float(fitted.f1_TG.max(axis=0) @ weights_G)
    return Coverage(float(means[best]), THRESHOLDS[best], own, [float(x) for x in means])


@dataclass(frozen=True)
class Reconstruction:
    """How well the classifiers of high precision restore the properties of new states together."""

    score: float
    """F1 pooled over states and properties of a square (or the mean over concepts), at the best threshold."""
    threshold: float
    per_board: float
    """Mean over states of each one's F1 at its own best threshold (the formula as it is printed); states that have no
    property are left out."""
    last: float
    """Pooled F1 where each feature votes at the highest threshold that it exceeds and classifies something at."""
    classifiers: int
    """Features that classify something at the best threshold."""


def reconstruct(levels_SF: np.ndarray, fitted: Fitted) -> np.ndarray:
    """Predicted properties of new states, bool [T + 1, S, G]; the last by each feature's highest useful threshold."""
    states, count = len(levels_SF), fitted.f1_TG.shape[1]
    predicted = np.zeros((len(THRESHOLDS) + 1, states, count), bool)
    useful_TF = np.any(fitted.classifiers_TFG, axis=2)
    used = np.flatnonzero(useful_TF.any(axis=0))
    for start in range(0, len(used), _CHUNK):
        chunk = used[start : start + _CHUNK]
        levels = np.ascontiguousarray(levels_SF[:, chunk])
        taken = np.zeros(levels.shape, bool)
        for t in reversed(range(len(THRESHOLDS))):
            own = np.flatnonzero(useful_TF[t, chunk])
            fires = np.greater(levels[:, own], t)
            rows = np.flatnonzero(fires.any(axis=1))
            if not len(rows):
                continue
            classifiers = fitted.classifiers_TFG[t, chunk[own]].astype(np.float32)
            predicted[t, rows] |= fires[rows].astype(np.float32) @ classifiers > 0
            votes = fires & ~taken[:, own]
            predicted[-1, rows] |= votes[rows].astype(np.float32) @ classifiers > 0
            taken[:, own] |= fires
    return predicted


def reconstruction(predicted_TSG: np.ndarray, test: Properties, fitted: Fitted) -> Reconstruction:
    """Scores of what `reconstruct` predicted."""
    labels = test.labels_SG
    scores = [_pooled(predicted, test) for predicted in predicted_TSG]
    if test.classes is None:
        chosen_by = scores[:-1]
    else:
        chosen_by = [_per_square(predicted, labels, test.classes) for predicted in predicted_TSG[:-1]]
    best = int(np.argmax(chosen_by))
    true_TS = np.stack([(predicted & labels).sum(1) for predicted in predicted_TSG[:-1]])
    sizes_TS = np.stack([predicted.sum(1) for predicted in predicted_TSG[:-1]]) + labels.sum(1)
    some = np.flatnonzero(labels.any(axis=1))
    own_S: np.ndarray = np.max(2 * true_TS / np.maximum(sizes_TS, 1), axis=0)
    per_board = float(np.mean(own_S[some])) if len(some) else 0.0
    return Reconstruction(
        score=scores[best],
        threshold=THRESHOLDS[best],
        per_board=per_board,
        last=scores[-1],
        classifiers=int(fitted.classifiers_TFG[best].any(axis=1).sum()),
    )


def _f1(true: np.ndarray | int, predicted: np.ndarray | int, positives: np.ndarray | int) -> np.ndarray:
    """F1 from counts; 0 where nothing is right."""
    return 2 * np.asarray(true) / np.maximum(np.asarray(predicted) + np.asarray(positives), 1)


def _pooled(predicted_SG: np.ndarray, test: Properties) -> float:
    """F1 pooled over all states and the properties of a concept, averaged over concepts."""
    starts = np.cumsum((0, *test.concepts[:-1]))
    counts = ((predicted_SG & test.labels_SG).sum(0), predicted_SG.sum(0), test.labels_SG.sum(0))
    return float(np.mean(_f1(*(np.add.reduceat(count, starts) for count in counts))))


def _per_square(predicted_SG: np.ndarray, labels_SG: np.ndarray, classes: int) -> float:
    """F1 that does not credit a square for which one right and one wrong piece were predicted."""
    shape = (len(labels_SG), -1, classes)
    true_SQ = (predicted_SG & labels_SG).reshape(shape).sum(2)
    false_SQ = (predicted_SG & ~labels_SG).reshape(shape).sum(2)
    missed = int((~predicted_SG & labels_SG).sum())
    true = int(true_SQ.sum()) - int(((true_SQ == 1) & (false_SQ == 1)).sum())
    return float(_f1(true, true + int(false_SQ.sum()), true + missed))
