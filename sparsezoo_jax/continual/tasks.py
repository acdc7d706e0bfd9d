"""Tasks of new classes each, and what was learnt of them in the end.

Shapes: N images, H rows, W columns, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsezoo_jax.errors import require


class Task(NamedTuple):
    """Images of some classes that no other task has; uint8 [N, H, W, C], and int [N]."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def class_tasks(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes_per_task: int,
    order: Sequence[int],
) -> list[Task]:
    """Tasks of so many classes each, in this order of classes, from images and labels.

    Raises:
      ConfigError: the classes don't come out even.
    """
    even = classes_per_task > 0 and len(order) % classes_per_task == 0
    require(even, "classes_per_task", classes_per_task, f"must divide {len(order)} classes")

    def taken(part: tuple[np.ndarray, np.ndarray], classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        of_these = np.isin(part[1], classes)
        return part[0][of_these], part[1][of_these]

    groups = [order[i : i + classes_per_task] for i in range(0, len(order), classes_per_task)]
    return [Task(*taken(train, group), *taken(test, group)) for group in groups]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was learnt."""

    accuracy: np.ndarray
    """[i, j]: that of task j after task i, among the classes of all tasks up to i; NaN for j > i."""
    densities: list[list[float]]
    """Share of the connections that each layer has, after each task."""
    kept_bytes: int
    """Bytes of what is kept of all tasks."""

    @property
    def average_accuracy(self) -> float:
        """Mean over tasks after the last one."""
        return float(np.mean(self.accuracy[-1]))

    @property
    def average_forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy after an earlier task, less that after the last.

        Source: "Riemannian Walk for Incremental Learning" (arXiv 1801.10112), section 3. 0 for one task.
        """
        if len(self.accuracy) == 1:
            return 0.0
        best = np.nanmax(self.accuracy[:-1, :-1], axis=0)
        return float(np.mean(best - self.accuracy[-1, :-1]))
