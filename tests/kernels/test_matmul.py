"""The matrix product and its gradients agree with `jnp.matmul`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.pallas_kernels.matmul import matmul


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 17), (17, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients(inputs, outputs, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, inputs), dtype)
    w = jax.random.normal(jax.random.key(1), (inputs, outputs), dtype)
    g = jax.random.normal(jax.random.key(2), (2, 3, outputs), dtype)
    y, pull = jax.vjp(matmul, x, w)
    expected, expected_pull = jax.vjp(jnp.matmul, x, w)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(pull(g), expected_pull(g), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=tolerance, atol=tolerance)


def test_accumulates_in_the_asked_type():
    x = jnp.full((1, 512), 1 / 3, jnp.bfloat16)
    w = jnp.ones((512, 1), jnp.bfloat16)
    wide = matmul(x, w, jnp.dtype(jnp.float32))
    assert wide.dtype == jnp.float32
    assert float(wide[0, 0]) == pytest.approx(512 * float(x[0, 0]), rel=1e-6)
    dx, dw = jax.grad(lambda x, w: matmul(x, w, jnp.dtype(jnp.float32)).sum(), argnums=(0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16)
