"""What every reader and writer of checkpoints shares: metadata, fingerprints of arrays, and errors in one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training.processes import DamagedCheckpointError
from sparsezoo_jax.training.state import PureDict, flatten
from sparsezoo_jax.untrusted import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, check_expansion, read_bytes, require_regular

# Orbax logs what it raises as well, once a thread with a traceback, and warns of each option it derives from
# read_only. What it raises becomes one StorageError; pages before that line would hide it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _is_no_remains(record: logging.LogRecord) -> bool:
    """False for what asyncio logs of the other writes of a save whose first failure was raised already."""
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.extract_tb(error.__traceback__) if error else []
    # TensorStore's own errors have no frames, but name the file.
    of_orbax = ".orbax-checkpoint-tmp" in str(error) or any("orbax" in frame.filename for frame in frames)
    return "never retrieved" not in record.getMessage() or not of_orbax


logging.getLogger("asyncio").addFilter(_is_no_remains)


def _without_remains(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """`report`, but for what Python can't raise any more when coroutines of a read or write that failed are deleted."""

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    return hook


sys.unraisablehook = _without_remains(sys.unraisablehook)


FORMAT = 2
"""Format of the metadata. The first one, without a number and a checksum, can be read."""
_FIRST_FORMAT = {"step", "data", "validation_loss", "arrays"}


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


def describe(items: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Shape, type and fingerprint of every array by path."""
    arrays = flatten(items)
    # One program an array, for a program over all of them held a copy of them all; and one after another, for the
    # sums of several at a time would meet in another order in every process.
    return {path: [list(x.shape), str(x.dtype), int(_fingerprint(x))] for path, x in arrays.items()}


_DESCRIPTION = "_CHECKPOINT_METADATA"


def unreadable_steps(directory: Path, *, only_sizes: bool = False) -> dict[int, str]:
    """Steps whose description keeps orbax from opening the whole directory, with the reason; empty if there are none.

    Args:
      only_sizes: look at sizes and kinds of files, and not at what is in them, which takes some milliseconds each.

    Raises:
      StorageError: the directory can't be read now, or no description be looked at, which says nothing of the steps.
    """
    try:
        descriptions = {
            int(step.name): step / _DESCRIPTION
            for step in (directory.iterdir() if directory.is_dir() else ())
            if step.name.isdigit() and (step / _DESCRIPTION).exists()
        }
        faults = {step: _fault(path, only_sizes) for step, path in sorted(descriptions.items())}
    except OSError as error:
        raise StorageError(f"checkpoints in {directory} can't be read: {brief(error)}") from error
    return {step: f"{_DESCRIPTION} {fault}" for step, fault in faults.items() if fault is not None}


def _fault(description: Path, only_size: bool) -> str | None:
    """What is wrong with a step's description; raises `OSError` where that can't be told."""
    try:
        content = read_bytes(description, MAX_CONFIG_BYTES)
    except ValueError as error:
        return str(error)
    except FileNotFoundError:
        return None  # the run that is trained there has removed an old step meanwhile
    except OSError as error:
        if _is_reading_error(error):
            raise
        return f"can't be read: {brief(error)}"
    if only_size:
        return None
    # Most of what could be wrong with it orbax takes for a description that is missing, and does without.
    with tempfile.TemporaryDirectory() as alone:
        step = Path(alone) / description.parent.name
        step.mkdir()
        (step / _DESCRIPTION).write_bytes(content)
        try:
            ocp.CheckpointManager(alone, options=of_this_process(read_only=True)).close()
        except Exception as error:
            if _is_reading_error(error):
                raise OSError(brief(error)) from error
            return f"can't be read: {brief(error).rstrip('.')}"
    return None


def of_this_process(**options: Any) -> ocp.CheckpointManagerOptions:
    """Options of a manager of this process alone, which waits for no other one."""
    own = jax.process_index()
    processes = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )
    return ocp.CheckpointManagerOptions(create=False, multiprocessing_options=processes, **options)


def check_texts(step: Path) -> None:
    """Check the files of a step that are read as a whole, its descriptions; those of arrays are read in parts.

    Raises:
      ValueError: one is longer than `MAX_INDEX_BYTES`, or no regular file.
    """
    for path in storage.files_below(step):
        # OCDBT keeps arrays and the index of them in folders of this name.
        if path.parent.name != "d":
            require_regular(path)
            if storage.version(path).size > MAX_INDEX_BYTES:
                raise ValueError(f"{path.relative_to(step)} is longer than {MAX_INDEX_BYTES:,} bytes")


def write_meta(content: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it is stored: `content` with the format's number and a checksum over all of it."""
    meta = {"format": FORMAT, **content}
    return {**meta, "checksum": _checksum(meta)}


def _checksum(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def read_meta(manager: ocp.CheckpointManager, step: int, *, parts: int = 1) -> dict[str, Any]:
    """The metadata of a step, verified; its arrays are spread over directories like this one, `parts` of them.

    Raises:
      DamagedCheckpointError: it is not what was written.
      StorageError: it can't be read, which says nothing of what was written; or it is of a later version.
    """
    with reading(manager, step, "its metadata can't be read: "):
        check_texts(storage.path(manager.directory) / str(step))
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if not isinstance(meta, dict):
        raise DamagedCheckpointError("its metadata is no JSON object")
    if meta.keys() == _FIRST_FORMAT:
        # Steps of versions before the checksum. Any other set of names has to have one: a damaged name must not turn
        # a step into one that nobody checks.
        print(
            f"warning: checkpoint {manager.directory / str(step)} is of a version whose metadata has no checksum: its "
            "arrays are verified, its position in the data is taken as it is",
            file=sys.stderr,
        )
    else:
        checksum = meta.pop("checksum", None)
        if checksum != _checksum(meta):
            raise DamagedCheckpointError("its metadata is not what was saved")
        if meta["format"] != FORMAT:
            raise StorageError(
                f"checkpoint {manager.directory / str(step)} has format {meta['format']}, of another version of this "
                f"package; this one reads format {FORMAT}"
            )
    _check_meta(meta, step)
    _check_size(manager, step, meta["arrays"], parts)
    return meta


def _check_meta(meta: dict[str, Any], step: int) -> None:
    """Raise `DamagedCheckpointError` unless types are right and numbers agree with each other."""
    data, arrays = meta["data"], meta["arrays"]
    if meta["step"] != step or not isinstance(data, dict) or not isinstance(arrays, dict):
        raise DamagedCheckpointError(f"its metadata is not that of step {step}")
    for path, entry in arrays.items():
        match entry:
            case [list(shape), str(), int()] if all(type(size) is int for size in shape):
                pass
            case _:
                raise DamagedCheckpointError(f"its metadata describes {path} as {entry}")
    # A batch is read for each step, but for those that a rewind passed over.
    batch, expected = data.get("next_batch", step), step + meta.get("passed_over", 0)
    if type(batch) is not int or batch != expected:
        raise DamagedCheckpointError(f"its position in the data is batch {batch}, not {expected}")


def _check_size(manager: ocp.CheckpointManager, step: int, arrays: Mapping[str, list[Any]], parts: int) -> None:
    """Arrays that have no bytes on disk are read as zeros: without this, a small file could fill the memory."""
    with reading(manager, step, "its metadata can't be right: "):
        stored = storage.bytes_below(storage.path(manager.directory) / str(step))
        sizes = {path: math.prod(shape) * jnp.dtype(dtype).itemsize for path, (shape, dtype, _) in arrays.items()}
        check_expansion(sizes, stored * parts)


@contextlib.contextmanager
def reading(manager: ocp.CheckpointManager, step: int, prefix: str = "") -> Iterator[None]:
    """Tell what was not written as it is read back from what can't be read now.

    Raises:
      DamagedCheckpointError: the former; StorageError: the latter.
    """
    directory = storage.path(manager.directory) / str(step)
    try:
        yield
    except (DamagedCheckpointError, UserError):
        raise
    except Exception as error:
        if _is_reading_error(error) or not directory.is_dir():
            why = brief(error)
            if not directory.is_dir() and directory.parent.is_dir():
                why = "it was removed meanwhile, as a run that is trained there removes old ones (train.keep_last)"
            raise StorageError(f"checkpoint {directory} can't be read: {why}") from error
        raise DamagedCheckpointError(f"{prefix}{brief(error)}") from error


#: What files that are missing, empty, cut short or of another kind raise.
_ERRNOS_OF_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.EBADMSG}
_STATUS_OF_READING = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED)\b"
)


def _is_reading_error(error: BaseException) -> bool:
    """Whether an error is of the machine, the network or permissions; also one that caused `error`."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or found in seen:
            continue
        seen.append(found)
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions
        text = str(found)
        number = re.search(r"os_error_code='(\d+)'", text)
        code = int(number[1]) if number else found.errno if isinstance(found, OSError) else None
        if code is not None and code not in _ERRNOS_OF_DAMAGE:
            return True
        if isinstance(found, (MemoryError, TimeoutError, ConnectionError)) or _STATUS_OF_READING.search(text):
            return True
    return False


def check_fits(directory: Path, saved: dict[str, list[Any]], wanted: dict[str, dict[str, Any]]) -> None:
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


def read_arrays(manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, PureDict]) -> dict[str, PureDict]:
    """The arrays of a step's items, on the shardings of `wanted`; not yet verified.

    Raises:
      DamagedCheckpointError: they are not there as they were written. StorageError: they can't be read.
    """
    with reading(manager, step):
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        restored = manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in wanted}


def verify(
    manager: ocp.CheckpointManager, step: int, items: Mapping[str, PureDict], saved: Mapping[str, list[Any]]
) -> None:
    """Compare shape, type and fingerprint of every array with what was saved; a computation of all processes.

    Raises:
      DamagedCheckpointError: one differs. StorageError: they can't be compared (out of memory).
    """
    with reading(manager, step):
        for path, found in describe(items).items():
            if found != saved[path]:
                raise DamagedCheckpointError(f"{path} is not what was saved")


def brief(error: BaseException) -> str:
    """The first line of an error that may come with pages of storage details."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", text)
    if number is not None:
        return os.strerror(int(number[1]))
    lines = re.split(r"\s*(?:\n|See full TensorStore details)", text.strip())
    return lines[0][:300]
