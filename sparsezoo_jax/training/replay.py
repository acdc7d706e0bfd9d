"""Making a window of a run's steps again, to look at them: `train --debug.replay A:B`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import storage
from sparsezoo_jax.data import BatchIterator
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.training.checkpoint import Checkpointer
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.guards import SpikeGuard
from sparsezoo_jax.training.lemo import FILE, read_fitted
from sparsezoo_jax.training.phases import Phases
from sparsezoo_jax.training.state import Build, Placement
from sparsezoo_jax.training.warm_start import WarmStart
from sparsezoo_jax.training.writers import JsonlWriter


@dataclass(frozen=True)
class Replayed:
    """A step that was made again."""

    step: int
    metrics: dict[str, Any]
    """Metrics of the step, and `grad_norms_by_layer/<path>`, `param_norms_by_layer/<path>`,
    `update_norms_by_layer/<path>`."""
    logged: dict[str, float] | None
    """Loss and gradient norm in the run's log; None if it has no such step."""

    @property
    def is_same(self) -> bool | None:
        """Whether loss and gradient norm are, to the last bit, those of the log; None if it has no such step."""
        return None if self.logged is None else all(self.metrics[name] == x for name, x in self.logged.items())


def parse_window(text: str) -> tuple[int, int]:
    """First and last step of 'A:B'.

    Raises:
      ConfigError: something else.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError("debug.replay", text, "must be A:B, the first and the last step, with 1 <= A <= B")
    return int(first), int(last)


def replay(
    config: TrainConfig,
    window: tuple[int, int],
    *,
    build: Build,
    data: BatchIterator,
    batch_shape: tuple[int, int],
    workdir: Path,
    place: Placement,
    to_device: Callable[[Any], Any],
    report: Callable[[Replayed], None],
    warm_start: WarmStart | None = None,
    phases: Phases | None = None,
) -> Path:
    """Make the steps of `window` again from the newest checkpoint before them, and write them to a file of their own.

    The run's checkpoints and log stay as they are; it may train meanwhile. On a CPU and on the mesh of the run the
    steps are the same to the last bit, unless a rewind lies between the checkpoint and the window.

    Returns:
      `replay-A-B.jsonl` in `workdir`: one row a step.

    Raises:
      UserError: no checkpoint before the window, or one of another model.
      StorageError: it can't be read, or the rows can't be written.
    """
    first, last = window
    phases = Phases() if phases is None else phases
    fitted = read_fitted(workdir / FILE) if config.lemo.fits else None
    prepared = prepare_step(config, build, batch_shape, place, by_layer=True, fitted=fitted)
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
        steps = [step for step in checkpointer.steps() if step < first]
        if not steps:
            kept = ", ".join(map(str, checkpointer.steps())) or "none"
            raise UserError(f"debug.replay={first}:{last}: no checkpoint before step {first}; steps there are: {kept}")
        restored = checkpointer.restore_step(steps[-1], prepared.abstract)
    data.set_state(restored.data_state)
    guard = SpikeGuard(config.spike, restored.record.losses)
    logged = _logged(workdir / "metrics.jsonl")
    state = restored.state
    if prepared.adapters is not None:
        assert warm_start is not None, "adapters are trained for another run's parameters"
        state = prepared.with_base(state, warm_start.read(place)[0])
    target = workdir / f"replay-{first}-{last}.jsonl"
    target.unlink(missing_ok=True)
    writer = JsonlWriter(target) if jax.process_index() == 0 else None
    for step in range(steps[-1] + 1, last + 1):
        with phases("data"):
            batch = to_device(next(data))
        with phases("compilation" if step in (steps[-1] + 1, first) else "step"):
            limit = (jnp.float32(guard.limit(step)),) if config.spike.mode == "skip" else ()
            # The program of the run itself makes the steps; norms come from another one, so that no bit changes.
            details = prepared.details(state, batch, *limit) if step >= first else {}
            state, metrics = prepared.step(state, batch, *limit)
            values = {name: x if x.ndim else float(x) for name, x in jax.device_get({**details, **metrics}).items()}
        guard.is_spike(step, values["loss"])
        if step < first:
            continue
        if writer is not None:
            writer.write(step, values)
        report(Replayed(step, values, logged.get(step)))
    if writer is not None:
        writer.close()
    return target


def _logged(path: Path) -> dict[int, dict[str, float]]:
    """Loss and gradient norm by step, of the lines that can be read."""
    found: dict[int, dict[str, float]] = {}
    if path.is_file():
        with storage.open_read(path) as file:
            lines = file.read().splitlines()
        for line in lines:
            try:
                row = json.loads(line)
                if "split" not in row:
                    found[row["step"]] = {name: row[name] for name in ("loss", "grad_norm")}
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return found
