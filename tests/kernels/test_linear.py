"""The linear map of a few tokens against the product with weights in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import linear
from sparsezoo_jax.pallas_kernels.rows import dequantised
from tests.kernels.few_rows import STORAGE, Draw, close, implementation, rounds


@pytest.fixture(params=["xla", "native"])
def apply(request):
    form = implementation(request.param)
    return lambda *arrays, **kwargs: jax.jit(partial(linear, implementation=form, **kwargs))(*arrays)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (37, 50), (1031, 33)])
def test_is_the_product(request, apply, storage, m, k, n):
    draw = Draw(storage)
    x, (w, scale) = draw.tokens(m, k), draw.weights(n, k)
    expected = x.astype(jnp.float32) @ dequantised(w, scale).T
    close(apply(x, w, scale), expected.astype(x.dtype), rounds(request, storage))
    close(apply(x, w, scale, dtype=jnp.float32), expected, rounds(request, storage))


def test_logits_of_bfloat16_are_not_rounded(apply):
    x, w = jnp.full((1, 512), 1 / 3, jnp.bfloat16), jnp.ones((3, 512), jnp.bfloat16)
    y = apply(x, w, dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 512 * float(x[0, 0]), rtol=1e-6)


@pytest.mark.parametrize("storage", STORAGE)
def test_a_row_does_not_depend_on_the_others(storage):
    apply = jax.jit(partial(linear, implementation=implementation("native"), dtype=jnp.float32))
    draw = Draw(storage)
    x, (w, scale) = draw.tokens(11, 103), draw.weights(29, 103)
    together = apply(x, w, scale)
    for i in range(11):
        np.testing.assert_array_equal(apply(x[i : i + 1], w, scale)[0], together[i])


def test_weights_may_have_another_type_than_tokens(request, apply):
    x, (w, scale) = Draw("bfloat16").tokens(2, 40), Draw("int8").weights(9, 40)
    close(
        apply(x, w, scale, dtype=jnp.float32), x.astype(jnp.float32) @ dequantised(w, scale).T, rounds(request, "int8")
    )


@pytest.mark.parametrize("k", [300, 1100])
def test_rows_of_int8_are_multiplied_by_whole_numbers(k):
    """Of 16 bits, by the largest of 256: nothing else is rounded, however large the others are."""
    apply = jax.jit(partial(linear, implementation=implementation("native")))
    draw = Draw("int8")
    x, (w, scale) = np.array(draw.tokens(3, k)), draw.weights(9, k)
    x[0, :256] *= 1e6
    x[1, :256] = 0
    padded = np.pad(x, ((0, 0), (0, -k % 256))).reshape(3, -1, 256)
    unit = np.abs(padded).max(-1, keepdims=True) / 32767
    whole = np.round(padded / np.where(unit == 0, 1, unit)) * unit
    expected = whole.reshape(3, -1)[:, :k] @ np.asarray(w, np.float64).T * scale
    found = apply(x, w, scale)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(found[1:], expected[1:], atol=3e-6 * np.abs(expected[1:]).max())
    exact = x[1:] @ dequantised(w, scale).T
    assert 1e-6 < np.abs(found[1:] - exact).max() / np.abs(exact).max() < 1e-4


def test_int8_rows_times_numbers_without_bounds():
    apply = jax.jit(partial(linear, implementation=implementation("native")))
    w, scale = jnp.full((2, 3), 127, jnp.int8), jnp.ones(2)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not np.isfinite(apply(jnp.array([[1.0, value, 1.0]]), w, scale)).any()
    for value in (3e38 / 127 / 3, 1e-29, -1e-29):
        found = apply(jnp.full((1, 3), value, jnp.float32), w, scale)
        np.testing.assert_allclose(found, np.full((1, 2), 3 * 127 * value, np.float32), rtol=1e-4)


def test_not_a_number_stays_in_its_row(apply):
    draw = Draw("float32")
    x, (w, _) = draw.tokens(3, 20), draw.weights(5, 20)
    x = x.at[1, 3].set(jnp.nan).at[2, 4].set(jnp.inf)
    close(apply(x, w), x @ w.T)


def test_in_a_scan_over_layers(apply):
    draw = Draw("bfloat16")
    x, ws = draw.tokens(2, 24), draw.tokens(3, 24, 24) / 5

    def step(x, w):
        return apply(x, w), None

    expected = x
    for w in ws:
        expected = apply(expected, w)
    np.testing.assert_array_equal(jax.jit(lambda x: jax.lax.scan(step, x, ws)[0])(x), expected)


def test_bad_input():
    x, w = jnp.ones((2, 3)), jnp.ones((4, 5))
    with pytest.raises(ConfigError, match=r"linear.x=\(2, 3\): must be \(2, 5\)"):
        linear(x, w)
    with pytest.raises(ConfigError, match=r"linear.w=float16: must be one of float32, bfloat16, int8"):
        linear(x, jnp.ones((4, 3), jnp.float16))
    with pytest.raises(ConfigError, match=r"linear.w's scale=None: must be \(4,\) for int8 weights"):
        linear(x, jnp.ones((4, 3), jnp.int8))
    with pytest.raises(ConfigError, match="scale"):
        linear(x, jnp.ones((4, 3)), jnp.ones(4))
    with pytest.raises(ConfigError, match=r"linear.implementation=fast: must be one of native, xla"):
        linear(x, jnp.ones((4, 3)), implementation="fast")
    implementation("native")
    with pytest.raises(ConfigError, match='x is float16, not float32 or bfloat16; use "xla"'):
        linear(x.astype(jnp.float16), jnp.ones((4, 3)), implementation="native")


def test_the_native_form_has_no_gradient_and_says_so():
    form = implementation("native")
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda w: linear(jnp.ones((1, 3)), w, implementation=form).sum())(jnp.ones((4, 3)))
