"""The contract of grouped products, for every implementation that a CPU can run."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.ragged import gpu, ragged_matmul
from sparsezoo_jax.pallas_kernels.ragged.chosen import sum_of_experts
from sparsezoo_jax.pallas_kernels.ragged.gpu import fitted, row_tiles
from sparsezoo_jax.pallas_kernels.tuning import Launch, compiling_for, trying
from tests.kernels.few_rows import implementation as built

SMALL = {"ragged_rows": Launch((16, 32, 16)), "ragged_weights": Launch((32, 16, 16))}
"""Tiles that small arrays have several of, in every direction."""


def arrays(sizes, inner, outer, dtype, left=0):
    rng = np.random.default_rng(0)
    rows = sum(sizes) + left
    x, w, g = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((rows, inner), (len(sizes), inner, outer), (rows, outer))
    )
    return x, w, g, jnp.asarray(sizes, jnp.int32)


def by_hand(x, w, g, sizes):
    """Product and gradients, group by group, as the definition reads."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    stops = np.cumsum(sizes)
    for e, (start, stop) in enumerate(zip(stops - sizes, stops, strict=True)):
        part = slice(start, stop)
        y[part], dx[part], dw[e] = x[part] @ w[e], g[part] @ w[e].T, x[part].T @ g[part]
    return y, dx, dw


def all_three(implementation, x, w, g, sizes):
    def multiply(x, w):
        return ragged_matmul(x, w, sizes, implementation=implementation)

    return jax.jit(partial(_with_gradients, multiply))(x, w, g)


def _with_gradients(function, x, w, g):
    y, pull = jax.vjp(function, x, w)
    return y, *pull(g)


def close(found, expected):
    """Float32 sums in another order, and one rounding of the result."""
    rounding = 2**-8 if found.dtype == jnp.bfloat16 else 0
    atol = 1e-6 * max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rounding, atol=atol)


# Groups that end within a tile, empty ones at both ends and in the middle, all rows in one group, rows of no group,
# one group, fewer rows than groups; widths of the presets that fill no tile.
CASES = {
    "uneven": ([0, 5, 0, 33, 16, 1, 0], 40, 24, 0),
    "all in one": ([0, 0, 70, 0], 32, 48, 0),
    "odd widths": ([20, 13], 352, 96, 0),
    "rows of no group": ([7, 0, 19, 0], 24, 40, 23),
    "one group": ([17], 16, 16, 0),
    "one row": ([0, 0, 1, 0, 0], 10, 5, 0),
}


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu_interpret"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients(implementation, case, dtype):
    given = arrays(*CASES[case][:3], dtype, CASES[case][3])
    with trying(**SMALL):
        found = all_three(implementation, *given)
    for a, b in zip(found, by_hand(*given), strict=True):
        assert a.dtype == dtype
        close(a, b)


#: Rows that fill several tiles and tasks with a rest, columns that end within a vector of every width, a depth of more
#: than one turn.
NATIVE_CASES = {**CASES, "several tasks": ([0, 211, 97, 1], 133, 300, 4), "a column": ([20, 6], 7, 1, 0)}


def native_results():
    """Of the native form in this process: errors, in units of the sums of products' magnitudes, and one result."""
    errors, results = {}, []
    for case, (sizes, inner, outer, left) in NATIVE_CASES.items():
        given = arrays(sizes, inner, outer, jnp.float32, left)
        results = all_three("native", *given)
        sizes_of = by_hand(*(np.abs(a) for a in given))
        for name, a, b, size in zip(("y", "dx", "dw"), results, by_hand(*given), sizes_of, strict=True):
            errors[f"{case} {name}"] = _in_units(a, b, size)
    given = choices()
    summed = jax.jit(lambda x, chosen, w, g: _with_gradients(lambda x, w: sum_of_experts(x, chosen, w), x, w, g))(
        *given
    )
    sizes_of = sums_by_hand(*(np.abs(a) for a in given))
    for name, a, b, size in zip(("y", "dx", "dw"), summed, sums_by_hand(*given), sizes_of, strict=True):
        errors[f"several choices {name}"] = _in_units(a, b, size)
    return errors, [np.asarray(a).tolist() for a in (*results, *summed)]


def _in_units(a, b, size):
    return float(np.max(np.abs(np.asarray(a, np.float64) - b) / np.maximum(size, 1e-30)))


def choices():
    """Rows of tokens' three choices of seven experts, of which the last is none; more tokens than a task takes."""
    keys = jax.random.split(jax.random.key(3), 4)
    chosen = jnp.argsort(jax.random.normal(keys[1], (515, 7)), axis=-1)[:, :3].astype(jnp.int32)
    return (
        jax.random.normal(keys[0], (3 * 515, 20)),
        chosen.at[7].set(4),  # three times the same one
        jax.random.normal(keys[2], (6, 20, 37)),
        jax.random.normal(keys[3], (515, 37)),
    )


def sums_by_hand(x, chosen, w, g):
    """The sum over choices, and its gradients, in float64."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    of = np.asarray(chosen).reshape(-1)
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w)
    for e in range(len(w)):
        rows = np.flatnonzero(of == e)
        np.add.at(y, rows // 3, x[rows] @ w[e])
        dx[rows], dw[e] = g[rows // 3] @ w[e].T, x[rows].T @ g[rows // 3]
    return y, dx, dw


def test_tiles_of_the_table():
    given = arrays([300, 0, 5, 95], 200, 130, jnp.bfloat16)
    for a, b in zip(all_three("pallas_gpu_interpret", *given), by_hand(*given), strict=True):
        close(a, b)


@pytest.mark.parametrize("form", ["pallas_gpu_interpret", "native"])
def test_nothing_crosses_from_group_to_group(form):
    """Groups that end within a tile of rows, and matrices that end within a tile of terms: 0 * nan would show."""
    form = built(form)
    x, w, g, sizes = arrays([5, 0, 20], 24, 24, jnp.float32)
    broken = x.at[5:].set(jnp.nan), w.at[1].set(jnp.nan), g.at[5:].set(jnp.nan), sizes
    with trying(**SMALL):
        found = all_three(form, *broken)
    for a, b, clean in zip(found, by_hand(x, w, g, sizes), (5, 5, 2), strict=True):
        assert jnp.isnan(a[clean:]).all()
        close(a[:clean], b[:clean])


def test_programs_run_in_any_order(monkeypatch):
    """Tiles overlap but what programs write does not: in their order later ones would hide what is written twice."""
    given = arrays([5, 0, 20, 14], 24, 24, jnp.float32, left=3)
    index = pl.program_id
    monkeypatch.setattr(gpu.pl, "program_id", lambda axis: pl.num_programs(axis) - 1 - index(axis))
    with trying(**SMALL):
        found = all_three("pallas_gpu_interpret", *given)
    for a, b in zip(found, by_hand(*given), strict=True):
        close(a, b)


def test_result_may_be_wider_than_the_rows():
    x, w, g, sizes = arrays([5, 9], 16, 16, jnp.bfloat16)
    y = ragged_matmul(x, w, sizes, jnp.float32, implementation="pallas_gpu_interpret")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, by_hand(x, w, g, sizes)[0], atol=1e-5)  # products of bfloat16 are exact


@pytest.mark.parametrize("sizes", [[0, 5, 0, 33, 16, 1, 0], [55], [1] * 55, [0, 0, 40]])
def test_tiles_hold_every_row_once(sizes):
    tiles = row_tiles(jnp.asarray(sizes), 55, 16)
    held = [
        (int(row), int(group))
        for group, first, stop in zip(*tiles, strict=True)
        for row in range(first, min(int(first) + 16, int(stop)))
    ]
    left = 55 - sum(sizes)
    assert sorted(held) == list(enumerate(np.repeat(np.arange(len(sizes) + 1), [*sizes, left])))
    assert tiles.group.size <= 55 // 16 + 1 + len(sizes) + 1, "a multiple neither of rows nor of groups"


def test_smaller_cards_get_fewer_stages():
    card = SimpleNamespace(platform="gpu", compute_capability="8.9", shared_memory_per_block_optin=101_376)
    with trying(ragged_rows=Launch((128, 128, 64), 8, 3)):
        assert fitted("ragged_rows", jnp.dtype(jnp.bfloat16), (500, 96, 20)) == Launch((128, 128, 32), 8, 3)
        with compiling_for(card):
            assert fitted("ragged_rows", jnp.dtype(jnp.bfloat16), (500, 500, 500)) == Launch((128, 128, 64), 8, 2)


def test_refusals():
    x, w, _, sizes = arrays([5, 9], 16, 16, jnp.float32)
    with pytest.raises(ConfigError, match=r"ragged_matmul.implementation=pallas_gpu: takes bfloat16 or float32"):
        ragged_matmul(x.astype(jnp.float16), w.astype(jnp.float16), sizes, implementation="pallas_gpu")
    with pytest.raises(ConfigError, match=r"ragged_matmul.implementation=pallas_gpu: needs at least one row"):
        ragged_matmul(x[:0], w, 0 * sizes, implementation="pallas_gpu")
