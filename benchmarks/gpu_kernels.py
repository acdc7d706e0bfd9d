"""GPU kernels beside XLA's own forms as NVIDIA's assembler and the memory's bandwidth see them: `python -m
benchmarks.gpu_kernels`. No GPU is needed, and nothing is measured on one.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.shapes import BLOCK_FFN, FFN_SCORES, MOE_FFN, SPARK_ATTENTION
from sparsezoo_jax.compilation.ptx import kernels
from sparsezoo_jax.compilation.topologies import lowering_for, open_topology
from sparsezoo_jax.compilation.traffic import hbm_bytes
from sparsezoo_jax.pallas_kernels import (
    block_ffn,
    block_ffn_rows,
    block_ffn_union,
    flash_attention,
    spark_attention,
    spark_attention_rows,
    spark_ffn,
    spark_ffn_rows,
    statistical_topk,
    without_kernels,
)
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.relu_ffn import relu_ffn
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.tuning import launch_of

NOTES = """
Bytes are the operands and results of every kernel, for the union and the rows those in use; what the 50 MB of L2 keep
between kernels is counted all the same. Occupancy is the share of a multiprocessor's threads that its registers and
shared memory have room for. Times are bytes / bandwidth and, of attention and experts, FLOPs of products / those of the
datasheet: bounds. Attention's blocks read keys again and again; 8,192 of a layer are 33 MB, which L2 keeps.
"""
#: Tokens of an attention.
LENGTH = 8192
#: Heads, heads of keys, width and softcap of Llama 3 8B.
LLAMA = (32, 8, 128, None)


class Case(NamedTuple):
    """One program of the table."""

    name: str
    function: Callable
    arguments: list[Any]
    bytes: int | None = None
    """What it moves, where its kernels read parts of their operands."""
    flops: int | None = None
    """Of matrix products, where they may be the bound."""


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def cases() -> list[Case]:
    """All programs, in order."""
    d, k = FFN_SCORES["2b"]
    found = []
    for implementation in ("xla", "pallas_gpu"):

        def forward(x, implementation=implementation):
            return statistical_topk(x, k, implementation=implementation)

        def both(x, g, forward=forward):
            y, pull = jax.vjp(forward, x)
            return y, pull(g)[0]

        name = f"8192 x {d}, {implementation}"
        found.append(Case(f"statistical_topk {name}", forward, [_array(8192, d)]))
        found.append(Case(f"and its gradient {name}", both, [_array(8192, d)] * 2))
    d, experts, width = BLOCK_FFN["2_8b"]
    arrays = [_array(*shape) for shape in ((8, d), (8, experts), (d, experts * width), (experts * width, d))]
    dense = lambda *arrays: block_ffn(*arrays, expert_width=width, implementation="xla")  # noqa: E731
    found.append(Case(f"block_ffn 8 tokens, all {experts} experts, xla", dense, arrays))
    for places in (experts, round(0.15 * experts)):
        for implementation in ("xla", "pallas_gpu"):

            def union(*arrays, implementation=implementation):
                *arrays, places = arrays
                return block_ffn_union(*arrays, experts=places, expert_width=width, implementation=implementation)

            # Weights of the union, and the hidden state there and back.
            moved = None if implementation == "xla" else 2 * places * width * (2 * d + 2 * 8) + 2 * 2 * 8 * d
            name = f"block_ffn_union 8 tokens, {places} experts, {implementation}"
            found.append(Case(name, union, [*arrays, _array(places, dtype=jnp.int32)], moved))
    shapes = ((2048, 2304), (1024, 13_824), (1280, 13_824), (13_824, 2304))
    for implementation in ("xla", "one_pass"):
        ffn = lambda *a, name=implementation: spark_ffn(*a, top_k=1106, implementation=name)  # noqa: E731
        found.append(Case(f"spark_ffn 2048 tokens, 2b, {implementation}", ffn, [_array(*s) for s in shapes]))
    experts = MOE_FFN["moe_xlarge"], (MOE_FFN["moe_xlarge"][0], 1024, 64, 16)
    for shape in experts:
        found += [grouped(shape, name, gradient) for name in ("xla", "pallas_gpu") for gradient in (False, True)]
    found += [sparse_ffn(name, gated, True) for gated in (True, False) for name in ("xla", "pallas_gpu")]
    found += decoding()
    for make in (attention, flash):
        found += [make(name, gradient) for name in ("xla", "pallas_gpu") for gradient in (False, True)]
    return [*found, flash("pallas_gpu", True, *LLAMA)]


def grouped(shape: tuple[int, int, int, int], implementation: str, gradient: bool, tokens: int = 4096) -> Case:
    """Experts without gates; `shape`: model width, experts, neurons of one, experts of a token."""
    d, count, width, k = shape

    def forward(x, weights, up, down, chosen):
        with without_kernels() if implementation == "xla" else contextlib.nullcontext():
            return grouped_ffn(x, chosen, weights, up, down, implementation="ragged")

    def both(x, weights, up, down, chosen, g):
        y, pull = jax.vjp(lambda *floats: forward(*floats, chosen=chosen), x, weights, up, down)
        return y, pull(g)

    x, chosen = _array(tokens, d), _array(tokens, k, dtype=jnp.int32)
    arguments = [x, _array(tokens, k), _array(count, d, width), _array(count, width, d), chosen, *[x] * gradient]
    name = f"grouped_ffn {tokens} tokens, {k} of {count} experts of {width}{' and its gradient' * gradient}"
    # XLA multiplies all rows for every expert.
    flops = (6 if gradient else 2) * 2 * tokens * k * d * width * (count if implementation == "xla" else 1)
    return Case(f"{name}, {implementation}", both if gradient else forward, arguments, flops=flops)


def sparse_ffn(implementation: str, gated: bool, gradient: bool, tokens: int = 16_384, share: float = 0.474) -> Case:
    """A layer of SparseLM where blocks of tokens use this share of the neurons, and blocks of neurons of the tokens."""
    d, neurons = (2048, 5632) if gated else (2048, 8192)

    def forward(x, gate, up, down):
        return relu_ffn(x, gate, up, down, jnp.ones(x.shape[:2], bool), implementation=implementation)[:2]

    def both(x, up, down, g, gate=None):
        (y, l1), pull = jax.vjp(lambda *arrays: forward(arrays[0], arrays[3], *arrays[1:3]), x, up, down, gate)
        return y, l1, pull((g, jnp.ones_like(l1)))

    function = both if gradient else lambda x, up, down, gate=None: forward(x, gate, up, down)
    x, up, down = _array(1, tokens, d), _array(d, neurons), _array(neurons, d)
    arguments = [x, up, down, *[x] * gradient, *[up] * gated]
    maps = 3 if gated else 2
    # All tokens through the map before the ReLU; the others of a union, three times where there is a gradient, and the
    # other map of hidden units once more.
    products = 1 + (maps - 1 + (2 * maps + gated if gradient else 0)) * (share if implementation != "xla" else 1)
    if implementation == "xla" and gradient:
        products = 3 * maps
    name = f"relu_ffn {tokens} tokens, {neurons} neurons{'' if gated else ' without a gate'}"
    name += f"{' and its gradient' * gradient}, {implementation}"
    return Case(name, function, arguments, flops=round(2 * tokens * d * neurons * products))


def decoding() -> list[Case]:
    """One token through packed layers of Spark 2B and BlockFFN 2.8B, and through those that are trained."""
    d, r, neurons, active = 2304, 1024, 13_824, 1106
    trained = [_array(*shape) for shape in ((1, d), (r, neurons), (d - r, neurons), (neurons, d))]
    dense = lambda *a: spark_ffn(*a, top_k=active, implementation="one_pass")  # noqa: E731
    packed = [_array(*shape) for shape in ((1, d), (neurons, r), (neurons, 2 * d - r))]
    rows = lambda *a: spark_ffn_rows(*a, top_k=active, implementation="pallas_gpu")  # noqa: E731
    # Scores, gates and hidden state in float32 are each written once and read twice.
    moved = 2 * (neurons * r + active * (2 * d - r)) + 4 * 3 * 3 * neurons
    found = [
        Case("spark_ffn 1 token, one_pass", dense, trained),
        Case(f"spark_ffn_rows 1 token, {active} neurons active, pallas_gpu", rows, packed, moved),
    ]
    d, experts, width = BLOCK_FFN["2_8b"]
    active = round(0.15 * experts)
    trained = [_array(*shape) for shape in ((1, d), (1, experts), (d, experts * width), (experts * width, d))]
    block = lambda *a, width=width: block_ffn(*a, expert_width=width, implementation="xla")  # noqa: E731
    packed = [_array(*shape) for shape in ((1, d), (1, experts), (experts, width, d), (experts, width, d))]
    taken = partial(block_ffn_rows, implementation="pallas_gpu")
    # The hidden state, and the result's parts, are written and read in float32.
    *_, parts = launch_of("block_ffn_rows_sum", itemsize=2).tiles
    moved = 2 * 2 * active * width * d + 4 * 2 * (experts * width + parts * d)
    found += [
        Case(f"block_ffn 1 token, all {experts} experts, xla", block, trained),
        Case(f"block_ffn_rows 1 token, {active} experts, pallas_gpu", taken, packed, moved),
    ]
    heads, kv_heads, width, r, top_k = SPARK_ATTENTION["2b"]
    for keys in (8192, 32_768):

        def whole(q, k, v, mask, r=r):
            return spark_attention(q, k, v, mask, r=r, top_k=top_k, implementation="xla")[0]

        def some(q, k1, rest, mask):
            return spark_attention_rows(q, k1, rest, mask, top_k=top_k, implementation="pallas_gpu")[0]

        cache = _array(1, keys, kv_heads, width)
        split = [_array(1, kv_heads, keys, r), _array(1, kv_heads, keys, 2 * width - r)]
        # The queries of a key/value head select independently; scores and weights are written and read a few times.
        union = keys * (1 - (1 - top_k / keys) ** (heads // kv_heads))
        moved = 2 * kv_heads * (keys * r + union * (2 * width - r)) + 4 * 6 * heads * keys
        query = _array(1, 1, heads, width), _array(1, heads, width)
        arguments = [query[0], cache, cache, _array(1, 1, keys, dtype=jnp.bool_)]
        found.append(Case(f"spark_attention 1 query, {keys} keys, xla", whole, arguments))
        arguments = [query[1], *split, _array(1, keys, dtype=jnp.bool_)]
        name = f"spark_attention_rows 1 query, {keys} keys, {top_k} a head selected, pallas_gpu"
        found.append(Case(name, some, arguments, int(moved)))
    return found


def attention(implementation: str | None, gradient: bool, length: int = LENGTH) -> Case:
    """Spark attention of a layer of Spark 2B, causal; `gradient`: forward and backward."""
    heads, kv_heads, width, r, top_k = SPARK_ATTENTION["2b"]

    def forward(q, k, v):
        visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
        options = {"r": r, "top_k": top_k, "softcap": 50.0}
        return spark_attention(q, k, v, visible, **options, implementation=implementation)[0]

    def both(q, k, v, g):
        y, pull = jax.vjp(forward, q, k, v)
        return y, pull(g)

    q, k = _array(1, length, heads, width), _array(1, length, kv_heads, width)
    # Products of width columns: two forward and four backward, of all pairs; the kernels' make the predictor's scores
    # twice forward, and all scores twice more backward, of the pairs on and below the diagonal.
    if implementation == "xla":
        columns = (6 if gradient else 2) * width
    else:
        columns = r + (9 if gradient else 2) * width
    pairs = length**2 if implementation == "xla" else length * (length + 1) // 2
    name = f"spark_attention {length} tokens{' and its gradient' * gradient}, {implementation}"
    arguments = [q, k, k] + [q] * gradient
    return Case(name, both if gradient else forward, arguments, flops=2 * heads * columns * pairs)


def flash(
    implementation: str,
    gradient: bool,
    heads: int = 8,
    kv_heads: int = 4,
    width: int = 256,
    softcap: float | None = 50.0,
) -> Case:
    """Attention to all keys of a layer, by default of Gemma 2 2B, causal; `gradient` as of `attention`."""

    def forward(q, k, v):
        visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
        return flash_attention(q, k, v, visible, softcap=softcap, implementation=implementation)

    def both(q, k, v, g):
        y, pull = jax.vjp(forward, q, k, v)
        return y, pull(g)

    q, k = _array(1, LENGTH, heads, width), _array(1, LENGTH, kv_heads, width)
    # Products of width columns: two forward and four backward; the kernels make the scores and the weights' gradient
    # twice more backward, of the pairs on and below the diagonal.
    kernel = implementation != "xla"
    pairs = LENGTH * (LENGTH + 1) // 2 if kernel else LENGTH**2
    columns = width * ((9 if kernel else 6) if gradient else 2)
    shape = "" if softcap else f" of {heads} heads of {width}"
    name = f"flash_attention {LENGTH} tokens{shape}{' and its gradient' * gradient}, {implementation}"
    arguments = [q, k, k] + [q] * gradient
    return Case(name, both if gradient else forward, arguments, flops=2 * heads * columns * pairs)


def longest(implementation: str, gradient: bool) -> tuple[int, float]:
    """The most tokens, of powers of two, whose attention fits into the memory of a GPU, and GB that it then takes."""
    length, fits = LENGTH, (0, 0.0)
    while True:
        try:
            memory = compile_case(attention(implementation, gradient, length)).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return fits
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        if total > open_topology("h100:1x1x1").chip.hbm_bytes:
            return fits
        length, fits = 2 * length, (length, total / 1e9)


def compile_case(case: Case, topology: str = "h100:1x1x1") -> Any:
    """The compiled program of a case."""
    device = open_topology(topology).devices[0]
    sharding = SingleDeviceSharding(device)
    with lowering_for(device):
        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in case.arguments]
        return jax.jit(case.function).lower(*arguments).compile()


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="programs whose name contains this")
    parser.add_argument("--longest", action="store_true", help="the most tokens of an attention that fit, and end")
    parser.add_argument("--compile-only", type=int, nargs="+", help="compile programs, for the assembler, and end")
    parser.add_argument("--topology", default="h100:1x1x1", help="what to compile those programs for")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    if args.compile_only:
        for index in args.compile_only:
            compile_case(cases()[index], args.topology)
        return
    if args.longest:
        for implementation in ("xla", "pallas_gpu"):
            for gradient in (False, True):
                length, size = longest(implementation, gradient)
                print(f"{implementation}{' and its gradient' * gradient}: {length} tokens, {size:.1f} GB", flush=True)
        return
    chip = open_topology("h100:1x1x1").chip
    print(
        "| program | MB | temporaries MB | by bytes ms | by FLOPs ms | kernel | blocks x threads | registers | "
        "shared kB | spilled bytes | occupancy |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for index, case in enumerate(cases()):
        if args.only not in case.name:
            continue
        program = compile_case(case)
        size = case.bytes or hbm_bytes(program.as_text())
        products = f"{1e3 * case.flops / chip.bf16_flops:.4f}" if case.flops else ""
        temporaries = program.memory_analysis().temp_size_in_bytes
        by_bytes = 1e3 * size / chip.hbm_bandwidth
        shown = f"{case.name} | {size / 1e6:.1f} | {temporaries / 1e6:.1f} | {by_bytes:.4f} | {products}"
        (found,) = kernels([sys.executable, "-m", "benchmarks.gpu_kernels", "--compile-only", str(index)])
        for kernel in found:
            print(
                f"| {shown} | `{kernel.name}` | {kernel.blocks} x {kernel.threads} | {kernel.registers} | "
                f"{kernel.shared / 1e3:.1f} | {kernel.spills} | {kernel.occupancy:.2f} |",
                flush=True,
            )
            shown = " | | | | "
    print(NOTES)


if __name__ == "__main__":
    main()
