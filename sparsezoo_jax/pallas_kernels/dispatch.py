"""Choice of an operation's implementation: `None` for the platform's default, or one by name.

Names, the same for all operations; each operation's docstring says which of them it has:

- "xla": plain JAX, partitioned and fused by the compiler. Every platform.
- "pallas_tpu": a Pallas kernel for TPUs. jax raises if it is lowered for another platform, or if its arguments are
  split over devices outside of a per-device function (`sharding.per_device`).
- "pallas_tpu_interpret": the same kernel, interpreted. Every platform; to test and debug kernels, not to be fast.
- "native": C++ for CPUs (`sparsezoo_jax.native`), for operations on a few rows. Not differentiable; jax raises if it is
  lowered for another platform.

`None` is decided when the program is lowered, not when it is traced, so that compiling for a TPU from a machine without
one gets the TPU's program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from sparsezoo_jax import native
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.sharding import partitioned_by_compiler, splits_per_device

T = TypeVar("T")

XLA = "xla"
PALLAS_TPU = "pallas_tpu"
PALLAS_TPU_INTERPRET = "pallas_tpu_interpret"
NATIVE = "native"

#: Not a name to ask for: the kernel where the program is lowered for its platform, plain JAX elsewhere.
BY_PLATFORM = "by platform"


def choose(operation: str, implementation: str | None, available: Mapping[str, T], default: str) -> T:
    """Return the implementation called `implementation`, or `default` when it is None.

    Raises:
      ConfigError: no implementation of that name exists for the operation.
    """
    name = implementation or default
    if name not in available:
        raise ConfigError(f"{operation}.implementation", name, f"must be one of {', '.join(sorted(available))}")
    return available[name]


def settle(
    operation: str,
    implementation: str | None,
    why_not: Callable[[bool], str | None],
    *,
    kernel_by_default: bool,
    splits: bool = False,
) -> str:
    """The form to use of an operation that has all of the names above.

    Args:
      operation: its name, for errors.
      implementation: what the caller asked for.
      why_not: why the TPU kernel can't take these arguments, or None if it can; called with whether it is interpreted.
      kernel_by_default: whether the kernel is the better choice on a TPU. Even so None means plain JAX for arguments
        that the kernel can't take, and where the compiler partitions: it can't partition kernels.
      splits: whether the operation itself calls its kernel by `sharding.per_device`.

    Raises:
      ConfigError: no implementation of that name, or a kernel that can't take the arguments.
    """
    name = choose(operation, implementation, {name: name for name in (XLA, PALLAS_TPU, PALLAS_TPU_INTERPRET)}, XLA)
    if implementation is None:
        whole = not partitioned_by_compiler() or (splits and splits_per_device())
        return BY_PLATFORM if kernel_by_default and whole and why_not(False) is None else XLA
    if name != XLA and (why := why_not(name == PALLAS_TPU_INTERPRET)) is not None:
        raise ConfigError(f"{operation}.implementation", name, f'{why}; use "xla"')
    return name


def run(form: str, xla: Callable[..., Any], kernel: Callable[..., Any], *arrays: Any) -> Any:
    """Call the form that `settle` returned: `xla(*arrays)` or `kernel(*arrays, interpret=...)`; results alike."""
    if form == XLA:
        return xla(*arrays)
    if form != BY_PLATFORM:
        return kernel(*arrays, interpret=form == PALLAS_TPU_INTERPRET)
    return jax.lax.platform_dependent(*arrays, tpu=lambda *a: kernel(*a, interpret=False), default=xla)


def settle_native(operation: str, implementation: str | None, why_not: str | None, *, native_by_default: bool) -> str:
    """The form to use of an operation that has "xla" and "native".

    Args:
      operation: its name, for errors.
      implementation: what the caller asked for.
      why_not: why the native form can't take these arguments, or None if it can.
      native_by_default: whether it is the faster one for them. None means plain JAX where the native form can't take
        the arguments, where the compiler partitions, and, with a warning, where the library is missing.

    Raises:
      ConfigError: no implementation of that name, or a native one that is missing or can't take the arguments.
    """
    name = choose(operation, implementation, {XLA: XLA, NATIVE: NATIVE}, XLA)
    if implementation is None:
        if not native_by_default or why_not is not None or partitioned_by_compiler():
            return XLA
        if native.available():
            return BY_PLATFORM
        if jax.default_backend() == "cpu":
            native.warn_missing()
        return XLA
    if name == NATIVE:
        if (missing := native.why_missing()) is not None:
            raise ConfigError(f"{operation}.implementation", name, f"{missing}; {native.HOW_TO_GET}")
        if why_not is not None:
            raise ConfigError(f"{operation}.implementation", name, f'{why_not}; use "xla"')
    return name


def run_native(form: str, xla: Callable[..., Any], kernel: Callable[..., Any], *arrays: Any) -> Any:
    """Call the form that `settle_native` returned: `xla(*arrays)` or `kernel(*arrays)`; results alike."""
    if form != BY_PLATFORM:
        return (kernel if form == NATIVE else xla)(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=kernel, default=xla)
