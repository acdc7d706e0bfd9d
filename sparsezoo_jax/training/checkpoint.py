"""Checkpoints: Orbax underneath, plain nested dicts of arrays inside, every array verified when it is read back.

A step holds three items: `model` (params and model_state: all that evaluation needs), `training` (optimizer,
objectives, counters) and `meta` (position of the data iterator, validation loss; and shape, type and fingerprint of
every array).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training.state import PureDict, TrainState, flatten

MODEL_FIELDS = ("params", "model_state")
READ_BYTES = 1 << 28
"""Bytes of a model that are read at one time, or its largest array."""
WRITE_BYTES = 1 << 25
"""Unit in which `save_params` writes; what it holds in memory beside the arrays it was given is a few of these."""

# Orbax logs what it raises as well, once a thread with a traceback, and warns of each option it derives from
# read_only. What it raises becomes one StorageError here; pages before that line would hide it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class DamagedCheckpointError(Exception):
    """A step that can't be read back as it was written."""


@dataclass(frozen=True)
class Restored:
    """A train state read from disk, and what was saved beside it."""

    state: TrainState
    data_state: dict[str, Any]
    """Position of the data iterator."""


class Checkpointer:
    """Writes and reads the checkpoints of one training run.

    Saving is asynchronous: `save` returns once the arrays are copied off the devices. At most one save is under way.
    A step becomes visible when it is complete; the newest `keep_last` and, with `keep_best`, the one with the lowest
    validation loss are kept.

    Raises:
      StorageError: saving or reading failed, from the call that finds out: `save`, `check`, `wait` or `close`.
    """

    def __init__(self, directory: Path | str, *, keep_last: int = 2, keep_best: bool = True):
        self.directory = Path(directory).absolute()
        self._failed = False
        self._unchecked = False  # whether a save in the background may have failed without anybody knowing
        policies: list[Any] = [checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with self._storage_errors("opening"):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                    cleanup_tmp_directories=True,
                ),
            )

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data_state: dict[str, Any], validation_loss: float | None = None, *, step: int
    ) -> None:
        """Start saving `state` as `step`; `data_state` is JSON."""
        model, training = _split(state)
        items = {"model": _nested(flatten(model)), "training": _nested(flatten(training))}
        meta = {"step": step, "data": data_state, "validation_loss": validation_loss, "arrays": describe(items)}
        # A validation loss that is not finite can't be the best one.
        ranked = validation_loss is not None and math.isfinite(validation_loss)
        with self._storage_errors("saving a checkpoint"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(items["model"]),
                    training=ocp.args.StandardSave(items["training"]),
                    meta=ocp.args.JsonSave(meta),
                ),
                metrics={"loss": validation_loss} if ranked else None,
            )
        self._unchecked = True

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest step that can be read, on the shardings of `abstract`; None if there is no step at all.

        A damaged step is reported on stderr and set aside as '<step>.damaged'.

        Raises:
          StorageError: there are steps, but none can be read.
          UserError: the newest step belongs to another model or optimizer.
        """
        steps = self.steps()
        reasons = []
        for step in reversed(steps):
            try:
                restored = self._restore_step(step, abstract)
            except DamagedCheckpointError as error:
                reasons.append(f"step {step}: {error}")
                print(
                    f"warning: checkpoint {self.directory / str(step)} is damaged ({error}); trying the one before it",
                    file=sys.stderr,
                )
                continue
            self._set_aside([later for later in steps if later > step])
            return restored
        if reasons:
            raise StorageError(f"no checkpoint in {self.directory} can be read; {'; '.join(reasons)}")
        return None

    def _restore_step(self, step: int, abstract: TrainState) -> Restored:
        meta = _read_meta(self._manager, step)
        model, training = _split(abstract)
        wanted = {"model": flatten(model), "training": flatten(training)}
        _check_fits(self.directory / str(step), meta["arrays"], wanted)
        items = _read_arrays(
            self._manager, step, {name: _nested(flat) for name, flat in wanted.items()}, meta["arrays"]
        )
        found = {f"{name}/{path}": leaf for name, tree in items.items() for path, leaf in flatten(tree).items()}
        treedefs = {"model": jax.tree.structure(model), "training": jax.tree.structure(training)}
        parts = {
            name: jax.tree.unflatten(treedefs[name], [found[f"{name}/{path}"] for path in flat])
            for name, flat in wanted.items()
        }
        return Restored(TrainState(**parts["model"], **parts["training"]), meta["data"])

    def _set_aside(self, steps: list[int]) -> None:
        """Make room for the steps that will be made again."""
        if not steps:
            return
        with self._storage_errors("setting a damaged checkpoint aside"):
            if jax.process_index() == 0:
                for step in steps:
                    target = self.directory / f"{step}.damaged"
                    shutil.rmtree(target, ignore_errors=True)
                    (self.directory / str(step)).rename(target)
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()

    def check(self) -> None:
        """Raise what went wrong with a save in the background, once it is over; does not wait."""
        if self._unchecked and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when the save under way is complete."""
        self._unchecked = False
        with self._storage_errors("saving a checkpoint"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

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
                shutil.rmtree(leftover, ignore_errors=True)
            if not leftovers:
                return
            time.sleep(0.02)

    @contextlib.contextmanager
    def _storage_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            self._remove_incomplete_steps()
            raise StorageError(f"{doing} in {self.directory} failed: {_brief(error)}") from error


def saved_steps(directory: Path | str) -> list[int]:
    """Complete steps in a checkpoint directory, oldest first; empty if there is no such directory."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        return []
    with _reader(directory) as manager:
        return sorted(manager.all_steps())


def restore_params(
    directory: Path | str,
    step: int | None = None,
    *,
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> tuple[PureDict, PureDict]:
    """Parameters and model state of a step (default: the newest), as nested dicts of arrays, for reading only.

    `sharding_of` gives the sharding of an array from its path ('params/...' or 'model_state/...') and shape; default:
    the first device. `ModelTemplate.merge` makes a model of the result.

    Raises:
      UserError: there is no such step.
      StorageError: the step is damaged.
    """
    directory = Path(directory).absolute()
    chosen = _chosen(directory, step)
    try:
        with _reader(directory) as manager:
            meta = _read_meta(manager, chosen)
        model_arrays = {path: entry for path, entry in meta["arrays"].items() if path.startswith("model/")}
        largest = max(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in model_arrays.values())
        with _reader(directory, max(largest, READ_BYTES)) as manager:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            flat = {}
            for path, (shape, dtype, _) in model_arrays.items():
                name = path.removeprefix("model/")
                sharding = device if sharding_of is None else sharding_of(name, tuple(shape))
                flat[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
            model = _read_arrays(manager, chosen, {"model": _nested(flat)}, meta["arrays"])["model"]
    except DamagedCheckpointError as error:
        raise StorageError(f"checkpoint {directory / str(chosen)} is damaged: {error}") from error
    return model["params"], model.get("model_state", {})


def read_params(directory: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters of the newest step, one at a time: path, as `flatten` gives it, and array in host memory.

    Raises:
      UserError: there is no step.
      StorageError: the step is damaged.
    """
    directory = Path(directory).absolute()
    chosen = _chosen(directory, None)
    try:
        with _reader(directory) as manager:
            arrays = _read_meta(manager, chosen)["arrays"]
        with contextlib.closing(_manager(directory, model=ocp.PyTreeCheckpointHandler())) as manager:
            prefix = "model/params/"
            for path, (shape, dtype, fingerprint) in arrays.items():
                if not path.startswith(prefix):
                    continue
                item = _nested({path.removeprefix("model/"): jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))})
                host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item, restore_args=host, partial_restore=True)
                try:
                    (array,) = jax.tree.leaves(manager.restore(chosen, args=ocp.args.Composite(model=args))["model"])
                except Exception as error:
                    raise DamagedCheckpointError(_brief(error)) from error
                if describe({path: array})[path][2] != fingerprint:
                    raise DamagedCheckpointError(f"{path} is not what was saved")
                yield path.removeprefix(prefix), array
    except DamagedCheckpointError as error:
        raise StorageError(f"checkpoint {directory / str(chosen)} is damaged: {error}") from error


def save_params(directory: Path | str, params: Mapping[str, Any], *, step: int = 0) -> None:
    """Write a step that holds parameters and nothing else: enough to load a model, not to go on training.

    Args:
      directory: the checkpoint directory; made if absent.
      params: arrays by path, as `flatten` gives them, of jax or numpy.
      step: number of the step.

    Raises:
      StorageError: it can't be written.
    """
    directory = Path(directory).absolute()
    arrays: dict[str, list[Any]] = {}
    for path, array in params.items():
        # One by one: arrays of numpy are copied to the device.
        arrays |= describe({f"model/params/{path}": array})
    tree = {"params": _nested(dict(params))}
    # Left to itself, orbax holds a file of 2 GB in memory until it is full, and compresses whole arrays at once.
    in_flight: Any = 4 * WRITE_BYTES / 1e9
    handlers: dict[str, Any] = {
        "model": ocp.PyTreeCheckpointHandler(save_concurrent_gb=in_flight),
        "meta": ocp.JsonCheckpointHandler(),
    }
    model = ocp.args.PyTreeSave(
        tree,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=WRITE_BYTES), tree),
        ocdbt_target_data_file_size=2 * WRITE_BYTES,
    )
    try:
        with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    model=model,
                    meta=ocp.args.JsonSave({"step": step, "data": {}, "validation_loss": None, "arrays": arrays}),
                ),
            )
            manager.wait_until_finished()
            manager.check_for_errors()
    except Exception as error:
        raise StorageError(f"saving a checkpoint in {directory} failed: {_brief(error)}") from error


def _chosen(directory: Path, step: int | None) -> int:
    steps = saved_steps(directory)
    chosen = step if step is not None else max(steps, default=None)
    if chosen is None or chosen not in steps:
        wanted = "checkpoint" if step is None else f"step {step}"
        raise UserError(f"no {wanted} in {directory}; steps there are: {', '.join(map(str, steps)) or 'none'}")
    return chosen


@contextlib.contextmanager
def _reader(directory: Path, model_bytes_at_once: int | None = None) -> Iterator[ocp.CheckpointManager]:
    """A manager for reading; with a limit on the bytes in flight, a model is read without a second copy of it."""
    handlers: dict[str, Any] = {"meta": ocp.JsonCheckpointHandler()}
    if model_bytes_at_once is not None:
        gigabytes: Any = (model_bytes_at_once + 1) / 1e9  # rounding must not put the limit below the largest array
        handlers["model"] = ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes)
    with contextlib.closing(_manager(directory, **handlers)) as manager:
        yield manager


def _manager(directory: Path, **handlers: Any) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)


def _split(state: TrainState) -> tuple[PureDict, PureDict]:
    """What evaluation needs, and the rest."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {name: fields.pop(name) for name in MODEL_FIELDS}, fields


def _nested(flat: dict[str, Any]) -> PureDict:
    """Nested dicts by the parts of the path, whatever containers (tuples, optax states) the leaves came from."""
    tree: PureDict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum of bits * (2 * index + 1) modulo 2^32: one flipped bit always changes it.

    Integer sums do not depend on their order, so the number is the same on every mesh.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    if bits.ndim < 3:
        return _weighted_sum(bits, jnp.uint32(0))
    # A stack of layers is read layer by layer, for XLA for CPU makes room for all summands of a sum.
    offsets = jnp.arange(bits.shape[0], dtype=jnp.uint32) * jnp.uint32(math.prod(bits.shape[1:]) % 2**32)
    total, _ = jax.lax.scan(lambda sum, row: (sum + _weighted_sum(*row), None), jnp.uint32(0), (bits, offsets))
    return total


def _weighted_sum(bits: jax.Array, offset: jax.Array) -> jax.Array:
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * (index + offset) + 1), dtype=jnp.uint32)


def describe(items: PureDict) -> dict[str, list[Any]]:
    """Shape, type and fingerprint of every array by path."""
    arrays = flatten(items)
    # One program an array, for a program over all of them held a copy of them all; and one after another, for the
    # sums of several at a time would meet in another order in every process.
    return {path: [list(x.shape), str(x.dtype), int(_fingerprint(x))] for path, x in arrays.items()}


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        missing = {"step", "data", "arrays"} - set(meta)
    except Exception as error:
        raise DamagedCheckpointError(f"its meta data can't be read: {_brief(error)}") from error
    if missing:
        raise DamagedCheckpointError(f"its meta data lacks {', '.join(sorted(missing))}")
    return meta


def _check_fits(directory: Path, saved: dict[str, list[Any]], wanted: dict[str, dict[str, Any]]) -> None:
    here = {f"{n}/{path}": [list(x.shape), str(x.dtype)] for n, flat in wanted.items() for path, x in flat.items()}
    there = {path: entry[:2] for path, entry in saved.items()}
    differing = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    if differing:
        path = differing[0]
        saved_as, wanted_as = (f"{e[1]}{e[0]}" if e else "absent" for e in (there.get(path), here.get(path)))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(
            f"checkpoint {directory} is of another configuration: {path} is {saved_as} there, {wanted_as} here{more}; "
            "resume with the run's own config.json, or choose another workdir"
        )


def _read_arrays(
    manager: ocp.CheckpointManager, step: int, wanted: dict[str, PureDict], saved: dict[str, list[Any]]
) -> dict[str, PureDict]:
    try:
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        restored = manager.restore(step, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in wanted}
    except Exception as error:
        raise DamagedCheckpointError(_brief(error)) from error
    for path, (_, _, fingerprint) in describe(items).items():
        if fingerprint != saved[path][2]:
            raise DamagedCheckpointError(f"{path} is not what was saved")
    return items


def _brief(error: BaseException) -> str:
    """The first line of an error that may come with pages of storage details."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", text)
    if number is not None:
        return os.strerror(int(number[1]))
    lines = re.split(r"\s*(?:\n|See full TensorStore details)", text.strip())
    return lines[0][:300]
