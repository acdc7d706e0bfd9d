"""Tensors in files that torch saved (`pytorch_model.bin`), read without running what is pickled in them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import StorageError, UserError

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


class TorchFiles:
    """The tensors of a checkpoint by name: shape, type (by safetensors' names) and, on demand, values.

    Files are mapped into memory, so that what is not read is not loaded; torch's weights-only loader refuses any file
    that holds more than tensors.

    Raises:
      UserError: torch is not installed, or a file holds something else than named tensors. StorageError: a file is
        damaged, or of torch's format before 1.6, which can't be mapped.
    """

    def __init__(self, paths: Sequence[Path]):
        torch = library()
        self._tensors: dict[str, Any] = {}
        for path in paths:
            try:
                found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # UnpicklingError, RuntimeError, OSError, EOFError
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise StorageError(f"{path}: damaged, or more than tensors, or not to be mapped: {reason}") from None
            if not isinstance(found, Mapping):
                raise UserError(f"{path}: holds a {type(found).__name__}, not tensors by name")
            foreign = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
            if foreign:
                raise UserError(f"{path}: holds more than tensors: {', '.join(foreign[:20])}")
            self._tensors |= found
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
