"""Tensors of a checkpoint, in one file or several, read and written one at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.huggingface import torch_files
from sparsezoo_jax.untrusted import MAX_INDEX_BYTES, MAX_SHARDS, MAX_TENSORS, read_json

TYPES = {"float32": "F32", "bfloat16": "BF16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def library() -> Any:
    """The safetensors library.

    Raises:
      UserError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed: pip install -e '.[hf]'") from None
    return safetensors


class TensorFiles(Protocol):
    """The tensors of a checkpoint by name: shapes, types by safetensors' names, and values on demand."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        ...


class SafetensorFiles:
    """The tensors of safetensors files: shape and type from the files' headers, values on demand."""

    def __init__(self, handles: Mapping[str, Any]):
        self._handles = handles
        slices = {name: handle.get_slice(name) for name, handle in handles.items()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor.

        Raises:
          StorageError: they can't be read.
        """
        try:
            return self._handles[name].get_tensor(name)
        except Exception as error:  # errors of the Rust side
            raise StorageError(f"tensor {name} can't be read: {error}") from error


#: What training scripts' wrappers put before all names of a model: `torch.compile`, data parallelism.
WRAPPERS = ("_orig_mod.", "module.")


class UnwrappedFiles:
    """The tensors of `files` by their names without a prefix that all of them have."""

    def __init__(self, files: TensorFiles, prefix: str):
        self._files, self._prefix = files, prefix
        self.shapes = {name.removeprefix(prefix): shape for name, shape in files.shapes.items()}
        self.dtypes = {name.removeprefix(prefix): dtype for name, dtype in files.dtypes.items()}

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor."""
        return self._files.read(self._prefix + name)


def wrapper_of(names: Collection[str]) -> str:
    """The prefix that wrappers put before all of these names; empty without one."""
    prefix, inner = "", list(names)
    while inner and (found := next((w for w in WRAPPERS if all(name.startswith(w) for name in inner)), None)):
        prefix, inner = prefix + found, [name.removeprefix(found) for name in inner]
    return prefix


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[TensorFiles]:
    """Open the checkpoint in `directory`: model.safetensors, else pytorch_model.bin, or the files that an index names.

    Prefixes of `WRAPPERS` are left out of the names. The libraries map files of this machine, so those of an object
    store are copied to the temporary directory for as long as they are open.

    Raises:
      UserError: there is none, files of the index are missing, or a library is not installed.
      StorageError: a file is damaged, or can't be read.
    """
    library()
    index, paths = _files(directory)
    with contextlib.ExitStack() as stack:
        try:
            files = stack.enter_context(storage.fetched(paths))
        except OSError as error:
            raise StorageError(f"{directory}: {error.strerror or error}") from error
        if index == torch_files.INDEX:
            yield _unwrapped(torch_files.TorchFiles(paths, files))
            return
        handles: dict[str, Any] = {}
        for path, file in zip(paths, files, strict=True):
            handle = _opened(stack, path, file)
            handles.update(dict.fromkeys(handle.keys(), handle))
            check_count(path, len(handles))
        yield _unwrapped(SafetensorFiles(handles))


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[TensorFiles]:
    """Open one safetensors file, whatever it is called.

    Raises:
      UserError: there is none, or the library is not installed.
      StorageError: it is damaged, or can't be read.
    """
    library()
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing")
    with contextlib.ExitStack() as stack:
        try:
            (file,) = stack.enter_context(storage.fetched([path]))
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}") from error
        handle = _opened(stack, path, file)
        names = handle.keys()
        check_count(path, len(names))
        yield SafetensorFiles(dict.fromkeys(names, handle))


def _opened(stack: contextlib.ExitStack, path: Path, file: Path) -> Any:
    """The library's handle of a file; `path` is what it is called in errors."""
    _check_header(file, path)
    try:
        return stack.enter_context(library().safe_open(file, framework="np"))
    except Exception as error:  # SafetensorError, OSError
        raise StorageError(f"{path}: not a safetensors file, or damaged: {error}") from error


def _unwrapped(files: TensorFiles) -> TensorFiles:
    prefix = wrapper_of(files.shapes)
    return UnwrappedFiles(files, prefix) if prefix else files


def _is_file(path: Path) -> bool:
    """False for names that no file can have, too: too long ones, and those with a null byte."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _check_header(file: Path, path: Path) -> None:
    """The library reads a header of up to 100 MB at once; `path` is what a file of this machine is called in errors."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    if size > MAX_INDEX_BYTES:
        raise UserError(f"{path}: has a header of {size:,} bytes; at most {MAX_INDEX_BYTES:,} are read")


def check_count(path: Path, count: int) -> None:
    """Check the number of tensors in a checkpoint's files up to `path`.

    Raises:
      UserError: there are too many.
    """
    if count > MAX_TENSORS:
        raise UserError(f"{path}: there are {count:,} tensors and more; at most {MAX_TENSORS:,} are read")


def _files(directory: Path) -> tuple[str, list[Path]]:
    """The files of a checkpoint, and the name of the index that they have or would have."""
    formats = ((SINGLE, INDEX), (torch_files.SINGLE, torch_files.INDEX))
    for single, index in formats:
        if (directory / index).is_file():
            return index, _indexed(directory, directory / index)
        if (directory / single).is_file():
            return index, [directory / single]
    names = ", ".join(name for pair in formats for name in pair)
    raise UserError(f"{directory}: holds none of {names}; other formats are not read")


def _indexed(directory: Path, index: Path) -> list[Path]:
    try:
        files = read_json(index, max_bytes=MAX_INDEX_BYTES)["weight_map"].values()
        check_count(index, len(files))
        names = sorted(set(files))
        foreign = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise StorageError(f"{index}: damaged: {error!r}") from error
    if len(names) > MAX_SHARDS:
        raise UserError(f"{index}: names {len(names):,} files; at most {MAX_SHARDS:,} are read")
    missing = foreign + [name for name in names if not _is_file(directory / name)]
    if missing:
        listed = ", ".join(list(dict.fromkeys(missing))[:20])
        raise UserError(f"{directory}: files that {index.name} names are missing: {listed}")
    return [directory / name for name in names]


def write_tensors(
    directory: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    value_of: Callable[[str], np.ndarray],
    max_bytes: int,
    *,
    single: str = SINGLE,
) -> None:
    """Write tensors in safetensors files of at most `max_bytes` (or one tensor); one tensor at a time is in memory.

    The library's writer wants a file's tensors all at once and copies them again; the format is a few lines.

    Args:
      directory: where to; on a disk it exists.
      tensors: shape and type of every tensor, in order.
      value_of: the values of a tensor.
      max_bytes: limit on a file.
      single: name of the file where one is enough.

    Raises:
      StorageError: writing failed.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (shape, dtype) in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [single] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    try:
        for file, names in zip(files, shards, strict=True):
            with storage.staged(directory / file) as staged, staged.open("wb") as out:
                out.write(_header({name: tensors[name] for name in names}))
                for name in names:
                    shape, dtype = tensors[name]
                    value = value_of(name)
                    assert (value.shape, value.dtype) == (shape, dtype), name
                    out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        if len(shards) > 1:
            places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            storage.write_atomic(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{directory}: could not write: {error.strerror}") from error


def _header(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """What a safetensors file begins with: length of the JSON that follows, then type, shape and place by name."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": TYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
