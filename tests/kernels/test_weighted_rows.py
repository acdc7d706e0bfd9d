"""The TPU kernel of `spark_ffn_rows` and `spark_attention_rows`: which tiles it reads, and what it makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sparsezoo_jax.pallas_kernels import weighted_rows
from tests.covering import pairs
from tests.kernels.few_rows import STORAGE
from tests.kernels.simulator import races

TILE = {"float32": 8, "bfloat16": 16, "int8": 32}


def problem(storage, rows, share, *, heads=2, group=3, part=128, width=384):
    """Queries, weights of about `share` of the tiles, rows, and which tiles [H, U] have a weight."""
    rng, tile = np.random.default_rng(rows), TILE[storage]
    tiles = -(-rows // tile)
    used = rng.random((heads, tiles)) < share
    used[:, [0, -1]] = [True, False] if share < 1 else True  # the last one may not be whole
    weights = rng.standard_normal((heads, group, tiles * tile)) * (rng.random((heads, group, tiles * tile)) < 0.3)
    first = np.arange(tiles * tile) % tile == 0
    weights = np.where(np.repeat(used, tile, axis=1)[:, None], weights + first, 0)[..., :rows]
    values = rng.standard_normal((heads, rows, width)) * (30 if storage == "int8" else 1)
    q = jnp.asarray(rng.standard_normal((heads, group, part)), jnp.float32)
    return q, jnp.asarray(weights, jnp.float32), jnp.asarray(values).astype(storage), used


def kernel(interpret=True):
    """The jitted kernel, under the limits that the module has when it is first called."""

    @jax.jit
    def call(q, weights, rows):
        return weighted_rows.weighted_rows(q, weights, [rows], jnp.tanh, name="rows", interpret=interpret)[0]

    return call


def definition(q, weights, rows):
    q, weights, rows = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q, weights, rows))
    part = q.shape[-1]
    if part:
        weights = weights * np.tanh(q @ rows[..., :part].swapaxes(1, 2))
    return weights @ rows[..., part:]


# Any two of these; given are rows and, for one program, shares of the tiles.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "part", "given"),
    pairs(
        STORAGE,
        [0, 128],
        [(384, (0.2, 1)), (640, (0.9,)), (1000, (0.5, 1)), (130, (0.5,)), (5, (0.5,)), (256, (0,))],
    ),
)
def test_is_the_definition(storage, part, given, monkeypatch):
    monkeypatch.setattr(weighted_rows, "_ROWS", 256)
    monkeypatch.setattr(weighted_rows, "_TRANSFER", 15_000)  # so that some of these read all, and some do not
    rows, shares = given
    call = kernel()
    for share in shares:
        q, weights, values, _ = problem(storage, rows, share, part=part)
        if not share:
            weights = weights.at[0].set(0)
        ours, expected = call(q, weights, values), definition(q, weights, values)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("cost", [0, 2**30])
def test_reads_tiles_in_use_unless_reading_all_is_faster(storage, cost, monkeypatch):
    monkeypatch.setattr(weighted_rows, "_TRANSFER", cost)
    q, weights, values, used = problem(storage, 640, 0.3)
    unused = ~np.repeat(used, 640 // used.shape[1], axis=1)
    poisoned = jnp.where(unused[..., None], jnp.nan, values)
    call = kernel()
    found = call(q, weights, poisoned)
    reads_all = not np.isfinite(found).any()
    assert reads_all == (cost > 0)
    if not reads_all:
        np.testing.assert_array_equal(found, call(q, weights, values))


@pytest.mark.parametrize("cost", [0, 2**30])
def test_no_access_races_with_another(cost, monkeypatch):
    monkeypatch.setattr(weighted_rows, "_TRANSFER", cost)
    q, weights, values, _ = problem("float32", 384, 0.9, group=1)
    monkeypatch.setattr(weighted_rows, "_ROWS", 128)  # three buffers full
    assert not races(lambda interpret: kernel(interpret)(q, weights, values))
    expected = definition(q, weights, values)
    ours = kernel(pltpu.InterpretParams())(q, weights, values)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
