"""Which implementation of an operation runs: the one that was named, or each platform's default.

An operation lists its implementations and calls what `dispatch` returns. Their names, the same for all operations (each
operation's docstring says which of them it has):

- "xla": plain JAX, partitioned and fused by the compiler. Every platform.
- "pallas_tpu": a Pallas kernel for TPUs. jax raises if it is lowered for another platform, or if its arguments are
  sharded outside of `sharding.shard_map`.
- "pallas_tpu_interpret": the same kernel, interpreted. Every platform; to test and debug kernels, not to be fast.
- "pallas_gpu", "pallas_gpu_interpret": likewise for NVIDIA GPUs.
- "blocked": plain JAX in loops over blocks, for CPUs. Every platform.
- "native": C++ for CPUs (`sparsezoo_jax.native`), most for a few rows and without a gradient (attention, SparseLM's
  layer and grouped products have one); jax raises if it is lowered for another platform.

With `implementation=None` the choice falls when the program is lowered, not when it is traced, so that compiling for a
TPU from a machine without one gives the TPU's program. `without_kernels` makes it "xla" everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.sharding import mesh_is_active, partitioned_by_compiler

R = TypeVar("R")

Platform = Literal["cpu", "tpu", "cuda"]

XLA = "xla"
NATIVE = "native"
BLOCKED = "blocked"

#: Whether `None` may be a kernel. A part of the keys of jax's caches: functions are traced again when it changes.
_KERNELS: Any = jax.make_user_context(default_value=True)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """`implementation=None` is plain JAX in what is called or traced within, for every platform it is lowered for.

    That leaves out the kernels for TPUs and GPUs, those of libraries (megablox), and native code and blocks for CPUs,
    so that a whole model or train step can be compared with itself. Implementations that are asked for by name stay.
    The backward pass uses the implementation of its forward pass, wherever the gradient is taken.
    """
    with _KERNELS(False):
        yield


@dataclasses.dataclass(frozen=True)
class CustomVJP(Generic[R]):
    """A function with its own gradient, as two functions like those of `jax.custom_vjp`.

    Its arguments are residuals in any case, and not results of `fwd`: as results of a choice by platform they would be
    other arrays to jax, and a scan over layers would stack copies of the weights.
    """

    fwd: Callable[..., tuple[R, Any]]
    """From the arguments to the result and the other residuals."""
    bwd: Callable[..., tuple[Any, ...]]
    """From the tuple of arguments, the other residuals and the result's cotangent to each argument's cotangent."""


@dataclasses.dataclass(frozen=True)
class Implementation(Generic[R]):
    """One way to compute an operation."""

    name: str
    call: Callable[..., R] | CustomVJP[R]
    """Takes the operation's arrays. `CustomVJP`s of one operation have residuals of the same structure; where a plain
    function is among them, they have none but the arrays."""
    platform: Platform | None = None
    """The platform for which it may be the default; None: those for which no other is. Of several defaults of a
    platform that can take the arguments, the last in the operation's list is taken."""
    refusal: Callable[[], str | None] = lambda: None
    """Says why it can't take the arguments at hand; None if it can."""
    default: bool = True
    """Whether `implementation=None` means it, on its platform and for arguments that it can take."""
    kernel: bool = False
    """Whether the compiler can't partition it over a mesh, most often as it can't see into it. `without_kernels` leaves
    it out."""
    sharded: bool = False
    """Whether a kernel calls `sharding.shard_map` itself, and so runs on a mesh all the same."""


def plain(call: Callable[..., R] | CustomVJP[R]) -> Implementation[R]:
    """The implementation "xla", in plain JAX."""
    return Implementation(XLA, call)


def pallas(
    platform: Literal["tpu", "cuda"],
    call: Callable[..., R] | CustomVJP[R],
    refusal: Callable[[bool], str | None],
    *,
    default: bool = True,
    sharded: bool = False,
) -> tuple[Implementation[R], Implementation[R]]:
    """A Pallas kernel, compiled for its platform and interpreted on any.

    Args:
      platform: the one it is written for; "cuda" are NVIDIA GPUs.
      call: takes the operation's arrays and the keyword `interpret`, as both functions of a `CustomVJP` do.
      refusal: given whether it is interpreted, says why the kernel can't take the arguments at hand.
      default, sharded: as in `Implementation`, of the compiled kernel.
    """

    def interpreted(interpret: bool) -> Callable[..., R] | CustomVJP[R]:
        if isinstance(call, CustomVJP):
            return CustomVJP(partial(call.fwd, interpret=interpret), partial(call.bwd, interpret=interpret))
        return partial(call, interpret=interpret)

    name = "pallas_tpu" if platform == "tpu" else "pallas_gpu"
    compiled = Implementation(
        name, interpreted(False), platform, partial(refusal, False), default, kernel=True, sharded=sharded
    )
    return compiled, Implementation(
        f"{name}_interpret", interpreted(True), None, partial(refusal, True), default=False, kernel=True
    )


def native_cpu(
    call: Callable[..., R] | CustomVJP[R], refusal: str | None, *, default: bool = True, sharded: bool = False
) -> Implementation[R]:
    """The implementation "native", in C++; `refusal` says why it can't take the arguments at hand, None if it can.

    `default` and `sharded` as in `Implementation`.
    """
    return Implementation(NATIVE, call, "cpu", lambda: refusal, default, kernel=True, sharded=sharded)


def dispatch(
    operation: str,
    implementation: str | None,
    implementations: Sequence[Implementation[R]],
    *,
    recompute: bool = False,
) -> Callable[..., R]:
    """The function of the operation's arrays that computes it by the implementation called `implementation`.

    With None it is a choice made when the program is lowered: on each platform the implementation that is its default,
    if that can take the arguments; elsewhere the default without a platform. Kernels are left out within
    `without_kernels`, and where the compiler partitions the program, unless they shard themselves.

    Args:
      operation: its name, for errors.
      implementation: what the caller asked for.
      implementations: all there are. Exactly one without a platform is a default.
      recompute: differentiate a choice between plain functions by computing the chosen one again in the backward pass,
        as is done beside a `CustomVJP`. Otherwise the intermediate results of every one become residuals.

    Raises:
      ConfigError: no implementation has that name, it can't take the arguments, or the native library is missing.
    """
    if implementation is not None:
        return _differentiable({None: _named(operation, implementation, implementations).call})
    (fallback,) = (found for found in implementations if found.platform is None and found.default)
    chosen = [fallback, *(found for found in implementations if found.platform is not None and _is_default(found))]
    calls = {found.platform: found.call for found in chosen}
    if len(chosen) > 1 and (recompute or any(isinstance(call, CustomVJP) for call in calls.values())):
        calls = {key: call if isinstance(call, CustomVJP) else recomputed(call) for key, call in calls.items()}
    return _differentiable(calls)


def _named(operation: str, name: str, implementations: Sequence[Implementation[R]]) -> Implementation[R]:
    field, by_name = f"{operation}.implementation", {found.name: found for found in implementations}
    if name not in by_name:
        raise ConfigError(field, name, f"must be one of {', '.join(sorted(by_name))}")
    if name == NATIVE and (missing := native.why_missing()) is not None:
        raise ConfigError(field, name, f"{missing}; {native.HOW_TO_GET}")
    if (refusal := by_name[name].refusal()) is not None:
        raise ConfigError(field, name, f'{refusal}; use "{XLA}"')
    return by_name[name]


def _is_default(found: Implementation[Any]) -> bool:
    """Whether it is used on its platform where no implementation is named."""
    if not found.default:
        return False
    if found.kernel:
        partitioned = partitioned_by_compiler() and not (found.sharded and mesh_is_active())
        if partitioned or not _KERNELS.value:
            return False
    if found.refusal() is not None:
        return False
    if found.name == NATIVE and not native.available():
        if jax.default_backend() == "cpu":
            native.warn_missing()
        return False
    return True


def _differentiable(calls: Mapping[Platform | None, Callable[..., R] | CustomVJP[R]]) -> Callable[..., R]:
    """The function that calls the one of its platform (None: of all others) in both passes; all are of one kind."""
    functions: dict[Platform | None, Callable[..., R]] = {
        platform: call for platform, call in calls.items() if not isinstance(call, CustomVJP)
    }
    if functions:
        return _by_platform(functions)
    rules: dict[Platform | None, Any] = dict(calls)
    fwd = _by_platform({platform: rule.fwd for platform, rule in rules.items()})
    bwd = _by_platform({platform: rule.bwd for platform, rule in rules.items()})
    allowed = _KERNELS.value

    def forward(*arrays):
        result, residuals = fwd(*arrays)
        return result, (arrays, residuals)

    def backward(saved, cotangent):
        with _KERNELS(allowed):  # what is traced only now belongs to the forward pass
            return bwd(*saved, cotangent)

    function = jax.custom_vjp(lambda *arrays: fwd(*arrays)[0])
    function.defvjp(forward, backward)
    return function


def _by_platform(calls: Mapping[Platform | None, Callable[..., R]]) -> Callable[..., R]:
    others: Any = {platform: call for platform, call in calls.items() if platform is not None}
    return partial(jax.lax.platform_dependent, default=calls[None], **others) if others else calls[None]


def recomputed(function: Callable[..., R]) -> CustomVJP[R]:
    """`function`, which the backward pass computes again; integers among its arguments have no gradient."""

    def bwd(arrays, residuals, cotangent):
        del residuals
        leaves, tree = jax.tree.flatten(arrays)
        is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def of_floats(*floats):
            remaining = iter(floats)
            mixed = [next(remaining) if own else leaf for leaf, own in zip(leaves, is_float, strict=True)]
            return function(*jax.tree.unflatten(tree, mixed))

        floats = [leaf for leaf, own in zip(leaves, is_float, strict=True) if own]
        gradients = iter(jax.vjp(of_floats, *floats)[1](cotangent))
        return jax.tree.unflatten(tree, [next(gradients) if own else None for own in is_float])

    return CustomVJP(lambda *arrays: (function(*arrays), ()), bwd)
