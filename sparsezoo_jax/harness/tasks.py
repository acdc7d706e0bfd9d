"""A run's results on tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsezoo_jax.errors import UserError, require


def import_model() -> Any:
    """The class of the harness' model `sparsezoo`, registered there.

    Raises:
      UserError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'sparsezoo-jax[eval]'")
    from sparsezoo_jax.harness.model import SparsezooLM

    return SparsezooLM


def run_tasks(
    directory: Path,
    tasks: Sequence[str],
    *,
    step: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    task_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The harness' figures of each task by name: `acc`, `acc_stderr`, ..., with the filter after a comma if not `none`.

    Args:
      directory: run directory.
      tasks: names of tasks, or of groups of them.
      step: checkpoint to load; None is the newest.
      batch_size: texts at a time; None: 8.
      limit: examples of each task; None: all.
      shots: examples shown in each prompt; None: what the task says.
      task_path: directory with task files of one's own.

    Raises:
      UserError: no harness, run or task of that name.
    """
    model_class = import_model()
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    allowed = "is no directory"
    require(task_path is None or task_path.is_dir(), "--task-path", task_path, allowed)
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    known = {*manager.all_tasks}
    for name in tasks:
        hint = "no such task; `lm_eval ls tasks` lists them, and --task-path DIR adds those of a directory"
        require(name in known, "--tasks", name, hint)
    model = model_class(directory, step=step, batch_size=batch_size or 8)
    found = simple_evaluate(
        model=model, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, log_samples=False
    )
    assert found is not None  # it is, in the first process
    results: Any = found
    return {name: _plain(figures) for name, figures in results["results"].items()}


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    return {name.removesuffix(",none"): value for name, value in figures.items() if isinstance(value, int | float)}
