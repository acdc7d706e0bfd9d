"""What a calibration has found so far, kept beside the run that it makes, so that the same command goes on with it.

A directory holds the identity of what is made, and a folder for each pass through the layers: what was found of the
finished ones, the streams into the next one, and its number, which is written last. Whatever is cut off, all of that is
whole, and a layer that was not finished begins anew.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.storage import open_read, remove_tree, write_atomic
from sparsezoo_jax.untrusted import read_json

Arrays = dict[str, np.ndarray]
_IDENTITY, _NEXT = "identity.json", "next.json"


class Stage:
    """One pass through a decoder's layers; without a directory nothing is kept."""

    def __init__(self, directory: Path | None = None, begin: Callable[[], None] = lambda: None):
        """`begin` is called before something is kept."""
        self._directory, self._begin = directory, begin

    def finished(self) -> list[Arrays]:
        """What was found of the layers that are finished, in order."""
        if self._directory is None or not (self._directory / _NEXT).is_file():
            return []
        return [_read(self._directory / _layer(layer)) for layer in range(self._state()["next"])]

    def streams(self) -> list[np.ndarray] | None:
        """What the next layer reads of each batch; None before the first layer is finished."""
        if self._directory is None or not (self._directory / _NEXT).is_file():
            return None
        state = self._state()
        return [_read(self._directory / _stream(state["next"], i))["stream"] for i in range(state["batches"])]

    def keep(self, layer: int, found: Arrays, streams: Sequence[jax.Array]) -> None:
        """Keep what was found of a layer, and the streams after it (none of the last one, which nothing reads).

        Raises:
          StorageError: it can't be written.
        """
        if self._directory is None:
            return
        self._begin()
        _write(self._directory / _layer(layer), found)
        for i, stream in enumerate(streams):
            _write(self._directory / _stream(layer + 1, i), {"stream": np.asarray(stream)})
        write_atomic(self._directory / _NEXT, json.dumps({"next": layer + 1, "batches": len(streams)}).encode())
        for old in self._directory.glob(f"stream-{layer:05d}-*"):
            old.unlink(missing_ok=True)

    def _state(self) -> dict[str, int]:
        assert self._directory is not None
        return _read_json(self._directory / _NEXT)


class Progress:
    """All that is kept of one calibration; without a directory nothing is."""

    def __init__(self, directory: Path | None = None, identity: Mapping[str, Any] | None = None):
        self._directory, self._identity = directory, identity

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any]) -> Progress:
        """That in `directory`, which is made when there is something to keep.

        Args:
          directory: where it is kept.
          identity: by name, everything that the result depends on, as JSON has it.

        Raises:
          UserError: what is there belongs to another identity; the line names what differs.
          StorageError: it can't be read or written.
        """
        path = directory / _IDENTITY
        own = json.loads(json.dumps(identity))
        if not path.is_file():
            return cls(directory, own)
        found = _read_json(path)
        names = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        if names:
            listed = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            text = "holds an unfinished calibration, made with another"
            raise UserError(f"{directory}: {text} {listed}; ask for the same again, or remove it")
        return cls(directory)

    def stage(self, name: str) -> Stage:
        """The pass of this name."""
        return Stage(None if self._directory is None else self._directory / name, self._begin)

    def _begin(self) -> None:
        """Say what is kept here, before anything is."""
        if self._directory is not None and self._identity is not None:
            content = json.dumps(self._identity, indent=2) + "\n"
            write_atomic(self._directory / _IDENTITY, content.encode())
            self._identity = None

    def value(self, name: str) -> Arrays | None:
        """What was kept under this name; None: nothing."""
        if self._directory is None or not (self._directory / f"{name}.npz").is_file():
            return None
        return _read(self._directory / f"{name}.npz")

    def set_value(self, name: str, arrays: Arrays) -> None:
        """Keep arrays under a name, in place of those that were.

        Raises:
          StorageError: they can't be written.
        """
        if self._directory is not None:
            self._begin()
            _write(self._directory / f"{name}.npz", arrays)

    def remove(self) -> None:
        """Remove all of it; its identity goes last, so that nothing is left that another one could take for its own."""
        if self._directory is not None and self._directory.is_dir():
            for path in list(self._directory.iterdir()):
                if path.is_dir():
                    remove_tree(path)
                elif path.name != _IDENTITY:
                    path.unlink(missing_ok=True)
            remove_tree(self._directory)


def _layer(layer: int) -> str:
    return f"layer-{layer:05d}.npz"


def _stream(layer: int, batch: int) -> str:
    return f"stream-{layer:05d}-{batch:05d}.npz"


def _write(path: Path, arrays: Arrays) -> None:
    stored = {}
    for name, value in arrays.items():
        # NumPy's format does not know types that JAX adds: their bits are written, and the type beside the name.
        added = value.dtype.kind == "V"
        stored[f"{name}:{value.dtype}" if added else name] = value.view(f"u{value.itemsize}") if added else value
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **stored)
    write_atomic(path, content.getvalue())


def _read(path: Path) -> Arrays:
    try:
        with open_read(path) as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    typed = {}
    for name, value in found.items():
        plain, _, dtype = name.partition(":")
        typed[plain] = value.view(jnp.dtype(dtype)) if dtype else value
    return typed


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no object")
    return found


def _damaged(path: Path, error: object) -> StorageError:
    return StorageError(f"{path}: can't be read ({error}); remove what is kept of the calibration to begin anew")
