"""Checkpoints on disks of the machines themselves: often, fast, and lost with a machine.

Every process keeps what its own devices hold, in a directory of its own, so that saving crosses no network. A step
counts if all processes have it; on another mesh, or where a machine was replaced, the checkpoints of the run directory
are what is left. They never end a run: what can't be written or read is said, and passed over.
"""

from __future__ import annotations

import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.training.checkpoint import Checkpointer, Restored, RunRecord, contents, read_step
from sparsezoo_jax.training.checkpoint_format import (
    DamagedCheckpointError,
    brief,
    of_this_process,
    reading,
    unreadable_steps,
    write_meta,
)
from sparsezoo_jax.training.processes import from_first, gather, in_all
from sparsezoo_jax.training.state import PureDict, TrainState
from sparsezoo_jax.untrusted import printable

RUN_ID = "run_id"
"""File of a run directory with the name under which its local checkpoints are kept."""
KEPT = 2
"""Steps kept: the newest may be incomplete in another process."""


def read_run_id(workdir: Path) -> str:
    """What tells the run in `workdir` from others; for its first process, which writes it where there is none."""
    path = workdir / RUN_ID
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex.encode())
    with storage.open_read(path) as file:
        return file.read().decode().strip()


def run_id(workdir: Path) -> str:
    """What tells the run in `workdir` from others, the same in all processes; kept there."""
    path = workdir / RUN_ID

    def checked() -> str:
        try:
            found = read_run_id(workdir) if jax.process_index() == 0 else ""
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: {brief(error)}") from None
        if jax.process_index() == 0 and not re.fullmatch("[0-9a-f]{32}", found):
            raise StorageError(f"{path}: is not what a run writes there; delete it to do without its local checkpoints")
        return found

    return gather(in_all(checked))[0]


class LocalCheckpoints:
    """Writes and reads the local checkpoints of one run; each method is called by all processes.

    Args:
      directory: on a disk of this machine; several processes and runs may share it.
      run: what tells the run from others, also from an earlier one in the same run directory.
    """

    def __init__(self, directory: Path | str, run: str):
        own = f"{jax.process_index()}-of-{jax.process_count()}"
        self.directory = Path(directory).expanduser().absolute() / run / own
        self._manager: ocp.CheckpointManager | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for step in unreadable_steps(self.directory):
                shutil.rmtree(self.directory / str(step))
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers=_handlers(),
                options=of_this_process(
                    max_to_keep=KEPT,
                    cleanup_tmp_directories=True,
                    # Otherwise processes tell each other when directories are there, and wait for those of others.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )
        except Exception as error:
            self._warn(f"{self.directory} can't be used: {brief(error)}")

    def save(self, state: TrainState, data_state: Mapping[str, Any], *, step: int, record: RunRecord) -> None:
        """Start saving `state` as `step`; what goes wrong is said and does no harm."""
        items, content = contents(state, data_state, step=step, record=record)
        if self._manager is None:
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.PyTreeSave(items["model"]),
                    training=ocp.args.PyTreeSave(items["training"]),
                    meta=ocp.args.JsonSave(write_meta(content)),
                ),
            )
        except Exception as error:  # of this save, or of the one before in the background
            self._warn(f"saving step {step} in {self.directory} failed: {brief(error)}")

    def restore(self, abstract: TrainState, after: int) -> Restored | None:
        """The newest step above `after` that all processes have and can read, on the shardings of `abstract`."""
        for step in sorted(self._common_steps(), reverse=True):
            if step <= after:
                break
            try:
                manager = self._manager
                assert manager is not None  # there would be no common step
                return read_step(
                    manager,
                    step,
                    abstract,
                    lambda trees, manager=manager, step=step: _read(manager, step, trees),
                    parts=jax.process_count(),
                )
            except (DamagedCheckpointError, StorageError, UserError) as error:
                self._warn(f"step {step} in {self.directory} can't be used: {error}")
        return None

    def forget_after(self, step: int) -> None:
        """Delete the steps after `step`: the run went back to it, and goes on another way."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            for later in [found for found in self._manager.all_steps() if found > step]:
                self._manager.delete(later)
        except Exception as error:
            # A step that stays would be gone on from at the next start.
            shutil.rmtree(self.directory, ignore_errors=True)
            self._manager = None
            self._warn(f"deleting steps in {self.directory} failed: {brief(error)}")

    def close(self) -> None:
        """Finish the save under way."""
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as error:
                self._warn(f"saving in {self.directory} failed: {brief(error)}")

    def _common_steps(self) -> set[int]:
        mine = [] if self._manager is None else sorted(self._manager.all_steps())
        return set.intersection(*(set(steps) for steps in gather(mine)))

    @staticmethod
    def _warn(message: str) -> None:
        print(f"warning: local checkpoints: {printable(message)}", file=sys.stderr)


def newest(checkpointer: Checkpointer, local: LocalCheckpoints | None, abstract: TrainState) -> Restored | None:
    """The newest step that can be read, of a local disk or of the run directory."""
    if local is None:
        return checkpointer.restore(abstract)
    restored = local.restore(abstract, after=max(from_first(checkpointer.steps()), default=0))
    if restored is None:
        restored = checkpointer.restore(abstract)
        local.forget_after(0 if restored is None else int(restored.state.step))
    return restored


def _handlers() -> dict[str, Any]:
    """Of items that every process writes for itself: of each array what its devices hold, each part once."""
    alone = of_this_process().multiprocessing_options
    arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        **{
            name: ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, type_handler_registry=registry)
            for name in ("model", "training")
        },
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }


def _read(manager: ocp.CheckpointManager, step: int, trees: Mapping[str, PureDict]) -> dict[str, PureDict]:
    """The arrays of a step from the parts in all processes.

    Raises:
      DamagedCheckpointError: parts are missing, as on another mesh. StorageError: they can't be read.
    """
    with reading(manager, step):
        wanted = {
            name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in trees.items()
        }
        restored = manager.restore(step, args=ocp.args.Composite(**wanted))
        return {name: restored[name] for name in trees}
