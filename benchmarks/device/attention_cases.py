"""Cases of attention: Spark's, all keys as flash attention sees them, and decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.case import BF16, Case, Cost, Result, Sizes, dtype_name, union_size
from sparsezoo_jax.pallas_kernels import flash_attention, spark_attention, spark_attention_rows
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility


def attention_rows(s: Sizes, keys: int, dtype: Any) -> Case:
    """One query of each of two sequences; keys after the end of a sequence are NaN."""
    (heads, kv_heads, width, r, k), batch = s.spark_attention, 2
    scales = exact_scales(r, width)

    def make(draw):
        cache = (batch, kv_heads, keys)
        # Sequences of their own lengths, as in a batch.
        mask = jnp.arange(keys) < jnp.array([[keys], [keys - keys // 5]])
        queries = draw(batch, heads, width, dtype=dtype)
        return [queries, draw(*cache, r, dtype=dtype), draw(*cache, 2 * width - r, dtype=dtype), mask]

    def call(form, q, k1, rest, mask):
        return Result(*spark_attention_rows(q, k1, rest, mask, top_k=k, **scales, implementation=form))

    def poisoned(q, k1, rest, mask):
        return [q, k1, jnp.where(mask[:, None, :, None], rest, jnp.nan), mask]

    size, group = jnp.dtype(dtype).itemsize, heads // kv_heads
    read = keys * r + union_size(min(k, keys), keys, group) * (2 * width - r)
    return Case(
        f"spark_attention_rows {keys} keys {dtype_name(dtype)}",
        make,
        call,
        dtype,
        of=keys,
        poisoned=poisoned,
        poisoned_on=("gpu",),
        cost=Cost(2 * batch * heads * (keys * r + k * (2 * width - r)), size * batch * kv_heads * read)
        if dtype == BF16
        else None,
        chained=s.chained,
    )


def exact_scales(r: int, width: int) -> dict[str, Any]:
    """Factors on the scores near the usual ones, but powers of two.

    Queries are scaled in their own dtype: by any other factor bfloat16 would select other keys than float32.
    """
    return {
        "predictor_scale": 2.0 ** round(-0.5 * math.log2(r)),
        "value_scale": 2.0 ** round(-0.5 * math.log2(max(width - r, 1))),
    }


def attention(s: Sizes, width: int, length: int, kind: str, dtype: Any = BF16) -> Iterator[Case]:
    """Spark attention, and all keys as flash attention does; `kind` names what else the layer has."""
    timed = kind == "long"
    heads, kv_heads = s.spark_attention[:2] if timed else s.heads
    batch = 1 if timed else 2
    window = max(length // 4, 8) if "window" in kind else None
    softcap = 50.0 if "softcap" in kind else None

    def make(draw):
        q = draw(batch, length, heads, width, dtype=dtype)
        k, v = (draw(batch, length, kv_heads, width, dtype=dtype) for _ in range(2))
        return [q, k, v, segments(batch, length, "packed" in kind)]

    pairs = batch * heads * length * (length + 1) / 2
    moved = jnp.dtype(dtype).itemsize * batch * length * 2 * (heads + kv_heads) * width
    words = "" if timed else f" {kind}"
    name = f"{length} tokens, heads of {width}{words} {dtype_name(dtype)}"

    def of(r: int, **options: Any) -> Callable[..., Result]:
        scales = exact_scales(r, width)

        def call(form, q, k, v, segments):
            visible = Visibility.of_tokens(segments, window)
            found = spark_attention(
                q, k, v, visible, r=r, top_k=s.top_k, softcap=softcap, **scales, **options, implementation=form
            )
            return Result(*found)

        return call

    yield Case(
        f"spark_attention {name}",
        make,
        of(width // 2),
        dtype,
        of=length,
        differentiable=(0, 1, 2),
        cost=Cost(2 * pairs * (width // 2 + 2 * width), moved) if timed else None,
        backward=(width // 2 + 2 * width + 7 * width) / (width // 2 + 2 * width),
    )
    scale = exact_scales(width, width)["predictor_scale"]

    def flash(form, q, k, v, segments):
        visible = Visibility.of_tokens(segments, window)
        return Result(flash_attention(q, k, v, visible, scale=scale, softcap=softcap, implementation=form))

    yield Case(
        f"flash_attention {name}",
        make,
        flash,
        dtype,
        of=length,
        differentiable=(0, 1, 2),
        cost=Cost(4 * pairs * width, moved) if timed else None,
        backward=3.5,
        rivals=dense_forms(scale, softcap, window) if timed else {},
    )


def segments(batch: int, length: int, packed: bool) -> jax.Array:
    """Documents of each sequence, int32 [B, T]: one, or several of different lengths and padding after them."""
    if not packed:
        return jnp.ones((batch, length), jnp.int32)
    ends = jnp.array([length // 3, length // 2, length - length // 10])
    row = jnp.sum(jnp.arange(length)[:, None] >= ends, axis=1) + 1
    return jnp.broadcast_to(row, (batch, length)).astype(jnp.int32)


def latent(s: Sizes) -> Case:
    """All keys, of another width than values, a head of keys for each query's."""
    width, values = s.latent
    heads, length = s.heads[0], s.lengths[0]
    scale = exact_scales(width, width)["predictor_scale"]

    def make(draw):
        q, k = (draw(1, length, heads, width) for _ in range(2))
        return [q, k, draw(1, length, heads, values), segments(1, length, False)]

    def call(form, q, k, v, segments):
        visible = Visibility.of_tokens(segments)
        return Result(flash_attention(q, k, v, visible, scale=scale, implementation=form))

    name = f"flash_attention {length} tokens, latent {width} and {values} bf16"
    return Case(name, make, call, BF16, of=length, differentiable=(0, 1, 2))


def dense_forms(scale: float, softcap: float | None, window: int | None) -> dict[str, Callable[..., Any]]:
    """Causal attention to all keys by libraries, and with scores of all pairs."""
    from sparsezoo_jax.pallas_kernels.attention import dense_attention

    def all_pairs(q, k, v, segments):
        mask = Visibility.of_tokens(segments, window).mask
        return dense_attention(q, k, v, mask, scale=scale, softcap=softcap)

    def cudnn(q, k, v, segments):
        options: dict[str, Any] = {} if window is None else {"local_window_size": (window - 1, 0)}
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn", **options)

    def jax_gpu(q, k, v, segments):
        from jax.experimental.pallas.ops.gpu.attention import mha

        # It has as many heads of keys as of queries.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        return mha(q, k, v, segment_ids=None, sm_scale=scale, causal=True)

    def jax_tpu(q, k, v, segments):
        from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        by_head = (x.swapaxes(1, 2) for x in (q, k, v))
        return flash_attention(*by_head, causal=True, sm_scale=scale).swapaxes(1, 2)

    return {
        "all pairs, xla": all_pairs,
        "gpu: cuDNN": cudnn,
        "gpu: jax's Triton": jax_gpu,
        "tpu: jax's flash_attention": jax_tpu,
    }
