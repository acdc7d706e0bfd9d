"""Tensors in files that torch saved (`pytorch_model.bin`), read without running what is pickled in them."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.untrusted import MAX_INDEX_BYTES, MAX_SHARING, MAX_TENSORS, check_expansion

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def library() -> Any:
    """The torch library.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(f"torch is not installed, which {SINGLE} needs: pip install -e '.[hf]'") from None


def _check_archive(file: Path, path: Path) -> None:
    """Torch stores what is in its archives as it is. What is compressed could become any size."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise StorageError(f"{path}: damaged, or of torch before 1.6 and not to be mapped") from None
    if len(entries) > MAX_TENSORS + 10:
        raise UserError(f"{path}: holds {len(entries):,} files; at most {MAX_TENSORS:,} tensors are read")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {entry.filename} is compressed, which torch never does")
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_INDEX_BYTES:
            raise UserError(
                f"{path}: {entry.filename} has {entry.file_size:,} bytes; at most {MAX_INDEX_BYTES:,} are read"
            )


class TorchFiles:
    """The tensors of a checkpoint by name: shape, type (by safetensors' names) and, on demand, values.

    Files are mapped into memory, so that what is not read is not loaded; torch's weights-only loader refuses any file
    that holds more than tensors.

    Args:
      paths: what the files are called in errors.
      files: where they are on this machine.

    Raises:
      UserError: torch is not installed, or a file holds something else than named tensors. StorageError: a file is
        damaged, or of torch's format before 1.6, which can't be mapped.
    """

    def __init__(self, paths: Sequence[Path], files: Sequence[Path]):
        torch = library()
        self._tensors: dict[str, Any] = {}
        for path, file in zip(paths, files, strict=True):
            _check_archive(file, path)
            try:
                found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # UnpicklingError, RuntimeError, OSError, EOFError
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise StorageError(f"{path}: damaged, or more than tensors, or not to be mapped: {reason}") from None
            if not isinstance(found, Mapping):
                raise UserError(f"{path}: holds a {type(found).__name__}, not tensors by name")
            foreign = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
            if foreign:
                raise UserError(f"{path}: holds more than tensors: {', '.join(foreign[:20])}")
            if not all(isinstance(name, str) for name in found):
                raise UserError(f"{path}: holds tensors whose names are no text")
            self._tensors |= found
            if len(self._tensors) > MAX_TENSORS:
                raise UserError(f"{path}: there are {len(self._tensors):,} tensors; at most {MAX_TENSORS:,} are read")
            # Several names may share what is stored, and a step of 0 repeats it.
            sizes = {name: tensor.nelement() * tensor.element_size() for name, tensor in found.items()}
            try:
                check_expansion(sizes, file.stat().st_size, most=MAX_SHARING)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {
            name: names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, as a view of its file where they lie there in order."""
        tensor = self._tensors[name].contiguous()
        if self.dtypes[name] == "BF16":  # a type that NumPy does not know by itself
            return tensor.view(library().int16).numpy().view(jnp.dtype("bfloat16"))
        return tensor.numpy()
