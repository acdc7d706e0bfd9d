"""Parameters in checkpoints without the rest of a training run: reading them for evaluation, writing converted ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training.checkpoint_format import (
    DamagedCheckpointError,
    brief,
    describe,
    read_arrays,
    read_meta,
    reading,
    unreadable_steps,
    verify,
    write_meta,
)
from sparsezoo_jax.training.state import PureDict, nested

#: A run that is trained in the directory removes old steps, and orbax looks at all that it has listed.
_TRIES, _PAUSE_SECONDS = 10, 0.05
READ_BYTES = 1 << 28
"""Bytes of a model that are read at one time, or its largest array."""
WRITE_BYTES = 1 << 25
"""Unit in which `save_params` writes; what it holds in memory beside the arrays it was given is a few of these."""


def saved_steps(directory: Path | str) -> list[int]:
    """Complete steps in a checkpoint directory, oldest first; empty if there is no such directory."""
    directory = storage.path(directory).absolute()
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
    directory = storage.path(directory).absolute()
    chosen = _chosen(directory, step)
    try:
        return _restore_params(directory, chosen, sharding_of)
    except DamagedCheckpointError as error:
        raise _damaged(directory, chosen, error) from error


def _restore_params(
    directory: Path, step: int, sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None
) -> tuple[PureDict, PureDict]:
    with _reader(directory) as manager:
        meta = read_meta(manager, step)
    model_arrays = {path: entry for path, entry in meta["arrays"].items() if path.startswith("model/")}
    largest = max(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in model_arrays.values())
    with _reader(directory, max(largest, READ_BYTES)) as manager:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        flat = {}
        for path, (shape, dtype, _) in model_arrays.items():
            name = path.removeprefix("model/")
            sharding = device if sharding_of is None else sharding_of(name, tuple(shape))
            flat[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
        items = read_arrays(manager, step, {"model": nested(flat)})
        verify(manager, step, items, meta["arrays"])
    return items["model"]["params"], items["model"].get("model_state", {})


def saved_metadata(directory: Path | str, step: int | None = None) -> dict[str, Any]:
    """What a step (default: the newest) holds beside its arrays; under 'arrays' shape, type and fingerprint of each.

    Raises:
      UserError: there is no such step.
      StorageError: the step is damaged.
    """
    directory = storage.path(directory).absolute()
    chosen = _chosen(directory, step)
    try:
        with _reader(directory) as manager:
            return read_meta(manager, chosen)
    except DamagedCheckpointError as error:
        raise _damaged(directory, chosen, error) from error


def read_params(directory: Path | str, *, state: Collection[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters of the newest step, one at a time: path, as `flatten` gives it, and array in host memory.

    Of the model's other variables those whose paths are in `state` come along.

    Raises:
      UserError: there is no step.
      StorageError: the step is damaged.
    """
    directory = storage.path(directory).absolute()
    chosen = _chosen(directory, None)
    try:
        with _reader(directory) as manager:
            arrays = read_meta(manager, chosen)["arrays"]
        with contextlib.closing(_manager(directory, model=ocp.PyTreeCheckpointHandler())) as manager:
            others = {f"model/model_state/{path}" for path in state}
            for path, (shape, dtype, _) in arrays.items():
                if not path.startswith("model/params/") and path not in others:
                    continue
                item = nested({path.removeprefix("model/"): jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))})
                host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
                args = ocp.args.PyTreeRestore(item, restore_args=host, partial_restore=True)
                with reading(manager, chosen):
                    (array,) = jax.tree.leaves(manager.restore(chosen, args=ocp.args.Composite(model=args))["model"])
                verify(manager, chosen, {path: array}, arrays)
                yield path.split("/", 2)[2], array
    except DamagedCheckpointError as error:
        raise _damaged(directory, chosen, error) from error


def save_params(
    directory: Path | str, params: Mapping[str, Any], model_state: Mapping[str, Any] | None = None, *, step: int = 0
) -> None:
    """Write a step that holds a model and nothing else: enough to load it, not to go on training.

    Args:
      directory: the checkpoint directory; made if absent.
      params: arrays by path, as `flatten` gives them, of jax or numpy.
      model_state: its other variables likewise. None: it has none.
      step: number of the step.

    Raises:
      ConfigError: a store that checkpoints can't be in. StorageError: it can't be written.
    """
    directory = storage.path(directory).absolute()
    storage.require_place("directory", directory, schemes=storage.RUN_STORES)
    arrays: dict[str, list[Any]] = {}
    tree: dict[str, Any] = {}
    for part, values in (("params", params), ("model_state", model_state or {})):
        for path, array in values.items():
            # One by one: arrays of numpy are copied to the device.
            arrays |= describe({f"model/{part}/{path}": array})
        if values:
            tree[part] = nested(dict(values))
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
                    meta=ocp.args.JsonSave(
                        write_meta({"step": step, "data": {}, "validation_loss": None, "arrays": arrays})
                    ),
                ),
            )
            manager.wait_until_finished()
            manager.check_for_errors()
    except Exception as error:
        raise StorageError(f"saving a checkpoint in {directory} failed: {brief(error)}") from error


def _damaged(directory: Path, step: int, error: Exception) -> StorageError:
    """What to say of a damaged step: also which one before it is whole."""
    remedy = "no step before it can be read"
    for earlier in reversed([number for number in saved_steps(directory) if number < step]):
        try:
            _restore_params(directory, earlier)
        except (DamagedCheckpointError, StorageError):
            continue
        remedy = f"step {earlier} can be read: --step {earlier}"
        break
    return StorageError(f"checkpoint {directory / str(step)} is damaged: {error}; {remedy}")


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
    tries_left = _TRIES
    while True:
        tries_left -= 1
        _refuse_unreadable(directory, only_sizes=True)
        try:
            return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)
        except Exception as error:
            if not (isinstance(error, FileNotFoundError) and directory.is_dir() and tries_left):
                _refuse_unreadable(directory)
                raise StorageError(f"checkpoints in {directory} can't be read: {brief(error)}") from error
        time.sleep(_PAUSE_SECONDS)


def _refuse_unreadable(directory: Path, *, only_sizes: bool = False) -> None:
    for step, reason in unreadable_steps(directory, only_sizes=only_sizes).items():
        raise StorageError(
            f"checkpoint {directory / str(step)} is damaged: {reason}; to read other steps, rename it to {step}.damaged"
        )
