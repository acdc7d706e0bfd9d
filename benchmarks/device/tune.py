"""A small grid of tiles, warps and stages for every kernel, timed; prints lines for `pallas_kernels/tuning.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax

from benchmarks.device import cases as shapes
from benchmarks.device.case import BF16, Case, Draw, Sizes
from benchmarks.device.rows import FAILED, OK, Job, Row, first_line
from benchmarks.device.values import both, form_of
from benchmarks.timing import interleaved
from sparsezoo_jax.pallas_kernels.tuning import Launch, launch_of, target, trying

STAGE = "tune"


class Search(NamedTuple):
    """What is tried for one line of the table."""

    kernel: str
    case: Case
    launches: list[Launch]
    columns: int | None = None


def grid(tiles: list[tuple[int, ...]], warps: tuple[int, ...] = (4,), stages: tuple[int, ...] = (1,)) -> list[Launch]:
    """All combinations."""
    return [Launch(*choice) for choice in product(tiles, warps, stages)]


def searches(s: Sizes, platform: str, tiny: bool) -> list[Search]:
    """Of a platform; in tiny ones two launches each, to try the search itself."""
    (topk, *_), few = shapes.topk(s, s.topk_columns[-1], BF16), s.tokens[0]
    spark, block, union = shapes.spark_rows(s, few, BF16), shapes.block_rows(s, few, BF16), shapes.union(s, 8, BF16)
    attention = {width: tuple(shapes.attention(s, width, s.lengths[1], "long")) for width in s.widths}
    widths = [width for width in s.widths if width >= 64 or tiny]
    if platform == "tpu":
        sides = [
            (256, 512, 256),
            (512, 512, 128),
            (512, 512, 256),
            (512, 1024, 128),
            (512, 1024, 256),
            (1024, 512, 256),
        ]
        names = ("spark_attention_tpu", "flash_attention_tpu")
        found = [
            Search(name, case, grid(sides), width)
            for width in widths
            for name, case in zip(names, attention[width], strict=True)
        ]
    else:
        squares = [(128, 64), (128, 32), (64, 64), (64, 32), (64, 128), (128, 128)]
        slim = [(128, 16), (128, 32), (64, 32), (64, 64), (32, 64), (128, 64)]
        tall = [(64, 32), (32, 64), (64, 64), (32, 128), (32, 32)]
        found = []
        for width in widths:
            names = ("spark_attention", ("moments", "mix")), ("flash_attention", ("all_keys",))
            for (name, forward), case in zip(names, attention[width], strict=True):
                for part, tiles in (*((part, squares) for part in forward), ("queries", slim), ("keys", tall)):
                    found.append(Search(f"{name}_{part}", case, grid(tiles, (4, 8), (2, 3)), width))
        hidden = grid([(16, 64), (16, 128), (16, 256), (32, 128)], (2, 4), (2, 3))
        sums = grid([(32, 64, 16), (32, 128, 16), (32, 32, 16), (32, 64, 32), (64, 64, 16)], (2, 4), (2, 3))
        products = grid([(128, 128, 64), (128, 128, 32), (64, 128, 64), (128, 64, 64), (64, 64, 64)], (4, 8), (3, 4))
        experts, *_ = shapes.grouped(s)
        unions = grid([(32, 64), (16, 64), (32, 128), (64, 64)], (2, 4), (2, 3, 4))
        sparse, *_ = shapes.sparse_relu(s)
        deep = grid([(128, 64, 64), (64, 64, 64), (128, 128, 32), (128, 64, 32)], (4, 8), (2, 3))
        of_unions = {
            "hidden": deep,
            "gradients": grid([(128, 64, 64), (128, 64, 32), (128, 32, 64)], (4, 8), (2, 3)),
            "sum": grid([(128, 128, 32), (128, 64, 64), (128, 64, 32)], (4, 8), (2, 3)),
            "weights": grid([(64, 128, 32), (64, 64, 64), (128, 128, 32), (128, 64, 32)], (4, 8), (2, 3)),
        }
        rows = grid([(32, 64, 512), (32, 64, 256), (32, 128, 512), (64, 64, 512), (16, 64, 256)], (4, 8), (2, 3))
        found += [
            Search("statistical_topk", topk, grid([(8,), (16,), (32,), (64,)])),
            *(
                Search(f"{name}_hidden", case, hidden)
                for name, case in (("spark_ffn_rows", spark), ("block_ffn_rows", block))
            ),
            *(
                Search(f"{name}_sum", case, sums)
                for name, case in (("spark_ffn_rows", spark), ("block_ffn_rows", block))
            ),
            *(Search(f"ragged_{part}", experts, products) for part in ("rows", "weights")),
            *(Search(f"block_ffn_union_{part}", union, unions) for part in ("hidden", "sum")),
            *(Search(f"relu_ffn_{part}", sparse, tiles) for part, tiles in of_unions.items()),
            Search("spark_attention_rows", shapes.attention_rows(s, s.keys[0], BF16), rows, s.spark_attention[2]),
        ]
    return [search._replace(launches=search.launches[:2]) for search in found] if tiny else found


def jobs(searches: list[Search], platform: str, interpret: bool) -> list[Job]:
    """One for each line."""
    return [
        Job(_name(search), partial(_compiled, search, form_of(search.case, platform, interpret), interpret))
        for search in searches
    ]


def _name(search: Search) -> str:
    return search.kernel if search.columns is None else f"{search.kernel}, {search.columns} columns"


def _compiled(search: Search, form: str, interpret: bool) -> Callable[[], Iterator[Row]]:
    case, arguments = search.case, list(search.case.make(Draw()))
    shape = jax.eval_shape(lambda *a: case.call("xla", *a), *arguments).y
    g = Draw(1)(*shape.shape, dtype=shape.dtype)
    default = launch_of(search.kernel, itemsize=BF16.itemsize, columns=search.columns)
    launches = list(dict.fromkeys([default, *search.launches]))

    def program(launch: Launch) -> Any:
        with trying(**{search.kernel: launch}):
            return jax.jit(both(case, form)).lower(g, *arguments).compile()

    with ThreadPoolExecutor(max_workers=4) as pool:
        programs = {launch: pool.submit(program, launch) for launch in launches}

    def run() -> Iterator[Row]:
        calls: dict[Any, Callable[[], Any]] = {}
        note = ""
        for launch, future in programs.items():
            try:
                call = partial(future.result(), g, *arguments)
                jax.block_until_ready(call())
                calls[launch] = call
            except Exception as error:  # no room for such tiles
                note = first_line(error)
        if not calls:
            yield Row(STAGE, _name(search), FAILED, note=note)
            return
        times: Any = interleaved(calls, 2 if interpret else 15)
        medians: dict[Launch, float] = {launch: statistics.median(values) for launch, values in times.items()}
        best = min(medians, key=medians.__getitem__)
        found = {"tried": len(calls), "ms": 1e3 * medians[best]}
        if default in medians:
            found["x default"] = medians[default] / medians[best]
        yield Row(STAGE, _name(search), OK, found | {"line": line(search, best)})

    return run


def line(search: Search, launch: Launch) -> str:
    """As it stands in the table."""
    columns = "" if search.columns is None else f", columns={search.columns}"
    key = f'Key("{search.kernel}", 2, {target().name!r}{columns})'.replace("'", '"')
    return f"{key}: Launch({launch.tiles}, {launch.warps}, {launch.stages}),"
