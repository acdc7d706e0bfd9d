"""What a case of a kernel is, the arguments it draws, and the shapes that are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.shapes import BLOCK_FFN, MOE_FFN, SPARK_ATTENTION, SPARK_FFN

BF16, F32, INT8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), jnp.dtype(jnp.int8)
#: Errors relative to the root mean square of the reference, by dtype.
TOLERANCES = {F32: 1e-5, BF16: 2e-2}


class Result(NamedTuple):
    """What a form of an operation returns."""

    y: jax.Array
    selected: jax.Array | None = None
    """Booleans like y, or the number selected in each row of y."""


class Cost(NamedTuple):
    """Of one call, forward: what bounds its time."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """An operation with arguments."""

    name: str
    make: Callable[[Draw], Sequence[Any]]
    """Draws the arguments: arrays, or pytrees of them that have no gradient."""
    call: Callable[..., Result]
    """`call(implementation, *arguments)`."""
    dtype: Any
    of: int = 1
    """How many a row of y selects from."""
    differentiable: tuple[int, ...] = ()
    """The arguments whose gradients are compared."""
    poisoned: Callable[..., Sequence[Any]] | None = None
    """The arguments with NaN in what must not matter."""
    poisoned_on: tuple[str, ...] = ("gpu", "tpu")
    """Platforms whose kernels keep that promise: those of TPUs read whole tiles of rows, and may read all."""
    kernel: str | None = None
    """The implementation to try; None: the platform's Pallas kernel."""
    cost: Cost | None = None
    """None: not timed."""
    backward: float = 0
    """Cost of forward and backward over that of forward; 0: the gradient is not timed."""
    chained: int = 1
    """How many layers with arguments of their own are timed one after the other, so that no cache holds them."""
    rivals: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    """Other forms of the same work, of the arguments, timed beside it."""


class Draw:
    """Random arrays on the device, the same ones every time."""

    def __init__(self, seed: int = 0):
        self.key = jax.random.key(seed, impl="rbg")

    def __call__(self, *shape: int, dtype: Any = BF16, scale: float = 1) -> jax.Array:
        self.key, own = jax.random.split(self.key)
        return _normal(own, shape, jnp.dtype(dtype), scale)

    def integers(self, most: int, *shape: int) -> jax.Array:
        """In [0, most)."""
        self.key, own = jax.random.split(self.key)
        return jax.random.randint(own, shape, 0, most, jnp.int32)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, dtype, scale):
    drawn = jax.random.normal(key, shape, jnp.float32)
    return jnp.clip(jnp.round(40 * drawn), -127, 127).astype(dtype) if dtype == INT8 else (scale * drawn).astype(dtype)


def dtype_name(dtype: Any) -> str:
    """As in names of rows."""
    return {"bfloat16": "bf16", "float32": "f32"}.get(jnp.dtype(dtype).name, jnp.dtype(dtype).name)


@dataclass(frozen=True)
class Sizes:
    """The shapes that are run."""

    topk_rows: int
    topk_columns: tuple[int, ...]
    spark_ffn: tuple[int, int, int, float]
    """Width, predictor's width, neurons, k."""
    block_ffn: tuple[int, int, int]
    """Width, experts, neurons of one."""
    tokens: tuple[int, ...]
    heads: tuple[int, int]
    keys: tuple[int, ...]
    """Of decoding."""
    spark_attention: tuple[int, int, int, int, int]
    """Heads, key/value heads, width, r, k of the timed ones."""
    widths: tuple[int, ...]
    """Of heads."""
    lengths: tuple[int, int]
    """Tokens of attention whose values are compared: few for every width, many for one."""
    top_k: int
    latent: tuple[int, int]
    """Widths of keys and values of latent attention as it is trained."""
    grouped: tuple[int, int, int, int, int]
    """Tokens, width, experts, neurons of one, experts of a token."""
    relu_ffn: tuple[int, int, int]
    """Tokens, width, neurons of the layer that computes a block's neurons."""
    chained: int
    """Layers to decode through."""


FULL = Sizes(
    topk_rows=2048,
    topk_columns=(5000, 13_824, 32_768),
    spark_ffn=SPARK_FFN["2b"],
    block_ffn=BLOCK_FFN["2_8b"],
    tokens=(1, 8, 16),
    heads=(8, 4),
    keys=(8192, 32_768),
    spark_attention=SPARK_ATTENTION["2b"],
    widths=(128, 64, 256, 32),
    lengths=(1000, 8192),
    top_k=128,
    latent=(192, 128),
    grouped=(8192, *MOE_FFN["moe_xlarge"]),
    relu_ffn=(16_384, 2048, 5632),
    chained=8,
)
#: For trying the command itself, with interpreted kernels.
TINY = Sizes(
    topk_rows=4,
    topk_columns=(50,),
    spark_ffn=(24, 8, 40, 6),
    block_ffn=(16, 4, 8),
    tokens=(2,),
    heads=(2, 1),
    keys=(40,),
    spark_attention=(2, 1, 16, 8, 8),
    widths=(16,),
    lengths=(40, 72),
    top_k=8,
    latent=(24, 16),
    grouped=(16, 16, 4, 8, 2),
    relu_ffn=(40, 16, 48),
    chained=2,
)

#: An expert's neurons fill a tile's lanes.
TINY_TPU = dataclasses.replace(TINY, block_ffn=(32, 4, 128))


def union_size(chosen: float, of: int, times: int) -> float:
    """Expected size of the union of so many random choices."""
    return of * (1 - (1 - chosen / of) ** times)
