"""Lazy Neuron: the k largest activated units of a token, exactly, and what the zoo counts of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsezoo_jax.configs.lazy import PRESETS
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import dense_twin, flops_per_token
from sparsezoo_jax.models.common import ActivationName, BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.topk import top_k_mask
from tests.models.conftest import CONFIGS, build, forward, with_weights_of

MASK = jax.jit(top_k_mask, static_argnames="implementation")  # for all k
VALUES = st.sampled_from([0, 0, 1e-38, 0.5, 1, 1.25, 3e38])


def kept_of(values, k):
    order = np.argsort(-values, kind="stable")
    kept = np.zeros_like(values)
    kept[order[:k]] = values[order[:k]]
    return kept


# Few different values: most rows have ties, some of them at 0.
@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=11, max_size=11), st.integers(1, 11), st.sampled_from(["float32", "bfloat16"]))
def test_the_largest_are_kept_and_of_equal_ones_the_first(row, k, dtype):
    x = jnp.asarray([row, row[::-1]], dtype)
    for implementation in ("xla", "native"):
        found = np.where(MASK(x, k, implementation=implementation), np.asarray(x, np.float32), 0)
        for values, kept in zip(np.asarray(x, np.float32), found, strict=True):
            np.testing.assert_array_equal(kept, kept_of(values, k))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows_of_any_length_keep_their_largest(dtype):
    draw = np.random.default_rng(0)
    for shape in ((1, 3584), (3, 7, 1031), (70, 40), (5,)):
        x = jnp.asarray(draw.exponential(size=shape) * 10.0 ** draw.integers(-6, 6, shape), dtype)
        x = jnp.where(draw.random(shape) < 0.1, 0, x)
        for k in {1, shape[-1] // 3, shape[-1]}:
            found = MASK(x, k, implementation="native")
            np.testing.assert_array_equal(found, MASK(x, k, implementation="xla"))
            rows = np.asarray(jnp.where(found, x, 0), np.float32).reshape(-1, shape[-1])
            for values, kept in zip(np.asarray(x, np.float32).reshape(rows.shape), rows, strict=True):
                np.testing.assert_array_equal(kept, kept_of(values, k))
    mapped = jax.vmap(lambda x: top_k_mask(x, 3, implementation="native"))(x[None])
    np.testing.assert_array_equal(mapped[0], MASK(x, 3, implementation="xla"))


def test_the_layer_and_its_gradient_by_hand():
    """Units 6, 1, 0, 3 of which two are kept; k = 4 is no restriction."""
    ctx = BuildContext(2, 1, InitConfig(), jnp.dtype("float32"), jnp.dtype("float32"))
    up, down = jnp.array([[6.0, 1, -2, 3], [0, 0, 0, 0]]), jnp.array([[1.0, 0], [1, 1], [0, 1], [2, 0]])
    x, valid = jnp.array([[[1.0, 0]]]), jnp.ones((1, 1), jnp.int32)

    def run(k: int | None, activation: ActivationName = "relu"):
        config = PlainFFNConfig(d_ff=4, activation=activation, top_k=k)
        ffn = config.build(ctx, nnx.Rngs(0))
        ffn.up_DF[...], ffn.down_FD[...] = up, down

        def total(ffn):
            y, aux = ffn(x, CallContext(valid, valid))
            return jnp.sum(y), (y, aux)

        gradients, (y, aux) = nnx.grad(total, has_aux=True)(ffn)
        return np.asarray(y[0, 0]), float(aux.stats["ffn_density"]), np.asarray(gradients.up_DF[...][0])

    y, density, gradient = run(2)
    np.testing.assert_array_equal(y, [12, 0])
    assert density == 0.5
    np.testing.assert_array_equal(gradient, [1, 0, 0, 2])
    np.testing.assert_array_equal(run(2, "relu2")[0], [36 + 2 * 9, 0])
    for free in (run(4), run(None)):
        np.testing.assert_array_equal(free[0], [13, 1])
        assert free[1] == 0.75
        np.testing.assert_array_equal(free[2], [1, 2, 0, 2])


def test_no_token_keeps_more_and_all_of_them_are_the_dense_twin(tokens):
    model = build(CONFIGS["lazy"])
    out = nnx.jit(lambda model, tokens: model(tokens, record=("ffn_scores", "ffn_hidden")))(model, tokens)
    for layer in range(2):
        scores, hidden = (np.asarray(out.records[name][layer]) for name in ("ffn_scores", "ffn_hidden"))
        np.testing.assert_array_equal((hidden > 0).sum(-1), np.minimum((scores > 0).sum(-1), 9))
        np.testing.assert_array_equal(hidden[hidden > 0], scores[hidden > 0])
    twin = dense_twin(CONFIGS["lazy"])
    assert twin is not None
    assert twin.ffn == PlainFFNConfig(d_ff=32, activation="relu")
    whole = dataclasses.replace(CONFIGS["lazy"], ffn=dataclasses.replace(twin.ffn, top_k=32))
    expected = forward(with_weights_of(twin, model))(tokens).logits
    np.testing.assert_allclose(forward(with_weights_of(whole, model))(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - out.logits).max() > 0.01


def test_half_of_the_units_are_active_at_first(tokens):
    twin = dense_twin(CONFIGS["lazy"])
    assert twin is not None
    density = forward(build(twin))(tokens).stats["ffn_density"]
    np.testing.assert_allclose(density, 0.5, atol=0.05)


def test_flops_of_the_pair_are_the_papers():
    """4 d f fall to 2 d f + 2 d k."""
    free, kept = PRESETS["t5_base"].model, PRESETS["t5_base_topk"].model
    assert kept.ffn.target_active == 128
    assert free.ffn.target_active is None
    assert free.ffn.flops(768) == 4 * 768 * 3072
    assert kept.ffn.flops(768) == 2 * 768 * (3072 + 128)
    saved = flops_per_token(free, 512) - flops_per_token(kept, 512)
    assert saved == pytest.approx(12 * 2 * 768 * (3072 - 128))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 0}, "model.ffn.top_k=0: must be from 1 to d_ff=8"),
        ({"top_k": 9}, "model.ffn.top_k=9: must be from 1 to d_ff=8"),
        ({"top_k": 4, "activation": "silu"}, "model.ffn.top_k=4: must be none with model.ffn.activation=silu"),
    ],
)
def test_what_cannot_be_kept_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PlainFFNConfig(d_ff=8, **{"activation": "relu", **values})
