"""The fused experts and their union form against a sum over experts, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import block_ffn, block_ffn_union
from sparsezoo_jax.pallas_kernels.block_ffn import union_of_experts

D, E, W, N = 10, 8, 3, 6


@pytest.fixture(scope="module", params=["plain", "gated"])
def arrays(request):
    """Tokens that activate experts 1, 2, 4 and 6 only, none of them all four."""
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.normal(size=(N, E)), 0)
    scores[:, [0, 3, 5, 7]] = 0
    scores[:, [1, 2, 4, 6]] += np.eye(4)[[0, 1, 2, 3, 0, 1]]
    shapes = {"x": (N, D), "up": (D, E * W), "down": (E * W, D), "gate": (D, E * W)}
    made = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"scores": scores}
    return made | ({} if request.param == "gated" else {"gate": None})


def per_expert_sum(x, scores, up, down, gate):
    def silu(z):
        return z / (1 + np.exp(-z))

    y = np.zeros_like(x)
    for e in range(E):
        part = slice(e * W, (e + 1) * W)
        hidden = silu(x @ up[:, part]) if gate is None else silu(x @ gate[:, part]) * (x @ up[:, part])
        y += scores[:, e : e + 1] * (hidden @ down[part])
    return y


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_fused_form_is_the_sum_over_experts(arrays):
    with jax.enable_x64(True):
        close(jax.jit(lambda a: block_ffn(**a, expert_width=W))(arrays), per_expert_sum(**arrays))


def test_a_union_and_any_superset_give_the_same(arrays):
    with jax.enable_x64(True):
        expected = per_expert_sum(**arrays)
        call = jax.jit(lambda a, **kwargs: block_ffn_union(**a, expert_width=W, **kwargs), static_argnames="capacity")
        for capacity in (4, 5, None):
            close(call(arrays, capacity=capacity), expected)
        for experts in ([1, 2, 4, 6], [6, 4, 2, 1, 8, 8], [0, 1, 2, 4, 6, 7], list(range(8))):
            close(call(arrays, experts=jnp.array(experts)), expected)


def test_an_active_expert_that_is_missing_is_not_passed_over(arrays):
    with jax.enable_x64(True):
        assert np.isnan(block_ffn_union(**arrays, expert_width=W, capacity=3)).all()
        assert np.isnan(block_ffn_union(**arrays, expert_width=W, experts=jnp.array([1, 2, 4]))).all()


def test_union_has_the_active_experts_in_order(arrays):
    np.testing.assert_array_equal(union_of_experts(jnp.asarray(arrays["scores"]), 6), [1, 2, 4, 6, 8, 8])
    np.testing.assert_array_equal(union_of_experts(jnp.zeros((2, E)), 2), [8, 8])


def test_chunks_by_vmap(arrays):
    with jax.enable_x64(True):
        x, scores = (arrays[name].reshape(2, 3, -1) for name in ("x", "scores"))
        weights = {name: arrays[name] for name in ("up", "down", "gate")}
        y = jax.vmap(lambda x, scores: block_ffn_union(x, scores, **weights, expert_width=W, capacity=4))(x, scores)
        close(y.reshape(N, D), per_expert_sum(**arrays))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.ones((N, E + 1))}, "block_ffn.up=(10, 24): must be (10, 27)"),
        ({"scores": np.ones((N - 1, E))}, "block_ffn.scores=(5,): must be (6,)"),
        ({"down": np.ones((D, E * W))}, "block_ffn.down=(10, 24): must be (24, 10)"),
        ({"gate": np.ones((D, W))}, "block_ffn.gate=(10, 3): must be (10, 24)"),
        ({"implementation": "cuda"}, "block_ffn.implementation=cuda: must be one of xla"),
    ],
)
def test_shapes_that_do_not_fit(arrays, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        block_ffn(**{**arrays, **change}, expert_width=W)


def test_impossible_unions(arrays):
    with pytest.raises(ConfigError, match="capacity=9: must be between 1 and 8"):
        block_ffn_union(**arrays, expert_width=W, capacity=9)
    three = {**arrays, "x": arrays["x"][None], "scores": arrays["scores"][None]}
    with pytest.raises(ConfigError, match=r"use jax\.vmap over chunks"):
        block_ffn_union(**three, expert_width=W)


@pytest.fixture(params=["pallas_tpu_interpret", "pallas_gpu_interpret"])
def kernel(request):
    return request.param


def wide_arrays(dtype, gated=True, n=5, experts=6):
    """Tokens of experts of 128 neurons, as the TPU kernel wants them; experts 0 and 3 are active for nobody."""
    rng = np.random.default_rng(1)
    scores = np.maximum(rng.normal(size=(n, experts)), 0)
    scores[:, [0, 3]] = 0
    shapes = {"x": (n, D), "up": (D, experts * 128), "down": (experts * 128, D), "gate": (D, experts * 128)}
    made = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"scores": scores}
    return {name: jnp.asarray(a, dtype) for name, a in made.items()} | ({} if gated else {"gate": None})


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)],  # in bfloat16 the reference rounds the hidden state once more
)
def test_kernel_is_the_reference(kernel, gated, dtype, tolerance):
    made = wide_arrays(dtype, gated)
    expected = np.asarray(block_ffn_union(**made, expert_width=128, implementation="xla"), np.float32)
    for choice in (
        {},
        {"capacity": 4},
        {"experts": jnp.array([4, 6, 1, 2, 6, 5])},
        {"experts": jnp.array([6, 5, 4, 2, 1])},
    ):
        y = block_ffn_union(**made, expert_width=128, implementation=kernel, **choice)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=tolerance * np.abs(expected).max())


def test_kernel_does_not_read_inactive_experts(kernel):
    made = wide_arrays(jnp.float32)
    expected = block_ffn_union(**made, expert_width=128, implementation=kernel, capacity=5)
    for name, axis in (("up", 1), ("gate", 1), ("down", 0)):
        inactive = np.isin(np.arange(6 * 128) // 128, [0, 3])
        made[name] = jnp.where(inactive if axis else inactive[:, None], jnp.nan, made[name])
    np.testing.assert_array_equal(
        block_ffn_union(**made, expert_width=128, implementation=kernel, capacity=5), expected
    )


def test_kernel_of_a_union_without_experts_and_of_one_that_misses_some(kernel):
    made = wide_arrays(jnp.float32)
    nobody = {**made, "scores": jnp.zeros_like(made["scores"])}
    np.testing.assert_array_equal(block_ffn_union(**nobody, expert_width=128, implementation=kernel), 0)
    assert np.isnan(block_ffn_union(**made, expert_width=128, implementation=kernel, capacity=3)).all()


@pytest.mark.slow
def test_kernel_gradient(kernel):
    made = wide_arrays(jnp.float32)

    def loss(made, implementation):
        return jnp.sum(block_ffn_union(**made, expert_width=128, implementation=implementation) ** 2)

    expected = jax.grad(loss)(made, "xla")
    for name, found in jax.grad(loss)(made, kernel).items():
        np.testing.assert_allclose(found, expected[name], atol=1e-5 * np.abs(expected[name]).max())


def test_experts_that_do_not_fill_a_tile(arrays):
    made = {name: None if a is None else jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
    with pytest.raises(ConfigError, match="whole tiles of 128 columns, which a width of 3"):
        block_ffn_union(**made, expert_width=W, implementation="pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize(("n", "experts", "width"), [(1, 1, 3), (17, 5, 33), (6, 4, 70)])
def test_gpu_kernel_of_any_size(n, experts, width):
    """Sizes that fill no tile of tokens, neurons or terms."""
    rng = np.random.default_rng(2)
    scores = jnp.asarray(np.maximum(rng.normal(size=(n, experts)), 0), jnp.float32)
    x, up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((n, 70), (70, experts * width), (experts * width, 70))
    )
    expected = block_ffn(x, scores, up, down, expert_width=width)
    y = block_ffn_union(x, scores, up, down, expert_width=width, implementation="pallas_gpu_interpret")
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(1, float(jnp.abs(expected).max())))


def test_more_tokens_than_the_gpu_kernel_takes():
    made = wide_arrays(jnp.float32, n=129)
    with pytest.raises(ConfigError, match="takes from 1 to 128 tokens, not 129"):
        block_ffn_union(**made, expert_width=128, implementation="pallas_gpu")
    assert block_ffn_union(**made, expert_width=128).shape == (129, D)
