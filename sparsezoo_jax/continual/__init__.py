"""Continual learning with sparse networks: SHARP (arXiv 2305.18563), and plain replay and fine-tuning beside it."""

from sparsezoo_jax.continual.config import FINE_TUNING, REPLAY, ContinualConfig
from sparsezoo_jax.continual.learner import Learner, learn
from sparsezoo_jax.continual.tasks import Outcome, Task, class_tasks

__all__ = ["FINE_TUNING", "REPLAY", "ContinualConfig", "Learner", "Outcome", "Task", "class_tasks", "learn"]
