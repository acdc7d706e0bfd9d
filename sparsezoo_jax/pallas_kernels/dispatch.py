"""Choice of an operation's implementation: `None` for the platform's default, or one by name.

Names, the same for all operations; each operation's docstring says which of them it has:

- "xla": plain JAX, partitioned and fused by the compiler. Every platform.
- "pallas_tpu": a Pallas kernel for TPUs. jax raises if it is lowered for another platform, or if its arguments are
  split over devices outside of a per-device function (`sharding.per_device`).
- "pallas_tpu_interpret": the same kernel, interpreted. Every platform; to test and debug kernels, not to be fast.
- "pallas_gpu", "pallas_gpu_interpret": likewise for NVIDIA GPUs.
- "native": C++ for CPUs (`sparsezoo_jax.native`), for operations on a few rows. Not differentiable; jax raises if it is
  lowered for another platform.

`None` is decided when the program is lowered, not when it is traced, so that compiling for a TPU from a machine without
one gets the TPU's program. `without_kernels` makes it plain JAX everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.sharding import partitioned_by_compiler, splits_per_device

T = TypeVar("T")

XLA = "xla"
PALLAS_TPU = "pallas_tpu"
PALLAS_TPU_INTERPRET = "pallas_tpu_interpret"
PALLAS_GPU = "pallas_gpu"
PALLAS_GPU_INTERPRET = "pallas_gpu_interpret"
NATIVE = "native"

#: Not names to ask for, and followed by platforms: their kernels where the program is lowered for them, else plain JAX.
BY_PLATFORM = "by platform: "

#: Whether `None` may be a kernel. A part of the keys of jax's caches: functions are traced again when it changes.
_KERNELS: Any = jax.make_user_context(default_value=True)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """`implementation=None` is plain JAX in what is called or traced within, for every platform it is lowered for.

    That leaves out the kernels for TPUs and GPUs, those of libraries (megablox) and native code for CPUs, so that a
    whole model or train step can be compared with itself. Implementations that are asked for by name stay. A gradient
    has the form of its forward pass, wherever it is taken.
    """
    with _KERNELS(False):
        yield


def kernels_allowed() -> bool:
    """Whether `None` may be a kernel here: not within `without_kernels`."""
    return _KERNELS.value


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
    gpu_why_not: Callable[[bool], str | None] | None = None,
    gpu_by_default: bool = False,
) -> str:
    """The form to use of an operation that has a kernel for TPUs, and with `gpu_why_not` one for GPUs.

    Args:
      operation: its name, for errors.
      implementation: what the caller asked for.
      why_not: why the TPU kernel can't take these arguments, or None if it can; called with whether it is interpreted.
      kernel_by_default: whether the kernel is the better choice on a TPU. Even so None means plain JAX for arguments
        that the kernel can't take, and where the compiler partitions: it can't partition kernels.
      splits: whether the operation itself calls its kernel by `sharding.per_device`.
      gpu_why_not, gpu_by_default: the same of the GPU kernel; None: there is none.

    Raises:
      ConfigError: no implementation of that name, or a kernel that can't take the arguments.
    """
    refusals = {PALLAS_TPU: why_not} | ({} if gpu_why_not is None else {PALLAS_GPU: gpu_why_not})
    names = {XLA: (XLA, False)}
    for kernel in refusals:
        names |= {kernel: (kernel, False), f"{kernel}_interpret": (kernel, True)}
    kernel, interpreted = choose(operation, implementation, names, XLA)
    if implementation is None:
        if not kernels_allowed():
            return XLA
        wanted = {PALLAS_TPU: ("tpu", kernel_by_default), PALLAS_GPU: ("cuda", gpu_by_default)}
        whole = not partitioned_by_compiler() or (splits and splits_per_device())
        found = [
            platform
            for kernel, (platform, by_default) in wanted.items()
            if by_default and whole and kernel in refusals and refusals[kernel](False) is None
        ]
        return BY_PLATFORM + " ".join(found) if found else XLA
    if kernel != XLA and (why := refusals[kernel](interpreted)) is not None:
        raise ConfigError(f"{operation}.implementation", implementation, f'{why}; use "xla"')
    return implementation


def run(
    form: str, xla: Callable[..., Any], kernel: Callable[..., Any], *arrays: Any, gpu: Callable[..., Any] | None = None
) -> Any:
    """Call the form that `settle` returned: `xla(*arrays)` or `kernel(*arrays, interpret=...)`; results alike.

    `kernel` is the one for TPUs, `gpu` that for GPUs.
    """
    kernels = {"tpu": (PALLAS_TPU, kernel), "cuda": (PALLAS_GPU, gpu)}
    if form == XLA:
        return xla(*arrays)
    if not form.startswith(BY_PLATFORM):
        (chosen,) = (kernel for name, kernel in kernels.values() if form in (name, f"{name}_interpret"))
        assert chosen is not None, "settled on a kernel that the operation does not have"
        return chosen(*arrays, interpret=form.endswith("_interpret"))
    chosen = {
        platform: partial(kernels[platform][1], interpret=False)  # pyright: ignore[reportArgumentType]
        for platform in form.removeprefix(BY_PLATFORM).split()
    }
    return jax.lax.platform_dependent(*arrays, **chosen, default=xla)


def loop_or_ragged(loop: Callable[..., Any], ragged: Callable[..., Any], *arrays: Any) -> Any:
    """`loop(*arrays)` where the program is lowered for a CPU, `ragged(*arrays)` elsewhere; floats are differentiable.

    The backward pass computes the chosen form again: derivatives of a choice would keep the intermediate results of
    both, and those of a grouped FFN are the largest arrays of its layer.
    """
    leaves, tree = jax.tree.flatten(arrays)
    kernels = kernels_allowed()
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def of_leaves(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *leaves: form(*jax.tree.unflatten(tree, leaves))

    def pullback(form: Callable[..., Any]) -> Callable[..., Any]:
        def pulled(leaves, g):
            def of_floats(*some):
                mixed = list(leaves)
                for i, leaf in zip(floats, some, strict=True):
                    mixed[i] = leaf
                return of_leaves(form)(*mixed)

            with _KERNELS(kernels):  # the forward pass's, which is traced again here
                return jax.vjp(of_floats, *(leaves[i] for i in floats))[1](g)

        return pulled

    @jax.custom_vjp
    def call(*leaves):
        return jax.lax.platform_dependent(*leaves, cpu=of_leaves(loop), default=of_leaves(ragged))

    def backward(leaves, g):
        found = jax.lax.platform_dependent(leaves, g, cpu=pullback(loop), default=pullback(ragged))
        gradients: list[Any] = [None] * len(leaves)
        for i, gradient in zip(floats, found, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    call.defvjp(lambda *leaves: (call(*leaves), leaves), backward)
    return call(*leaves)


def settle_native(
    operation: str,
    implementation: str | None,
    why_not: str | None,
    *,
    native_by_default: bool,
    gpu_why_not: Callable[[], str | None] | None = None,
    tpu_why_not: Callable[[bool], str | None] | None = None,
    tpu_by_default: bool = True,
) -> str:
    """The form to use of an operation that has "xla" and "native", and with `gpu_why_not` a kernel for GPUs.

    Args:
      operation: its name, for errors.
      implementation: what the caller asked for.
      why_not: why the native form can't take these arguments, or None if it can.
      native_by_default: whether it is the faster one for them. None means plain JAX where the native form can't take
        the arguments, where the compiler partitions, and, with a warning, where the library is missing.
      gpu_why_not: why the GPU kernel can't take them, or None if it can, and then it is the default on a GPU. None:
        there is none.
      tpu_why_not: likewise the TPU kernel, called with whether it is interpreted.
      tpu_by_default: whether it is the faster one for these arguments on a TPU.

    Raises:
      ConfigError: no implementation of that name, or one that is missing or can't take the arguments.
    """
    refusals: dict[str, Callable[[], str | None]] = {XLA: lambda: None, NATIVE: lambda: why_not}
    if gpu_why_not is not None:
        refusals |= {PALLAS_GPU: gpu_why_not, PALLAS_GPU_INTERPRET: gpu_why_not}
    if tpu_why_not is not None:
        refusals |= {PALLAS_TPU: partial(tpu_why_not, False), PALLAS_TPU_INTERPRET: partial(tpu_why_not, True)}
    refusal = choose(operation, implementation, refusals, XLA)
    if implementation is None:
        if not kernels_allowed() or partitioned_by_compiler():
            return XLA
        found = []
        if native_by_default and why_not is None:
            if native.available():
                found.append("cpu")
            elif jax.default_backend() == "cpu":
                native.warn_missing()
        if gpu_why_not is not None and gpu_why_not() is None:
            found.append("cuda")
        if tpu_why_not is not None and tpu_by_default and tpu_why_not(False) is None:
            found.append("tpu")
        return BY_PLATFORM + " ".join(found) if found else XLA
    if implementation == NATIVE and (missing := native.why_missing()) is not None:
        raise ConfigError(f"{operation}.implementation", implementation, f"{missing}; {native.HOW_TO_GET}")
    if (why := refusal()) is not None:
        raise ConfigError(f"{operation}.implementation", implementation, f'{why}; use "xla"')
    return implementation


def run_native(
    form: str,
    xla: Callable[..., Any],
    kernel: Callable[..., Any],
    *arrays: Any,
    gpu: Callable[..., Any] | None = None,
    tpu: Callable[..., Any] | None = None,
) -> Any:
    """Call the form that `settle_native` returned: `xla(*arrays)`, `kernel(*arrays)`, or a device's kernel.

    Those are called with `interpret` besides. Results are alike.
    """
    if form == XLA:
        return xla(*arrays)
    if form == NATIVE:
        return kernel(*arrays)
    devices = {"cuda": gpu, "tpu": tpu}
    if not form.startswith(BY_PLATFORM):
        chosen = devices["tpu" if form.startswith(PALLAS_TPU) else "cuda"]
        assert chosen is not None, "settled on a kernel that the operation does not have"
        return chosen(*arrays, interpret=form.endswith("_interpret"))
    by_platform = {"cpu": kernel} | {name: partial(f, interpret=False) for name, f in devices.items() if f is not None}
    wanted: Any = {platform: by_platform[platform] for platform in form.removeprefix(BY_PLATFORM).split()}
    return jax.lax.platform_dependent(*arrays, **wanted, default=xla)
