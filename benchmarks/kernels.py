"""Kernels beside XLA's own forms by the TPU compiler's cycle model and the roofline: `python -m benchmarks.kernels`.

No TPU is needed, and nothing is measured on one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.shapes import BLOCK_FFN, FFN_SCORES, MOE_FFN, SPARK_ATTENTION, SPARK_FFN, TPUS
from sparsezoo_jax.compilation.profile import CLOCK_GHZ, profiled, summarise
from sparsezoo_jax.compilation.topologies import open_topology
from sparsezoo_jax.compilation.traffic import hbm_bytes
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.pallas_kernels import (
    block_ffn,
    block_ffn_rows,
    block_ffn_union,
    spark_attention,
    spark_attention_rows,
    spark_ffn,
    spark_ffn_rows,
    statistical_topk,
)
from sparsezoo_jax.pallas_kernels.attention import dense_attention
from sparsezoo_jax.pallas_kernels.ragged import dense_weight_gradient, megablox_weight_gradient
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.tuning import launch_of

NOTES = """
time = max(cycles / clock, bytes / HBM bandwidth). Clocks are assumed; tpu7x's is not known, so its time is by bytes
alone. Cycles are the compiler's model, not measured: what depends on data (`pl.when` on an expert's place) is
undercounted, and its transfers between HBM and VMEM are faster than the datasheet's, which is why bytes bound the time
as well. Cycles are estimated at fewer rows (sorts: at most 64) and scaled up. Bytes are those of whole operands and
results in HBM, for kernels what they read by their grid; what the compiler keeps in VMEM does not count.
"""


class Case(NamedTuple):
    """One line of the table."""

    name: str
    function: Callable
    arguments: Callable[[int], list[Any]]  # of a number of rows
    rows: int
    profiled_rows: int | None  # cycles are taken at so many and scaled; None: they depend on data
    moved: int | None = None  # bytes of a kernel that depend on data, by formula


def _topk_cases(rows: int) -> list[Case]:
    d, k = FFN_SCORES["2b"]

    def scores(copies: int) -> Callable[[int], list[Any]]:
        return lambda rows: [jax.ShapeDtypeStruct((rows, d), jnp.bfloat16)] * copies

    cases = []
    for implementation in ("xla", "pallas_tpu"):

        def forward(x, implementation=implementation):
            return statistical_topk(x, k, implementation=implementation)

        def both(x, g, forward=forward):
            y, pull = jax.vjp(forward, x)
            return y, pull(g)[0]

        few = min(rows, 2048)
        cases.append(Case(f"statistical_topk {rows} x {d}, {implementation}", forward, scores(1), rows, few))
        cases.append(Case(f"and its gradient {rows} x {d}, {implementation}", both, scores(2), rows, min(rows, 1024)))
    if rows > 256:
        cases.append(Case(f"lax.top_k {rows} x {d}", lambda x: jax.lax.top_k(x, int(k)), scores(1), rows, 64))
        approximate = lambda x: jax.lax.approx_max_k(x, int(k))  # noqa: E731
        cases.append(Case(f"lax.approx_max_k {rows} x {d}", approximate, scores(1), rows, 64))
    return cases


def _block_cases() -> list[Case]:
    d, experts, width = BLOCK_FFN["2_8b"]
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((8, d), (8, experts), (d, experts * width), (experts * width, d))
    ]

    def dense(*arrays):
        return block_ffn(*arrays, expert_width=width, implementation="xla")

    cases = [Case(f"block_ffn 8 tokens, all {experts} experts, xla", dense, lambda rows: arrays, 8, 8)]
    for places in (experts, round(0.15 * experts)):
        for implementation in ("xla", "pallas_tpu"):

            def union(*arrays, implementation=implementation):
                *arrays, places = arrays
                return block_ffn_union(*arrays, experts=places, expert_width=width, implementation=implementation)

            arguments = lambda rows, n=places: [*arrays, jax.ShapeDtypeStruct((n,), jnp.int32)]  # noqa: E731
            cases.append(Case(f"block_ffn_union 8 tokens, {places} experts, {implementation}", union, arguments, 8, 8))
    return cases


def _attention_cases(length: int) -> list[Case]:
    """Causal attention of one sequence, its gradient too; XLA's rows are queries, the kernels' the tiles they visit.

    Cycles of XLA's forms are those of 256 queries and all keys, which their time is linear in. Those of the kernels are
    of a sequence of one tile, times the tiles on and below the diagonal.
    """
    heads, kv_heads, width, r, top_k = SPARK_ATTENTION["2b"]
    tile = launch_of("spark_attention_tpu", itemsize=2).tiles[0]
    tiles = (length // tile) * (length // tile + 1) // 2

    def arrays(queries: int, keys: int, copies: int) -> list[Any]:
        q, k = ((1, n, h, width) for n, h in ((queries, heads), (keys, kv_heads)))
        shapes = [q, k, k, *[q] * copies]
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def visible(q: jax.Array, k: jax.Array) -> Visibility:
        everywhere = Visibility.of_tokens(jnp.ones((1, k.shape[1]), jnp.int32))
        if q.shape[1] == k.shape[1]:
            return everywhere
        positions, segments = (x[:, -q.shape[1] :] for x in (everywhere.query_positions_BT, everywhere.key_segments_BS))
        return everywhere.replaced(
            positions, everywhere.key_positions_BS, segments, everywhere.key_segments_BS, ordered=False
        )

    def spark(implementation: str) -> Callable:
        return lambda q, k, v: spark_attention(
            q, k, v, visible(q, k), r=r, top_k=top_k, softcap=50.0, implementation=implementation
        )[0]

    def dense(q, k, v):
        return dense_attention(q, k, v, visible(q, k).mask, scale=width**-0.5, softcap=50.0)

    cases = []
    for name, forward in (
        ("spark_attention, xla", spark("xla")),
        ("spark_attention, pallas_tpu", spark("pallas_tpu")),
        ("dense attention, xla", dense),
    ):

        def both(q, k, v, g, forward=forward):
            y, pull = jax.vjp(forward, q, k, v)
            return y, pull(g)

        by_tile = "pallas" in name
        rows, few = (tiles, 1) if by_tile else (length, 256)
        for what, function, copies in (("", forward, 0), (" and its gradient", both, 1)):

            def arguments(rows: int, copies=copies, by_tile=by_tile) -> list[Any]:
                if by_tile:
                    side = tile * int((2 * rows) ** 0.5)
                    return arrays(side, side, copies)
                return arrays(rows, length, copies)

            cases.append(Case(f"{name}{what}, {length} tokens", function, arguments, rows, few))
    return cases


def _ffn_cases(tokens: int) -> list[Case]:
    d, r, f, k = SPARK_FFN["2b"]

    def arrays(rows: int) -> list[Any]:
        return [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, d), (r, f), (d - r, f), (f, d))]

    cases = []
    for implementation in ("xla", "one_pass"):

        def ffn(*arrays, implementation=implementation):
            return spark_ffn(*arrays, top_k=k, implementation=implementation)

        cases.append(Case(f"spark_ffn {tokens} tokens, {implementation}", ffn, arrays, tokens, tokens))
    return cases


def _decoding_cases() -> list[Case]:
    """One token through packed layers, and through the layers that are trained, which read everything."""

    def case(name: str, function: Callable, *shapes: tuple[int, ...], moved: float | None = None) -> Case:
        mask = [jax.ShapeDtypeStruct(shapes[-1], jnp.bool_)] if "attention" in name else []
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes[: len(shapes) - len(mask)]] + mask
        return Case(f"{name}, 1 token", function, lambda rows: arrays, 1, None, None if moved is None else int(moved))

    def in_use(rows: int, selected: float, choices: int = 1) -> float:
        """Share of the tiles of 16 rows that hold one of those selected at random, by several independently."""
        return 1 - (1 - selected / rows) ** (16 * choices)

    d, r, f, k = SPARK_FFN["2b"]
    row = 2 * d - r

    def ffn(*arrays, implementation="one_pass"):
        return spark_ffn(*arrays, top_k=k, implementation=implementation)

    def ffn_rows(*arrays):
        return spark_ffn_rows(*arrays, top_k=k, implementation="pallas_tpu")

    found = [
        case("spark_ffn, one_pass", ffn, (1, d), (r, f), (d - r, f), (f, d)),
        case("spark_ffn_rows, pallas_tpu", ffn_rows, (1, d), (f, r), (f, row), moved=2 * f * (r + in_use(f, k) * row)),
    ]
    heads, kv_heads, width, r, top_k = SPARK_ATTENTION["2b"]
    row = 2 * width - r
    for keys in (8192, 32_768, 131_072):

        def attention(q, k, v, mask):
            return spark_attention(q, k, v, mask, r=r, top_k=top_k, implementation="xla")[0]

        def attention_rows(q, k1, rest, mask):
            return spark_attention_rows(q, k1, rest, mask, top_k=top_k, implementation="pallas_tpu")[0]

        cache, rest = (1, keys, kv_heads, width), (1, kv_heads, keys, row)
        share = in_use(keys, top_k, heads // kv_heads)
        # A tile of these rows takes less time than to start its transfer: from half of them on, all are read in order.
        moved = 2 * kv_heads * keys * (r + (1 if share > 0.5 else share) * row)
        found += [
            case(f"spark_attention of {keys} keys, xla", attention, (1, 1, heads, width), cache, cache, (1, 1, keys)),
            case(
                f"spark_attention_rows of {keys} keys, pallas_tpu", attention_rows,
                (1, heads, width), (*rest[:3], r), rest, (1, keys), moved=moved,
            ),
        ]  # fmt: skip
    d, experts, width = BLOCK_FFN["2_8b"]
    active = round(0.15 * experts)

    def experts_of(*arrays):
        return block_ffn(*arrays, expert_width=width, implementation="xla")

    def experts_rows(*arrays):
        return block_ffn_rows(*arrays, implementation="pallas_tpu")

    packed, flat = (experts, width, d), (experts * width, d)
    found.append(case("block_ffn, xla", experts_of, (1, d), (1, experts), flat[::-1], flat))
    name, moved = f"block_ffn_rows of {active} experts, pallas_tpu", 2 * 2 * active * width * d
    found.append(case(name, experts_rows, (1, d), (1, experts), packed, packed, moved=moved))
    return found


def _grouped_cases() -> list[Case]:
    """The weights' gradient of a grouped product: that of XLA and that of megablox."""
    cases = []
    for name, (d, experts, width, k) in MOE_FFN.items():
        rows = 8192 // k * k

        def arrays(rows: int, d=d, experts=experts, width=width) -> list[Any]:
            wide = [jax.ShapeDtypeStruct((rows, n), jnp.bfloat16) for n in (d, width)]
            return [*wide, jax.ShapeDtypeStruct((experts,), jnp.int32)]

        for form in (dense_weight_gradient, megablox_weight_gradient):
            shown = form.__name__.removesuffix("_weight_gradient")
            cases.append(
                Case(f"gradient of {experts} experts {d} x {width}, {name}, {shown}", form, arrays, rows, rows)
            )
    return cases


def cases() -> list[Case]:
    """All lines of the table, in order."""
    return [
        *_topk_cases(8192),
        *_topk_cases(256),
        *_block_cases(),
        *_ffn_cases(2048),
        *_ffn_cases(256),
        *_attention_cases(8192),
        *_decoding_cases(),
        *_grouped_cases(),
    ]


def compile_case(case: Case, tpu: str, rows: int) -> Any:
    """The compiled program of a case at so many rows."""
    sharding = SingleDeviceSharding(open_topology(TPUS[tpu]).devices[0])
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in case.arguments(rows)]
    return jax.jit(case.function).lower(*arguments).compile()


def _cycles(index: int, case: Case, tpu: str) -> float | None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--tpu", tpu, "--compile-only", str(index)]
    try:
        return summarise(profiled(command))["cycles"] * case.rows / case.profiled_rows
    except UserError as error:
        print(f"{case.name} on {tpu}: {error}", file=sys.stderr)
        return None


def main() -> None:
    """Print a table for each generation, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", nargs="*", default=["v5e", "v5p", "v6e", "tpu7x"], choices=list(TPUS))
    parser.add_argument("--only", default="", help="lines that contain this")
    parser.add_argument("--no-cycles", action="store_true", help="bytes and FLOPs alone, which take seconds a line")
    parser.add_argument("--compile-only", type=int, help="compile one line, for the profile, and end")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache has no costs
    if args.compile_only is not None:
        case = cases()[args.compile_only]
        compile_case(case, args.tpu[0], case.profiled_rows)
        return
    for tpu in args.tpu:
        chip = open_topology(TPUS[tpu]).chip
        bandwidth, peak = chip.hbm_bandwidth / chip.devices, chip.bf16_flops / chip.devices
        print(f"\n{tpu}\n\n| operation | cycles | MB | GFLOP | by cycles ms | by bytes ms | by FLOPs ms | time ms |")
        print("|---|---|---|---|---|---|---|---|")
        for index, case in enumerate(cases()):
            if args.only not in case.name:
                continue
            program = compile_case(case, tpu, case.rows)
            size = case.moved or hbm_bytes(program.as_text())
            flops = (program.cost_analysis() or {}).get("flops", 0)
            cycles = None if args.no_cycles or case.profiled_rows is None else _cycles(index, case, tpu)
            clock = CLOCK_GHZ.get(tpu)
            by_cycles = cycles / clock / 1e6 if cycles and clock else None
            times = [by_cycles, 1e3 * size / bandwidth, 1e3 * flops / peak]
            shown = [
                "?" if time is None else f"{time:.4f}" for time in (*times, max(t for t in times if t is not None))
            ]
            counted = "?" if cycles is None else f"{cycles:,.0f}"
            print(
                f"| {case.name} | {counted} | {size / 1e6:.1f} | {flops / 1e9:.2f} | {' | '.join(shown)} |", flush=True
            )
    print(NOTES)


if __name__ == "__main__":
    main()
