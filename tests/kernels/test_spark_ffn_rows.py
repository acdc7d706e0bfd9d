"""The Spark FFN of a few tokens against its definition, and against the form that is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import spark_ffn, spark_ffn_rows
from sparsezoo_jax.pallas_kernels.spark_ffn.rows import reference
from tests.covering import pairs
from tests.kernels.few_rows import STORAGE, Draw, close, compiled, implementation, rounds


@pytest.fixture(params=["xla", "native", "pallas_gpu_interpret", "pallas_tpu_interpret"])
def apply(request):
    return compiled(spark_ffn_rows, implementation(request.param))


definition = jax.jit(reference, static_argnames="top_k")
trained = jax.jit(partial(spark_ffn, return_gate=True), static_argnames=("top_k", "ddof", "huber_delta"))


def layer(draw, d, r, neurons):
    k1, k1_scale = draw.weights(neurons, r)
    (k2, k2_scale), (v, v_scale) = draw.weights(neurons, d - r), draw.weights(neurons, d)
    rows_scale = None if k2_scale is None else jnp.stack([k2_scale, v_scale], axis=1)
    return (k1, jnp.concatenate([k2, v], axis=1)), (k1_scale, rows_scale)


# Of every implementation, any two of these; sizes are (d, r, neurons, top_k).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "m", "sizes"), pairs(STORAGE, [1, 3, 8], [(37, 13, 101, 15), (40, 32, 700, 30), (6, 5, 2, 1)])
)
def test_is_the_definition(request, apply, storage, m, sizes):
    draw, (d, r, neurons, top_k) = Draw(storage), sizes
    x = draw.tokens(m, d)
    weights, scales = layer(draw, d, r, neurons)
    y, active = apply(x, *weights, top_k=top_k, scales=scales)
    expected, expected_active = definition(x, *weights, top_k=top_k, scales=scales)
    close(y, expected, rounds(request, storage))
    np.testing.assert_array_equal(active, expected_active)


@pytest.mark.slow
@pytest.mark.parametrize("huber_delta", [0.0, 0.7])
@pytest.mark.parametrize("ddof", [0, 1])
def test_is_the_form_that_is_trained(apply, ddof, huber_delta):
    draw = Draw("float32")
    x = draw.tokens(3, 24)
    (k1, rows), _ = layer(draw, 24, 10, 60)
    options = {"top_k": 9, "ddof": ddof, "huber_delta": huber_delta}
    y, active = apply(x, k1, rows, **options)
    expected, gate = trained(x, k1.T, rows[:, :14].T, rows[:, 14:], **options)
    close(y, expected)
    np.testing.assert_array_equal(active, (gate != 0).sum(-1))


def test_predictor_and_rows_of_different_types(apply):
    draw = Draw("bfloat16")
    x, (k1, k1_scale) = draw.tokens(2, 30), Draw("int8").weights(80, 12)
    rows = draw.tokens(80, 18 + 30)
    y, active = apply(x, k1, rows, top_k=8, scales=(k1_scale, None))
    expected, expected_active = definition(x, k1, rows, top_k=8, scales=(k1_scale, None))
    close(y, expected)
    np.testing.assert_array_equal(active, expected_active)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 3])
def test_rows_that_select_nothing_or_almost_everything(apply, m):
    draw = Draw("float32")
    x = draw.tokens(m, 12)
    (k1, rows), _ = layer(draw, 12, 4, 64)
    y, active = apply(x, jnp.zeros_like(k1), rows, top_k=5)  # constant scores: none is above their mean
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(active, 0)
    # Two in three scores equal and high: all of those are above a threshold for 40 of 64.
    high = jnp.where(jnp.arange(64) % 3 == 0, -1.0, 1.0)[:, None] * jnp.ones((64, 4))
    positive = jnp.abs(x)
    y, active = apply(positive, high, rows, top_k=40)
    expected, expected_active = definition(positive, high, rows, top_k=40)
    close(y, expected)
    np.testing.assert_array_equal(active, expected_active)
    assert int(active.min()) == 42


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "place"), [(jnp.nan, 2), (jnp.inf, 2), (-jnp.inf, 20), (jnp.nan, 20)])
def test_not_a_number_stays_in_its_row(apply, bad, place):
    draw = Draw("float32")
    x = draw.tokens(3, 24)
    (k1, rows), _ = layer(draw, 24, 10, 60)
    x = x.at[1, place].set(bad)
    y, _ = apply(x, k1, rows, top_k=9)
    expected, _ = definition(x, k1, rows, top_k=9)
    assert not np.isfinite(expected[1]).any()
    assert not np.isfinite(y[1]).any()
    close(y[::2], expected[::2])


@pytest.mark.parametrize("storage", STORAGE)
def test_a_row_does_not_depend_on_the_others(storage):
    draw = Draw(storage)
    x = draw.tokens(9, 50)
    weights, scales = layer(draw, 50, 20, 300)
    apply = jax.jit(partial(spark_ffn_rows, top_k=24, scales=scales, implementation=implementation("native")))
    together = apply(x, *weights)
    for i in range(9):
        for ours, expected in zip(apply(x[i : i + 1], *weights), together, strict=True):
            np.testing.assert_array_equal(ours[0], expected[i])


@pytest.mark.parametrize("form", ["xla", "native", "pallas_gpu_interpret"])  # a TPU's tiles: test_weighted_rows
def test_only_active_rows_are_read(form):
    draw = Draw("float32")
    x = draw.tokens(2, 24)
    (k1, rows), _ = layer(draw, 24, 10, 200)
    call = jax.jit(partial(spark_ffn_rows, top_k=12, implementation=implementation(form)))
    expected, _ = call(x, k1, rows)
    _, gate = trained(x, k1.T, rows[:, :14].T, rows[:, 14:], top_k=12)
    inactive = ~(gate != 0).any(axis=0)
    assert inactive.sum() > 150
    poisoned = jnp.where(inactive[:, None], jnp.nan, rows)
    np.testing.assert_array_equal(call(x, k1, poisoned)[0], expected)


def test_bad_input():
    x, k1, rows = jnp.ones((1, 6)), jnp.ones((8, 2)), jnp.ones((8, 10))
    with pytest.raises(ConfigError, match=r"spark_ffn_rows.rows=\(8, 9\): must be \(8, 10\)"):
        spark_ffn_rows(x, k1, rows[:, 1:], top_k=2)
    with pytest.raises(ConfigError, match=r"spark_ffn_rows.top_k=8: must be above 0 and below the 8 neurons"):
        spark_ffn_rows(x, k1, rows, top_k=8)
    with pytest.raises(ConfigError, match="must be below 6 wide"):
        spark_ffn_rows(x, jnp.ones((8, 6)), rows, top_k=2)
    with pytest.raises(ConfigError, match=r"rows's scale=\(8,\): must be \(8, 2\) for int8"):
        spark_ffn_rows(x, k1, rows.astype(jnp.int8), top_k=2, scales=(None, jnp.ones(8)))
