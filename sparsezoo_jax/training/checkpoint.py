"""Checkpoints of a training run: Orbax underneath, plain nested dicts of arrays inside, each array verified when read.

A step holds three items: `model` (params and model_state: all that evaluation needs), `training` (optimizer,
objectives, counters) and `meta` (position of the data iterator, validation loss; and shape, type and fingerprint of
every array). `training.parameters` reads and writes models alone.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.training.checkpoint_format import (
    DamagedCheckpointError,
    brief,
    check_fits,
    describe,
    read_arrays,
    read_meta,
    unreadable_steps,
    verify,
    write_meta,
)
from sparsezoo_jax.training.processes import barrier, from_first, in_all
from sparsezoo_jax.training.state import PureDict, TrainState, flatten, nested
from sparsezoo_jax.untrusted import printable

MODEL_FIELDS = ("params", "model_state")


@dataclass(frozen=True)
class RunRecord:
    """What a run has been through over all its starts, kept with its checkpoints."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""
    lost_steps: int = 0
    """Steps made again because a process ended before a checkpoint."""
    starts: int = 1
    """Number of times that a process took the run up."""
    passed_over: int = 0
    """Batches that were read and not trained on, because a rewind passed over them."""
    rewinds: int = 0
    """Rewinds after a spike of the loss."""
    losses: list[list[float]] = field(default_factory=list)
    """Step and loss of the newest good steps, by which spikes are told."""
    base: dict[str, Any] = field(default_factory=dict)
    """Step and fingerprint of the parameters that adapters belong to (`WarmStart.identity`); empty without adapters."""
    unlogged: list[str] = field(default_factory=list)
    """Lines of metrics.jsonl, up to the checkpoint's step, that could not be written yet."""


@dataclass(frozen=True)
class Restored:
    """A train state read from disk, and what was saved beside it."""

    state: TrainState
    """Without what is frozen."""
    data_state: dict[str, Any]
    """Position of the data iterator."""
    record: RunRecord
    """What the run has been through."""


def contents(
    state: TrainState,
    data_state: Mapping[str, Any],
    validation_loss: float | None = None,
    *,
    step: int,
    record: RunRecord,
) -> tuple[dict[str, PureDict], dict[str, Any]]:
    """The items of a step, and its metadata without checksum; a computation of all processes."""
    model, training = _split(state)
    items = {"model": nested(flatten(model)), "training": nested(flatten(training))}
    return items, {
        "step": step,
        "data": data_state,
        "validation_loss": validation_loss,
        "passed_over": record.passed_over,
        "record": asdict(record),
        "arrays": describe(items),
    }


def read_step(
    manager: ocp.CheckpointManager,
    step: int,
    abstract: TrainState,
    read: Callable[[dict[str, PureDict]], Mapping[str, PureDict]],
    *,
    parts: int = 1,
) -> Restored:
    """A step on the shardings of `abstract`, verified.

    Args:
      read: gives the arrays of both items for their shapes and shardings.
      parts: number of directories over which the step's arrays are spread.

    Raises:
      DamagedCheckpointError, StorageError, UserError: it is damaged, can't be read, or is of another model.
    """
    model, training = _split(abstract)
    wanted = {"model": flatten(model), "training": flatten(training)}

    def described() -> dict[str, Any]:
        meta = read_meta(manager, step, parts=parts)
        check_fits(storage.path(manager.directory) / str(step), meta["arrays"], wanted)
        return meta

    # Each part is agreed on before the next begins: verifying is a computation of all processes.
    meta = in_all(described)
    items = in_all(lambda: read({name: nested(flat) for name, flat in wanted.items()}))
    in_all(lambda: verify(manager, step, items, meta["arrays"]))
    found = {f"{name}/{path}": leaf for name, tree in items.items() for path, leaf in flatten(tree).items()}
    treedefs = {"model": jax.tree.structure(model), "training": jax.tree.structure(training)}
    fields = {
        name: jax.tree.unflatten(treedefs[name], [found[f"{name}/{path}"] for path in flat])
        for name, flat in wanted.items()
    }
    record = RunRecord(**meta.get("record", {}))
    return Restored(TrainState(**fields["model"], **fields["training"]), meta["data"], record)


class Checkpointer:
    """Writes and reads the checkpoints of one training run.

    Saving is asynchronous: `save` returns once the arrays are copied off the devices. At most one save is under way.
    A step becomes visible when it is complete; the newest `keep_last`, those of `keep_steps` and, with `keep_best`, the
    one with the lowest validation loss are kept.

    Args:
      mark: a file to write when the first save is complete, for whoever finds `directory` empty one day.

    Raises:
      StorageError: saving or reading failed, from the call that finds out: `save`, `check`, `wait` or `close`.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep_last: int = 2,
        keep_best: bool = True,
        keep_steps: Sequence[int] = (),
        read_only: bool = False,
        mark: Path | None = None,
    ):
        self.directory = storage.path(directory).absolute()
        self._mark = mark
        self._failed = False
        self._unchecked = False  # whether a save in the background may have failed without anybody knowing
        policies: list[Any] = [checkpoint_managers.LatestN(keep_last), checkpoint_managers.CustomSteps(keep_steps)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._set_unreadable_aside(read_only)
        with self._storage_errors("opening"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(read_only=True)
                if read_only
                else ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=True,
                ),
            )

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        data_state: dict[str, Any],
        validation_loss: float | None = None,
        *,
        step: int,
        record: RunRecord | None = None,
    ) -> None:
        """Start saving `state` as `step`; `data_state` is JSON."""
        items, content = contents(state, data_state, validation_loss, step=step, record=record or RunRecord())
        # A validation loss that is not finite can't be the best one.
        ranked = validation_loss is not None and math.isfinite(validation_loss)
        with self._storage_errors("saving a checkpoint"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(items["model"]),
                    training=ocp.args.StandardSave(items["training"]),
                    meta=ocp.args.JsonSave(write_meta(content)),
                ),
                metrics={"loss": validation_loss} if ranked else None,
            )
        self._unchecked = True

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest step that can be read, on the shardings of `abstract`; None if there is no step at all.

        A damaged step is reported on stderr and set aside as '<step>.damaged'. Several processes take the same step:
        one that any of them finds damaged is damaged, and what one of them can't read stops all.

        Raises:
          StorageError: a step can't be read now (permission, network, memory), and nothing was changed; or there are
            steps, but all are damaged.
          UserError: the newest step belongs to another model or optimizer.
        """
        steps = from_first(self.steps())
        reasons = []
        for step in reversed(steps):
            try:
                restored = self.restore_step(step, abstract)
            except DamagedCheckpointError as error:
                reasons.append(f"step {step}: {error}")
                if jax.process_index() == 0:
                    where = f"checkpoint {self.directory / str(step)}"
                    print(
                        f"warning: {where} is damaged ({printable(error)}); trying the one before it", file=sys.stderr
                    )
                continue
            self._set_aside([later for later in steps if later > step])
            return restored
        if reasons:
            raise StorageError(f"no checkpoint in {self.directory} can be read; {'; '.join(reasons)}")
        return None

    def restore_step(self, step: int, abstract: TrainState) -> Restored:
        """A step on the shardings of `abstract`.

        Raises:
          DamagedCheckpointError, StorageError, UserError: it is damaged, can't be read, or is of another model.
        """
        return read_step(self._manager, step, abstract, lambda trees: read_arrays(self._manager, step, trees))

    def _set_unreadable_aside(self, read_only: bool) -> None:
        """Steps that would keep orbax from opening the directory; one process looks, before all of them open it."""

        def set_aside() -> None:
            found = unreadable_steps(self.directory)
            others = {int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit()} - found.keys()
            if found and (read_only or not others):
                reasons = "; ".join(f"step {step}: {reason}" for step, reason in found.items())
                lost = "steps" if others else "no checkpoint"
                can = "can't" if others else "can"
                raise StorageError(f"{lost} in {self.directory} {can} be read; {reasons}")
            for step, reason in found.items():
                print(f"warning: checkpoint {self.directory / str(step)} is damaged ({reason})", file=sys.stderr)
                self._rename(step)

        in_all(lambda: set_aside() if jax.process_index() == 0 else None)

    def _rename(self, step: int) -> None:
        target = self.directory / f"{step}.damaged"
        storage.remove_tree(target)
        (self.directory / str(step)).rename(target)

    def _set_aside(self, steps: list[int]) -> None:
        """Make room for the steps that will be made again."""
        if not steps:
            return
        with self._storage_errors("setting a damaged checkpoint aside"):
            if jax.process_index() == 0:
                for step in steps:
                    self._rename(step)
            barrier("damaged checkpoints set aside")
            self._manager.reload()

    def check(self) -> None:
        """Raise what went wrong with a save in the background, once it is over; does not wait."""
        if self._unchecked and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when the save under way is complete."""
        unchecked, self._unchecked = self._unchecked, False
        with self._storage_errors("saving a checkpoint"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if unchecked and self._mark is not None and jax.process_index() == 0 and not self._mark.exists():
                storage.write_atomic(self._mark, f"{self.directory.name}/ has held a complete checkpoint\n".encode())

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, Exception):
            # What ended the run is what its user has to know, not that closing failed as well.
            with contextlib.suppress(StorageError):
                self.close()

    def close(self) -> None:
        """Finish the save under way and release the directory."""
        try:
            self.wait()
        finally:
            try:
                with self._storage_errors("closing"):
                    self._manager.close()
            finally:
                # Threads of the failed save that outlived it have been joined by now.
                if self._failed:
                    self._remove_incomplete_steps()

    def _remove_incomplete_steps(self) -> None:
        """Free the space of a save that failed; an incomplete step is not visible, but the disk may be full."""
        if jax.process_index() != 0:
            return
        # Other threads of the failed save may still be writing: what they add while a directory is removed keeps it.
        for _ in range(50):
            leftovers = list(self.directory.glob("*.orbax-checkpoint-tmp*"))
            for leftover in leftovers:
                storage.remove_tree(leftover)
            if not leftovers:
                return
            time.sleep(0.02)

    @contextlib.contextmanager
    def _storage_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            # The save under way is what failed, or did so unseen: nothing may take it for a complete one.
            self._unchecked = False
            self._remove_incomplete_steps()
            raise StorageError(f"{doing} in {self.directory} failed: {brief(error)}") from error


def _split(state: TrainState) -> tuple[PureDict, PureDict]:
    """What evaluation needs, and the rest; what is frozen is another run's."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__ if name != "frozen"}
    return {name: fields.pop(name) for name in MODEL_FIELDS}, fields
