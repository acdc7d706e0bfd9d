"""The contract of the Spark FFN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.spark_ffn import exact_topk, reference, select_neurons, spark_ffn
from sparsezoo_jax.pallas_kernels.statistical_topk import statistical_topk

IMPLEMENTATIONS = ["xla", "one_pass"]


@pytest.fixture(params=IMPLEMENTATIONS)
def ffn(request):
    def apply(*arrays, **kwargs):
        return jax.jit(partial(spark_ffn, implementation=request.param, **kwargs))(*arrays)

    return apply


def arrays(d=24, r=10, f=64, rows=(3, 5), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(*rows, d), (r, f), (d - r, f), (f, d)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def test_golden(ffn):
    with jax.enable_x64(True):
        d, r, f = 4, 2, 6
        x = jnp.array([1, -0.5, 0.25, 2], jnp.float64)
        k1 = jnp.array([[((3 * i + 5 * j) % 7 - 3) / 4 for j in range(f)] for i in range(r)])
        k2 = jnp.array([[((2 * i + 3 * j) % 5 - 2) / 2 for j in range(f)] for i in range(d - r)])
        v = jnp.array([[((4 * i + j) % 6 - 2) / 3 for j in range(f)] for i in range(d)]).T
        np.testing.assert_allclose(x[:r] @ k1, [-0.75, 0.75, -0.375, -0.625, 0.875, 0.625])
        np.testing.assert_allclose(x[r:] @ k2, [-0.25, -1.875, 0.875, -0.75, 2, -0.25])
        y, gate = ffn(x, k1, k2, v, top_k=2, return_gate=True)
        np.testing.assert_allclose(gate, [0, 0.2198370143, 0, 0, 0.3208413426, 0.1298420517], atol=1e-9)
        np.testing.assert_allclose(y, [0.5327260777, -0.4230145727, -0.5543664197, 0.5327260777], atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equals_the_masked_dense_form(ffn, dtype, tolerance):
    x, k1, k2, v = arrays(dtype=dtype)
    wide = [np.asarray(a, np.float64) for a in (x, k1, k2, v)]
    scores = wide[0][..., :10] @ wide[1]
    theta = scores.mean(-1, keepdims=True) + scores.std(-1, ddof=1, keepdims=True) * 1.2815515655446004
    s = np.maximum(scores - theta, 0)
    gate = 0.5 * s * (1 + np.tanh(np.sqrt(2 / np.pi) * (s + 0.044715 * s**3)))
    expected = (gate * (wide[0][..., 10:] @ wide[2])) @ wide[3]
    y = np.asarray(ffn(x, k1, k2, v, top_k=6.4), np.float64)
    assert y.dtype == np.float64
    assert np.linalg.norm(y - expected) <= tolerance * np.linalg.norm(expected)


def test_inactive_neurons_do_not_matter(ffn):
    x, k1, k2, v = arrays(rows=(1,))
    y, gate = ffn(x, k1, k2, v, top_k=6, return_gate=True)
    active = gate[0] != 0
    assert 0 < int(active.sum()) < 20
    np.testing.assert_array_equal(ffn(x, k1, k2 * active, v * active[:, None], top_k=6), y)
    spoiled = ffn(x, k1, jnp.where(active, k2, 1e3), jnp.where(active[:, None], v, 1e3), top_k=6)
    np.testing.assert_array_equal(spoiled, y)


def test_the_two_input_parts_do_different_things(ffn):
    x, k1, k2, v = arrays()
    gate = ffn(x, k1, k2, v, top_k=6, return_gate=True)[1]
    values_changed = x.at[..., 10:].multiply(-3.0)
    np.testing.assert_array_equal(ffn(values_changed, k1, k2, v, top_k=6, return_gate=True)[1], gate)
    # The output is linear in the value part while the selecting part stays.
    np.testing.assert_allclose(
        ffn(values_changed, k1, k2, v, top_k=6), -3.0 * ffn(x, k1, k2, v, top_k=6), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_gradients_match_plain_autodiff(ffn):
    x, k1, k2, v = arrays()

    def plain(x, k1, k2, v):
        s = x[..., :10] @ k1
        theta = s.mean(-1, keepdims=True) + s.std(-1, ddof=1, keepdims=True) * 1.3180108973035372  # Q(1 - 6/64)
        return jnp.sum(jnp.sin((jax.nn.gelu(jnp.maximum(s - theta, 0)) * (x[..., 10:] @ k2)) @ v))

    ours = jax.grad(lambda *a: jnp.sum(jnp.sin(ffn(*a, top_k=6))), argnums=(0, 1, 2, 3))(x, k1, k2, v)
    for grad, expected in zip(ours, jax.grad(plain, argnums=(0, 1, 2, 3))(x, k1, k2, v), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_any_rows_in_one_pass():
    """Sizes beyond the sample, rows that it misleads, constant and infinite ones: as the definition."""
    x, k1, k2, v = arrays(f=2 * reference.SAMPLE + 5, rows=(7,))
    k1 = k1.at[:, : reference.SAMPLE].add(300.0)
    x = x.at[0].set(0.0).at[1, 3].set(jnp.inf)
    expected, gate = spark_ffn(x, k1, k2, v, top_k=20, return_gate=True, implementation="xla")
    y, found = spark_ffn(x, k1, k2, v, top_k=20, return_gate=True, implementation="one_pass")
    np.testing.assert_array_equal(y[0], 0)
    assert jnp.isnan(y[1]).all()
    assert jnp.isnan(expected[1]).all()
    np.testing.assert_allclose(found[2:], gate[2:], atol=1e-4 * float(gate[2:].max()))
    assert (np.asarray(found[2:] != 0) == np.asarray(gate[2:] != 0)).mean() > 0.999
    np.testing.assert_allclose(y[2:], expected[2:], atol=1e-4 * float(jnp.abs(expected[2:]).max()))


def test_one_pass_is_the_default_of_wide_layers():
    x, k1, k2, v = arrays(f=16 * reference.SAMPLE)
    programs = {
        name: jax.jit(partial(spark_ffn, top_k=100, implementation=name)).lower(x, k1, k2, v).as_text()
        for name in (None, "xla", "one_pass")
    }
    assert programs[None] == programs["one_pass"] != programs["xla"]
    with pytest.raises(ConfigError, match='implementation=one_pass: is for selection "statistical", not "relu"'):
        spark_ffn(x, k1, k2, v, top_k=6, selection="relu", implementation="one_pass")


def test_controls():
    scores = jax.random.normal(jax.random.key(1), (7, 100))
    assert (np.count_nonzero(np.asarray(exact_topk(scores, 8)), axis=-1) == 8).all()
    assert (np.count_nonzero(np.asarray(select_neurons(scores, 8, "approximate")), axis=-1) >= 8).all()
    np.testing.assert_array_equal(select_neurons(scores, 8, "relu"), jnp.maximum(scores, 0))
    np.testing.assert_array_equal(select_neurons(scores, 8, "none"), scores)
    np.testing.assert_array_equal(select_neurons(scores, 8, "statistical"), statistical_topk(scores, 8))


def test_parameter_parity_with_a_gated_ffn():
    d, gated, spark, r = 2304, 9216, 13_824, 1024
    assert spark * (r + (d - r) + d) == 3 * d * gated == 63_700_992


def test_shapes_that_do_not_fit():
    x, k1, k2, v = arrays()
    with pytest.raises(ConfigError, match=r"spark_ffn.k2"):
        spark_ffn(x, k1, k2[1:], v, top_k=6)
    with pytest.raises(ConfigError, match=r"spark_ffn.v"):
        spark_ffn(x, k1, k2, v.T, top_k=6)
