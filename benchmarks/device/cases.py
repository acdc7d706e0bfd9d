"""The kernels and their arguments: one list, of which values are compared and times are taken.

Whoever adds a kernel adds its cases here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.attention_cases import attention, attention_rows, latent
from benchmarks.device.case import BF16, F32, INT8, Case, Cost, Draw, Result, Sizes, dtype_name, union_size
from sparsezoo_jax.pallas_kernels import (
    block_ffn_rows,
    block_ffn_union,
    spark_ffn_rows,
    statistical_topk,
    without_kernels,
)
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.grouped_linear import from_blocks
from sparsezoo_jax.pallas_kernels.grouped_linear.reference import Blocks
from sparsezoo_jax.pallas_kernels.ragged import ragged_matmul
from sparsezoo_jax.pallas_kernels.relu_ffn import relu_ffn


def cases(s: Sizes) -> list[Case]:
    """All of them, the most valuable first."""
    long = attention(s, s.spark_attention[2], s.lengths[1], "long")
    timed = [*long, attention_rows(s, s.keys[0], BF16), spark_rows(s, 1, BF16), block_rows(s, 1, BF16)]
    found = [
        *topk(s, s.topk_columns[min(1, len(s.topk_columns) - 1)], BF16),
        *attention(s, s.widths[0], s.lengths[0], "packed window softcap"),
        *timed,
        union(s, 8, BF16),
        *grouped(s),
        *sparse_relu(s),
        *ragged(s),
    ]
    found += [attention_rows(s, keys, dtype) for keys, dtype in ((s.keys[-1], BF16), (s.keys[0], F32))]
    found += [case for width in s.widths[1:] for case in attention(s, width, s.lengths[0], "packed window softcap")]
    found += attention(s, s.widths[0], s.lengths[0], "packed", F32)
    found += [latent(s)]
    for dtype in (INT8, F32):
        found += [spark_rows(s, s.tokens[0], dtype), block_rows(s, s.tokens[0], dtype)]
    for tokens in s.tokens[1:]:
        found += [spark_rows(s, tokens, BF16), block_rows(s, tokens, BF16), union(s, tokens, BF16)]
    found += [spark_rows(s, s.tokens[-1], INT8), block_rows(s, s.tokens[-1], INT8), union(s, s.tokens[-1], F32)]
    for columns in s.topk_columns:
        for dtype in (BF16, F32):
            found += topk(s, columns, dtype)
    first: dict[str, Case] = {}
    for case in found:
        first.setdefault(case.name, case)
    return list(first.values())


def one_of_each(found: list[Case]) -> list[Case]:
    """The first case of every operation, and of int8 weights."""
    first: dict[tuple[str, bool], Case] = {}
    for case in found:
        operation = re.match(r"\D+", case.name)
        first.setdefault((operation.group() if operation else case.name, "int8" in case.name), case)
    return list(first.values())


# Statistical top-k --------------------------------------------------------------------------------------------------


def topk(s: Sizes, columns: int, dtype: Any) -> Iterator[Case]:
    """Without and with a mask, under which entries are NaN."""
    k, size = 0.08 * columns, jnp.dtype(dtype).itemsize
    name = f"{s.topk_rows} x {columns} {dtype_name(dtype)}"

    def plain(form, x):
        y = statistical_topk(x, k, implementation=form)
        return Result(y, y > 0)

    yield Case(
        f"statistical_topk {name}",
        lambda draw: [draw(s.topk_rows, columns, dtype=dtype)],
        plain,
        dtype,
        differentiable=(0,),
        cost=Cost(0, 2 * size * s.topk_rows * columns) if dtype == BF16 else None,
        backward=2.5,  # five rows read or written, where forward has two
        rivals={
            "lax.top_k": lambda x: jax.lax.top_k(x, int(k))[0],
            "lax.approx_max_k": lambda x: jax.lax.approx_max_k(x, int(k))[0],
        },
    )

    def masked(form, x, where):
        y = statistical_topk(x, k, where=where, implementation=form)
        return Result(y, y != 0)

    yield Case(
        f"statistical_topk masked {name}",
        lambda draw: [draw(s.topk_rows, columns, dtype=dtype), draw(s.topk_rows, columns, dtype=F32) < 1],
        masked,
        dtype,
        differentiable=(0,),
        poisoned=lambda x, where: [jnp.where(where, x, jnp.nan), where],
    )


# Rows of few tokens -------------------------------------------------------------------------------------------------


def spark_rows(s: Sizes, tokens: int, dtype: Any) -> Case:
    """Rows of neurons that no token activates are NaN."""
    d, r, neurons, k = s.spark_ffn
    wide = F32 if dtype == F32 else BF16
    scale = 1 / 40 if dtype == INT8 else 1

    def make(draw):
        k1, rows = draw(neurons, r, dtype=dtype), draw(neurons, 2 * d - r, dtype=dtype)
        scales = [jnp.full((neurons, *n), 1 / 40) for n in ((), (2,))] if dtype == INT8 else [None, None]
        return [draw(tokens, d, dtype=wide), k1, rows, scales]

    def call(form, x, k1, rows, scales):
        return Result(*spark_ffn_rows(x, k1, rows, top_k=k, scales=tuple(scales), implementation=form))

    def poisoned(x, k1, rows, scales):
        if dtype == INT8:  # has no NaN
            return [x, k1, rows, scales]
        scores = scale * x[:, :r].astype(F32) @ k1.astype(F32).T
        # With some more than are active: scores come out in another last bit.
        idle = ~jnp.any(statistical_topk(scores, min(2 * k, neurons - 1), implementation="xla") > 0, axis=0)
        return [x, k1, jnp.where(idle[:, None], jnp.nan, rows), scales]

    flops = 2 * tokens * (neurons * r + k * (2 * d - r))
    moved = jnp.dtype(dtype).itemsize * (neurons * r + union_size(k, neurons, tokens) * (2 * d - r))
    return Case(
        f"spark_ffn_rows {tokens} tokens {dtype_name(dtype)}",
        make,
        call,
        wide,
        of=neurons,
        poisoned=poisoned,
        poisoned_on=("gpu",),
        cost=Cost(flops, moved) if dtype == BF16 else None,
        chained=s.chained,
    )


def block_rows(s: Sizes, tokens: int, dtype: Any) -> Case:
    """Experts that no token takes are NaN."""
    d, experts, width = s.block_ffn
    wide, taken = F32 if dtype == F32 else BF16, max(1, round(0.15 * experts))

    def make(draw):
        up, down = (draw(experts, width, d, dtype=dtype) for _ in range(2))
        scales = [jnp.full((experts, width), 1 / 40)] * 2 if dtype == INT8 else [None, None]
        return [draw(tokens, d, dtype=wide, scale=d**-0.5), _scores(draw, tokens, experts, taken), up, down, scales]

    def call(form, x, scores, up, down, scales):
        return Result(block_ffn_rows(x, scores, up, down, scales=(*scales, None), implementation=form))

    def poisoned(x, scores, up, down, scales):
        if dtype == INT8:
            return [x, scores, up, down, scales]
        idle = ~jnp.any(scores != 0, axis=0)[:, None, None]
        return [x, scores, *(jnp.where(idle, jnp.nan, w) for w in (up, down)), scales]

    moved = jnp.dtype(dtype).itemsize * 2 * union_size(taken, experts, tokens) * width * d
    return Case(
        f"block_ffn_rows {tokens} tokens {dtype_name(dtype)}",
        make,
        call,
        wide,
        poisoned=poisoned,
        poisoned_on=("gpu",),
        cost=Cost(4 * tokens * taken * width * d, moved) if dtype == BF16 else None,
        chained=s.chained,
    )


def _scores(draw: Draw, tokens: int, experts: int, taken: int) -> jax.Array:
    """Scores of which so many of a token are not 0."""
    logits = draw(tokens, experts, dtype=F32)
    least = jax.lax.top_k(logits, taken)[0][:, -1:]
    return jnp.where(logits >= least, 1 + jnp.abs(logits), 0)


def union(s: Sizes, tokens: int, dtype: Any) -> Case:
    """The union of a chunk's experts; the others are NaN."""
    d, experts, width = s.block_ffn
    taken = max(1, round(0.15 * experts))

    def make(draw):
        flat = experts * width
        up, down = draw(d, flat, dtype=dtype), draw(flat, d, dtype=dtype)
        scores = _scores(draw, 1, experts, taken) * jnp.abs(draw(tokens, experts, dtype=F32))
        return [draw(tokens, d, dtype=dtype, scale=d**-0.5), scores.astype(dtype), up, down]

    def call(form, x, scores, up, down):
        return Result(block_ffn_union(x, scores, up, down, expert_width=width, capacity=taken, implementation=form))

    def poisoned(x, scores, up, down):
        idle = jnp.repeat(~jnp.any(scores != 0, axis=0), width)
        return [x, scores, jnp.where(idle, jnp.nan, up), jnp.where(idle[:, None], jnp.nan, down)]

    size = jnp.dtype(dtype).itemsize
    return Case(
        f"block_ffn_union {tokens} tokens {dtype_name(dtype)}",
        make,
        call,
        dtype,
        poisoned=poisoned,
        cost=Cost(4 * tokens * taken * width * d, 2 * size * taken * width * d) if dtype == BF16 else None,
        chained=s.chained,
    )


# Unions of neurons ---------------------------------------------------------------------------------------------------


def sparse_relu(s: Sizes) -> Iterator[Case]:
    """A ReLU-gated layer of which a token uses one neuron in 200, or 50; neurons that no token uses are NaN."""
    tokens, d, neurons = s.relu_ffn
    for percent, bias in ((0.5, -2.576), (2, -2.054)):

        def make(draw, bias=bias):
            # The first column of the input is 1: its weight sets how many of the scores, of deviation 1, are above 0.
            x = draw(1, tokens, d).at[..., 0].set(1)
            gate = draw(d, neurons, scale=d**-0.5).at[0].set(bias).at[0, ::3].set(-100)
            return [x, gate, draw(d, neurons, scale=d**-0.5), draw(neurons, d)]

        def call(form, x, gate, up, down):
            form = form if form in ("pallas_gpu", "pallas_gpu_interpret") else "xla"
            return Result(relu_ffn(x, gate, up, down, jnp.ones(x.shape[:2], bool), implementation=form).y)

        def poisoned(x, gate, up, down):
            idle = jnp.arange(neurons) % 3 == 0
            return [x, gate, jnp.where(idle, jnp.nan, up), jnp.where(idle[:, None], jnp.nan, down)]

        yield Case(
            f"relu_ffn {tokens} tokens, {percent:g} % of {neurons} neurons bf16",
            make,
            call,
            BF16,
            differentiable=(0, 1, 2, 3),
            poisoned=poisoned,
            poisoned_on=("gpu",),
            # All neurons are a bound that unions can go below: the map before the ReLU alone takes them all.
            cost=Cost(6 * tokens * d * neurons, 2 * (3 * d * neurons + 2 * tokens * d)),
            backward=3,
        )


# Grouped products ---------------------------------------------------------------------------------------------------


def grouped(s: Sizes) -> Iterator[Case]:
    """Experts whose tokens are sorted, against all experts for all tokens."""
    tokens, d, experts, width, k = s.grouped

    def make(draw):
        chosen = jax.lax.top_k(draw(tokens, experts, dtype=F32), k)[1]
        weights = jnp.abs(draw(tokens, k, dtype=F32)).astype(BF16)
        up, down = draw(experts, d, width, scale=d**-0.5), draw(experts, width, d, scale=width**-0.5)
        return [draw(tokens, d), chosen, weights, up, down]

    def call(form, x, chosen, weights, up, down):
        form = "dense" if form == "xla" else form
        y: Any = grouped_ffn(x, chosen, weights, up, down, implementation=form)
        return Result(y)

    def libraries(*arguments):
        with without_kernels():
            return call("ragged", *arguments).y

    size = 2 * (2 * experts * d * width + 2 * tokens * d)
    yield Case(
        f"grouped_ffn {tokens} tokens, {k} of {experts} experts bf16",
        make,
        call,
        BF16,
        differentiable=(0, 3, 4),
        kernel="ragged",
        cost=Cost(4 * tokens * k * d * width, size),
        backward=3,
        rivals={"ragged_dot": libraries},
    )
    blocks = Blocks(count=experts, shared=1)

    def make_blocks(draw):
        routed = 1 + jax.lax.top_k(draw(tokens, experts - 1, dtype=F32), k)[1]
        inner = width * experts
        return [draw(tokens, inner), routed, draw(inner, d, scale=inner**-0.5)]

    def call_blocks(form, x, routed, w):
        return Result(from_blocks(x, routed, w, blocks, implementation="dense" if form == "xla" else form))

    name = f"from_blocks {tokens} tokens, {k} of {experts} blocks bf16"
    yield Case(name, make_blocks, call_blocks, BF16, differentiable=(0, 2), kernel="ragged")


def ragged(s: Sizes) -> Iterator[Case]:
    """Products whose sizes fill no tile, of groups that end within one; weights of an empty group are NaN."""
    rows, inner, outer = s.lengths[0], 352, 96
    sizes = [0, rows // 2, 1, 0, rows - rows // 2 - 8]

    def make(draw, dtype):
        w = draw(len(sizes), inner, outer, dtype=dtype, scale=inner**-0.5)
        return [draw(rows, inner, dtype=dtype), w, jnp.asarray(sizes, jnp.int32)]

    def call(form, x, w, sizes):
        # TPUs have the libraries' products alone.
        return Result(ragged_matmul(x, w, sizes, implementation=None if "tpu" in form else form))

    for dtype in (BF16, F32):
        yield Case(
            f"ragged_matmul {rows} x {inner} {dtype_name(dtype)}",
            partial(make, dtype=dtype),
            call,
            dtype,
            differentiable=(0, 1),
            poisoned=lambda x, w, sizes: [x, w.at[3].set(jnp.nan), sizes],
            poisoned_on=("gpu",),
        )
