"""The contract of the expert feed-forward operation, for every implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import ragged, without_kernels
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn, spread, weighted_ffn
from sparsezoo_jax.pallas_kernels.grouped_ffn.by_expert import TILE
from sparsezoo_jax.pallas_kernels.grouped_ffn.exchange import sends_fewer_bytes
from sparsezoo_jax.torus import use_rings
from tests.kernels.few_rows import implementation as built


@pytest.fixture(params=["dense", "ragged", "loop"])
def plain(request):
    """Forms in plain JAX, which take every dtype."""
    return request.param


@pytest.fixture(params=["dense", "ragged", "loop", "native"])
def implementation(request):
    return built(request.param)


def arrays(tokens=37, k=3, d=10, count=7, width=5, gated=False, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (tokens, d), dtype)
    experts = jnp.argsort(jax.random.normal(keys[1], (tokens, count)), axis=-1)[:, :k]
    weights = jax.random.normal(keys[2], (tokens, k), dtype)
    up, gate = (jax.random.normal(key, (count, d, width), dtype) for key in keys[3:5])
    down = jax.random.normal(keys[5], (count, width, d), dtype)
    return x, experts, weights, (up, down, gate) if gated else (up, down)


def by_hand(x, experts, weights, maps, activation):
    """Token by token, as the definition reads."""
    x, weights, maps = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, weights, maps))
    y = np.zeros_like(x)
    for n in range(len(x)):
        for e, w in zip(np.asarray(experts)[n], weights[n], strict=True):
            hidden = x[n] @ maps[0][e]
            hidden = np.asarray(activation(x[n] @ maps[2][e])) * hidden if len(maps) == 3 else activation(hidden)
            y[n] += w * np.asarray(hidden) @ maps[1][e]
    return y


def gradients(implementation, x, experts, weights, maps, activation):
    def total(x, weights, maps):
        y = grouped_ffn(x, experts, weights, *maps, activation=activation, implementation=implementation)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(x, weights, maps)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_values_and_gradients_in_float64(plain, gated):
    with jax.enable_x64(True):
        given = arrays(gated=gated, dtype=jnp.float64)
        (_, y), grads = gradients(plain, *given, jax.nn.silu)
        np.testing.assert_allclose(y, by_hand(*given, jax.nn.silu), atol=1e-12)
        expected = gradients("dense", *given, jax.nn.silu)[1]
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


# One token, one expert, more tokens than a tile holds for an expert, exactly one tile, all experts chosen.
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "k": 1},
        {"tokens": 5, "k": 1, "count": 1},
        {"tokens": 2 * TILE + 3, "k": 2, "count": 3},
        {"tokens": TILE, "k": 1, "count": 1},
        {"tokens": 11, "k": 7, "count": 7},
    ],
)
def test_odd_sizes(implementation, sizes):
    given = arrays(**sizes)
    (_, y), grads = gradients(implementation, *given, jax.nn.relu)
    (_, expected), expected_grads = gradients("dense", *given, jax.nn.relu)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4)  # sums over 259 tokens in another order


@pytest.mark.slow
@pytest.mark.parametrize("only", [0, 3, 6])
def test_all_tokens_to_one_expert(implementation, only):
    x, _, weights, maps = arrays(tokens=TILE + 5, k=1)
    experts = jnp.full(weights.shape, only)
    (_, y), (_, _, maps_grads) = gradients(implementation, x, experts, weights, maps, jax.nn.silu)
    np.testing.assert_allclose(y, by_hand(x, experts, weights, maps, jax.nn.silu), atol=1e-4)
    for grad in maps_grads:
        unused = jnp.delete(grad, only, axis=0)
        np.testing.assert_array_equal(unused, 0)
        assert jnp.abs(grad[only]).max() > 0


def test_an_expert_chosen_twice_counts_twice(implementation):
    x, experts, weights, maps = arrays(tokens=9)
    experts = experts.at[4].set(2)
    (_, y), grads = gradients(implementation, x, experts, weights, maps, jax.nn.silu)
    np.testing.assert_allclose(y, by_hand(x, experts, weights, maps, jax.nn.silu), atol=1e-4)
    for a, b in zip(
        jax.tree.leaves(grads),
        jax.tree.leaves(gradients("dense", x, experts, weights, maps, jax.nn.silu)[1]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_leading_axes(implementation):
    x, experts, weights, maps = arrays(tokens=12)
    apply = jax.jit(partial(grouped_ffn, implementation=implementation))
    shaped = apply(*(a.reshape(3, 4, -1) for a in (x, experts, weights)), *maps)
    np.testing.assert_allclose(shaped.reshape(12, -1), apply(x, experts, weights, *maps), atol=1e-5)


def test_bfloat16(plain):
    given = arrays(dtype=jnp.bfloat16, d=32, width=16)
    (_, y), grads = gradients(plain, *given, jax.nn.silu)
    assert y.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    expected = by_hand(*given, jax.nn.silu)
    # Three roundings of 2^-8 on the way to sums of about 50.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02 * np.abs(expected).max())


def test_infinite_rows_stay_with_their_token(implementation):
    x, experts, weights, maps = arrays(tokens=9)
    y = jax.jit(partial(grouped_ffn, implementation=implementation))(x.at[0].set(jnp.inf), experts, weights, *maps)
    assert not jnp.isfinite(y[0]).any()
    assert jnp.isfinite(y[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_active_units_are_counted(implementation, gated):
    x, experts, weights, maps = arrays(tokens=TILE + 5, gated=gated)

    @jax.jit
    def outputs(x, maps):
        y, active = grouped_ffn(
            x, experts, weights, *maps, activation=jax.nn.relu, return_active=True, implementation=implementation
        )
        return jnp.sum(active), (y, active)

    grads, (y, active) = jax.grad(outputs, argnums=(0, 1), has_aux=True)(x, maps)
    up, gate = np.asarray(maps[0]), np.asarray(maps[2]) if gated else np.asarray(maps[0])
    hidden = np.einsum("nd,nkdw->nkw", x, gate[np.asarray(experts)])
    hidden = np.maximum(hidden, 0) * (np.einsum("nd,nkdw->nkw", x, up[np.asarray(experts)]) if gated else 1)
    np.testing.assert_array_equal(active, (hidden != 0).sum(-1))
    assert not any(g.any() for g in jax.tree.leaves(grads)), "a count has no gradient"
    plain = grouped_ffn(x, experts, weights, *maps, activation=jax.nn.relu, implementation=implementation)
    np.testing.assert_allclose(y, plain, atol=1e-5)


def test_weights_of_all_experts():
    x, experts, weights, maps = arrays()
    every = spread(experts, weights, 7)
    np.testing.assert_allclose(jnp.take_along_axis(every, experts, -1), weights)
    assert (every != 0).sum() == experts.size
    np.testing.assert_allclose(
        weighted_ffn(x, every, *maps), by_hand(x, experts, weights, maps, jax.nn.silu), atol=1e-4
    )


def test_shapes_are_checked():
    x, experts, weights, (up, down) = arrays()
    with pytest.raises(ConfigError, match=r"grouped_ffn.down"):
        grouped_ffn(x, experts, weights, up, up)
    with pytest.raises(ConfigError, match=r"grouped_ffn.up"):
        grouped_ffn(x[:, 1:], experts, weights, up, down)
    with pytest.raises(ConfigError, match=r"grouped_ffn.gate"):
        grouped_ffn(x, experts, weights, up, down, down)
    with pytest.raises(ConfigError, match=r"grouped_ffn.experts"):
        grouped_ffn(x, experts[:, 1:], weights, up, down)
    with pytest.raises(ConfigError, match=r"weighted_ffn.weights"):
        weighted_ffn(x, weights, up, down)
    with pytest.raises(
        ConfigError, match=r"grouped_ffn.implementation=fast: must be one of dense, loop, native, ragged"
    ):
        grouped_ffn(x, experts, weights, up, down, implementation="fast")


def test_default_is_settled_where_the_program_is_lowered():
    given = arrays()
    traced = jax.jit(partial(gradients, None, activation=jax.nn.silu)).trace(*given)
    native_form = built("native")
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "sparsezoo_products_by_expert" in on_cpu
    assert "sparsezoo_sum_of_experts" in on_cpu
    assert "sparsezoo_sums_by_expert" in on_cpu
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "chlo.ragged_dot" in on_tpu
    assert "tpu_custom_call" in on_tpu
    (_, y), grads = gradients(None, *given, jax.nn.silu)
    (_, expected), expected_grads = gradients(native_form, *given, jax.nn.silu)
    np.testing.assert_array_equal(y, expected)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_tiles_by_a_loop_where_the_native_products_can_not():
    """In bfloat16, and without kernels."""
    halves = jax.jit(partial(gradients, None, activation=jax.nn.silu)).trace(*arrays(dtype=jnp.bfloat16))
    with without_kernels():
        plain = jax.jit(partial(gradients, None, activation=jax.nn.silu)).trace(*arrays())
    for traced in (halves, plain):
        on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "stablehlo.while" in on_cpu
        assert "sparsezoo_" not in on_cpu


@pytest.mark.parametrize(("sizes", "width"), [([3, 0, 200, 61], 5), ([0, 700, 0, 1], 130)])
def test_weight_gradient_by_megablox(sizes, width):
    keys = jax.random.split(jax.random.key(1))
    x, g = jax.random.normal(keys[0], (sum(sizes), 10)), jax.random.normal(keys[1], (sum(sizes), width))
    expected = ragged.dense_weight_gradient(x, g, jnp.array(sizes))
    found = ragged.megablox_weight_gradient(x, g, jnp.array(sizes), interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)  # sums over 700 rows in another order


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "width", "devices", "rings", "sends"),
    [
        (8192, 6, 48, 1408, 4, (4,), True),  # 196,608 < 270,336
        (8192, 6, 48, 1408, 8, (8,), False),
        (8192, 6, 48, 1408, 16, (4, 4), True),
        (8192, 16, 1024, 64, 4, (4,), False),  # 524,288 > 262,144
        (2048, 16, 1024, 64, 4, (4,), True),
    ],
)
def test_what_is_sent_to_experts_on_other_devices(tokens, k, experts, width, devices, rings, sends):
    with use_rings((("expert", rings),) if len(rings) > 1 else ()):
        why = sends_fewer_bytes(tokens, k, experts, width, 2, devices, "expert")
    assert (why is not None) == sends
    if sends:
        assert f"{max(rings)} * {tokens} tokens * k={k}" in why
