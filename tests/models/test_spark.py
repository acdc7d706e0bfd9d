"""Spark Transformer as a model: equivalences with its dense twin, initial density, rotary split."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.rope import apply_rope
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig, apply_split_rope
from tests.models.conftest import CONFIGS, build, forward


def relative_scores(rotate, shift):
    """Predictor scores of random heads at random positions, all moved by `shift`."""
    q = jax.random.normal(jax.random.key(0), (1, 20, 1, 16))
    k = jax.random.normal(jax.random.key(1), (1, 20, 1, 16))
    positions = jax.random.randint(jax.random.key(2), (1, 20), 0, 50) + shift
    q, k = (rotate(x, positions)[..., :8] for x in (q, k))
    return jnp.einsum("btnh,bsnh->bnts", q, k)


def test_predictor_scores_depend_on_relative_position_only():
    split = lambda x, positions: apply_split_rope(x, positions, 8, 10_000.0, 1.0)  # noqa: E731
    np.testing.assert_allclose(relative_scores(split, 0), relative_scores(split, 1000), atol=1e-3)
    # Rotating the whole head and slicing afterwards is the mistake this guards against.
    whole = lambda x, positions: apply_rope(x, positions, 10_000.0)  # noqa: E731
    assert jnp.abs(relative_scores(whole, 0) - relative_scores(whole, 1000)).max() > 0.1


@pytest.mark.parametrize("r", [4, 8, 16])
def test_parts_of_a_head_rotate_each_by_itself(r):
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 16))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    y = apply_split_rope(x, positions, r, 10_000.0, 0.5)
    np.testing.assert_array_equal(y[..., :r], apply_rope(x[..., :r], positions, 10_000.0, 0.5))
    np.testing.assert_array_equal(y[..., r:], apply_rope(x[..., r:], positions, 10_000.0, 0.5))


def test_rope_keeps_norms_and_passes_the_rest_through():
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 16))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    y = apply_rope(x, positions, 10_000.0, 0.5)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    # Pair (0, 4) of position 1 turns by one radian.
    np.testing.assert_allclose(y[:, 1, :, 0], x[:, 1, :, 0] * np.cos(1) - x[:, 1, :, 4] * np.sin(1), atol=1e-5)


@pytest.fixture(scope="module")
def wide():
    """A Spark decoder wide enough for densities to be sharp."""
    return dataclasses.replace(
        CONFIGS["spark"],
        d_model=256,
        layers=4,
        ffn=SparkFFNConfig(d_ff=2048, top_k=164, r=128),
        attention=SparkAttentionConfig(heads=4, kv_heads=2, head_dim=64, window=24, r=32, top_k=10),
    )


@pytest.mark.slow
def test_density_at_initialisation(wide, tokens):
    stats = forward(build(wide))(tokens).stats
    np.testing.assert_allclose(stats["ffn_density"], 0.08, atol=0.003)
    assert (stats["attended_keys"] <= 1.1 * 10).all()


def test_sparsity_switched_off_is_plain_attention(tokens):
    """r = head width, no softplus and k beyond the length: the dense attention, parameter for parameter."""
    spark = dataclasses.replace(
        CONFIGS["spark"],
        attention=SparkAttentionConfig(
            heads=4, kv_heads=2, head_dim=8, window=12, softcap=50.0, r=8, top_k=64, weighting="none"
        ),
    )
    dense = dataclasses.replace(spark, attention=GQAConfig(heads=4, kv_heads=2, head_dim=8, window=12, softcap=50.0))
    a, b = build(spark), build(dense)
    nnx.update(b, nnx.state(a))
    np.testing.assert_allclose(forward(a)(tokens).logits, forward(b)(tokens).logits, atol=2e-5)


@pytest.mark.slow
def test_selection_controls_train(tokens):
    for selection, low, high in (("exact", 5 / 48, 5 / 48), ("relu", 0.3, 0.7), ("none", 1.0, 1.0)):
        config = dataclasses.replace(
            CONFIGS["spark"], ffn=SparkFFNConfig(d_ff=48, top_k=5, r=12, selection=selection), layers=2
        )
        graphdef, state = nnx.split(build(config))

        def loss(state, graphdef=graphdef):
            out = nnx.merge(graphdef, state)(tokens)
            return jnp.mean(jnp.square(out.logits)), out.stats["ffn_density"]

        grads, density = jax.jit(jax.grad(loss, has_aux=True))(state)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert (density >= low - 1e-6).all()
        assert (density <= high + 1e-6).all()


@pytest.mark.slow
def test_a_gradient_for_a_tpu_holds_no_array_of_all_pairs():
    model = preset("spark", "tiny").model

    def lowered(implementation):
        attention = dataclasses.replace(model.attention, implementation=implementation)
        config = dataclasses.replace(model, layers=2, attention=attention, scan_layers=True)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((2, 640), jnp.int32)
        grad = jax.grad(lambda s, t, ids: jnp.mean(nnx.merge(graphdef, s)(t, segment_ids=ids).logits))
        return jax.jit(grad).trace(state, tokens, tokens).lower(lowering_platforms=("tpu",)).as_text()

    assert "640x640x" in lowered("xla")
    assert "640x640x" not in lowered(None)


def test_inactive_neurons_still_learn(tokens):
    """The threshold's gradient reaches predictor columns of neurons that no token has active."""
    config = dataclasses.replace(CONFIGS["spark"], layers=1)
    graphdef, state = nnx.split(build(config))
    grads = jax.jit(jax.grad(lambda s: jnp.mean(jnp.square(nnx.merge(graphdef, s)(tokens[:1, :3]).logits))))(state)
    ffn = grads["segments"][0]["blocks"][0]["ffn"]
    idle = np.abs(ffn["v_FD"][...]).max(axis=(0, 2)) == 0
    assert idle.sum() > 5, "three tokens leave most neurons idle"
    assert (np.abs(ffn["k1_RF"][...]).max(axis=(0, 1))[idle] > 0).all()


def test_initial_weights_scale_by_their_own_inputs():
    """The predictor reads r of the d dimensions, the rest of a neuron the others."""
    config = dataclasses.replace(CONFIGS["spark"], d_model=64, ffn=SparkFFNConfig(d_ff=192, top_k=8, r=16))
    ffn = build(config).segments[0].blocks[0].ffn
    assert float(jnp.std(ffn.k1_RF[...])) == pytest.approx(16**-0.5, rel=0.1)
    assert float(jnp.std(ffn.k2_DF[...])) == pytest.approx(48**-0.5, rel=0.1)


def test_down_projection_scale():
    base = CONFIGS["spark"]
    scaled = dataclasses.replace(base, ffn=dataclasses.replace(base.ffn, v_init_scale=4.6))
    ratio = [float(jnp.std(build(config).segments[0].blocks[0].ffn.v_FD[...])) for config in (base, scaled)]
    assert ratio[1] / ratio[0] == pytest.approx(4.6, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparkFFNConfig(d_ff=48, top_k=48, r=12), "model.ffn.top_k=48: must be between 1 and d_ff - 1 = 47"),
        (lambda: SparkFFNConfig(d_ff=48, top_k=5, r=0), "model.ffn.r=0: must be above 0"),
        (lambda: SparkAttentionConfig(heads=2, kv_heads=1, head_dim=8, r=8, top_k=4), "model.attention.r=8"),
        (lambda: SparkAttentionConfig(heads=2, kv_heads=1, head_dim=8, r=3, top_k=4), "r=3: must be even"),
        (
            lambda: dataclasses.replace(CONFIGS["spark"], ffn=SparkFFNConfig(d_ff=48, top_k=5, r=24)),
            "model.ffn.r=24: must be below model.d_model=24",
        ),
    ],
)
def test_impossible_configurations(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_abstract_build_is_cheap():
    model = nnx.eval_shape(lambda: Decoder(CONFIGS["spark"], rngs=nnx.Rngs(0)))
    assert isinstance(jax.tree.leaves(nnx.state(model))[0], jax.ShapeDtypeStruct)
