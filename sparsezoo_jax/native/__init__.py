"""Native CPU operations: a C++ library (`src/`) called from compiled programs through `jax.ffi`.

The library is compiled when the package is installed, if there is a C++ compiler, or later by
`python -m sparsezoo_jax.native`. It is loaded with the first call, not when this is imported.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np

from sparsezoo_jax.errors import SparsezooWarning
from sparsezoo_jax.native.build import LIBRARY, fingerprint

#: Operations of the library, by the names of its symbols without their prefix.
OPERATIONS = (
    "linear",
    "gemm",
    "gated_ffn",
    "spark_ffn",
    "relu_ffn",
    "thresholded_ffn",
    "relu_ffn_forward",
    "relu_ffn_backward",
    "active_rows",
    "top_k_mask",
    "expert_rows",
    "expert_products",
    "token_rows",
    "block_ffn",
    "deco_ffn",
    "attention",
    "spark_attention",
    "attention_forward",
    "attention_backward",
    "products_by_expert",
    "sum_of_experts",
    "sums_by_expert",
    "sum_of_blocks",
    "products_by_block",
    "sums_by_block",
    "from_blocks",
    "to_blocks",
    "put_slots",
    "stream",
)

#: Numbers of the non-linearities that a gated layer may have; `loops.h` has the same.
ACTIVATIONS = {"gelu_tanh": 0, "silu": 1, "relu": 2, "relu2": 3, "gelu": 4}


class _Library:
    """The loaded library with its operations registered, or the reason why there is none."""

    def __init__(self):
        self.missing: str | None = None
        self.level: str | None = None
        self.matrix_units = False
        if not LIBRARY.exists():
            self.missing = "it was not built"
            return
        try:
            self._register(ctypes.CDLL(str(LIBRARY)))
        except (OSError, AttributeError) as error:
            self.missing = f"{LIBRARY} could not be loaded ({error})"

    def _register(self, library: ctypes.CDLL) -> None:
        for name in ("sparsezoo_built_for", "sparsezoo_sources", "sparsezoo_level"):
            getattr(library, name).restype = ctypes.c_char_p
        if library.sparsezoo_sources().decode() != fingerprint():
            self.missing = "it was built from other sources than these"
            return
        built_for = library.sparsezoo_built_for().decode()
        if _version(built_for) > _version(jaxlib.version.__version__):
            self.missing = f"it was built for jaxlib {built_for}, and this is {jaxlib.version.__version__}"
            return
        for name in OPERATIONS:
            handler = jax.ffi.pycapsule(getattr(library, f"sparsezoo_{name}"))
            jax.ffi.register_ffi_target(f"sparsezoo_{name}", handler, platform="cpu")
        self.level = library.sparsezoo_level().decode()
        self.matrix_units = bool(library.sparsezoo_matrix_units())


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


@functools.cache
def _library() -> _Library:
    return _Library()


def why_missing() -> str | None:
    """Why there are no native operations, or None if there are."""
    return _library().missing


def available() -> bool:
    """Whether the native operations can be called."""
    return why_missing() is None


def level() -> str | None:
    """The instruction set that the operations use here: default, v3 (AVX2), v4 (AVX-512) or v4_bf16 (AVX512-BF16)."""
    return _library().level


def matrix_units() -> bool:
    """Whether the processor has units for matrix products of bfloat16 (AMX): XLA's products use them, these don't."""
    return _library().matrix_units


HOW_TO_GET = "build it with `python -m sparsezoo_jax.native` (needs g++ or clang++)"


@functools.cache
def warn_missing() -> None:
    """Say, once in a process, that plain JAX runs instead of the native operations, and how to get these."""
    warnings.warn(
        f"the native CPU library is missing: {why_missing()}; what has native forms, decoding above all, runs "
        "in plain JAX, which is slower. "
        f"To have it, {HOW_TO_GET}",
        SparsezooWarning,
        stacklevel=2,
    )


def advise_huge_pages(array: jax.Array) -> bool:
    """Ask Linux to put a CPU array's memory into pages of 2 MiB now, in place; whether it did.

    Rows that are read here and there then miss the address translation less. Worth it for weights that stay; what
    can't be done (another system, an array on several devices, a small one, no free pages) changes nothing.
    """
    if not sys.platform.startswith("linux") or len(array.sharding.device_set) > 1:
        return False
    size = 2 << 20
    start = array.unsafe_buffer_pointer()
    first, end = -(-start // size) * size, (start + array.nbytes) // size * size
    if end <= first:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    hugepage, collapse = 14, 25
    return madvise(first, end - first, hugepage) == 0 and madvise(first, end - first, collapse) == 0


def call(
    operation: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *arrays: jax.Array,
    aliases: Mapping[int, int] | None = None,
    vmap_method: str | None = None,
    **attributes: Any,
) -> tuple[jax.Array, ...]:
    """Call one of `OPERATIONS`, without any check of its arguments; not differentiable.

    `aliases` names arrays, by their places, that become results; `vmap_method` is that of `jax.ffi.ffi_call`.
    Attributes that are floats become float64, integers int64.
    """
    assert available()
    typed: Mapping[str, Any] = {name: _attribute(value) for name, value in attributes.items()}
    found: Any = jax.ffi.ffi_call(
        f"sparsezoo_{operation}",
        list(results),
        input_output_aliases=None if aliases is None else dict(aliases),
        vmap_method=vmap_method,
    )(*arrays, **typed)
    return tuple(found)


def _attribute(value: Any) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    return np.int64(value) if isinstance(value, int) else np.float64(value)
