"""BlockFFN's router, losses and statistics against numbers worked out from their formulas."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.blockffn import BlockFFNConfig, activation_locality, chunk_sparsification, normalised
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.config import DecoderConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.optimizer import group_of
from tests.models.conftest import CONFIGS, build, forward

SMALL = BlockFFNConfig(experts=8, expert_width=6, chunk_length=4)


def context(segments) -> CallContext:
    segments = jnp.asarray(segments, jnp.int32)
    return CallContext(jnp.zeros_like(segments), segments)


def one_document(length: int) -> CallContext:
    return context(np.ones((1, length)))


def layer(config=SMALL, d_model=16, seed=0):
    f32 = jnp.dtype("float32")
    return config.build(BuildContext(d_model, 4, InitConfig(), f32, f32), nnx.Rngs(seed))


def scores_of(logits, config=SMALL):
    return normalised(jax.nn.relu(jnp.asarray(logits, jnp.float32)), config)


# Router


def test_router_norm():
    np.testing.assert_allclose(scores_of([2.0, -3, 1, 0]), [1.78884723, 0, 0.89442361, 0], atol=1e-7)
    logits = np.random.default_rng(0).normal(size=(50, 8))
    logits[:, 0] = 1 + np.abs(logits[:, 0])  # no token without an expert, and none whose mean square eps matters to
    np.testing.assert_allclose(jnp.sum(scores_of(logits) ** 2, -1), 8, rtol=1e-4)
    equal = scores_of([[0.7] * k + [-1] * (8 - k) for k in (1, 2, 5, 8)])
    np.testing.assert_allclose(equal[:, 0], np.sqrt(8 / np.array([1, 2, 5, 8])), rtol=1e-3)
    loud = logits * 4
    for factor in (0.5, 2.0, 10.0):
        np.testing.assert_allclose(scores_of(factor * loud), scores_of(loud), atol=1e-4)


def test_eps_is_inside_the_root():
    np.testing.assert_allclose(scores_of([0.01, 0, 0, 0]), [0.01 / np.sqrt(2.5e-5 + 1e-5), 0, 0, 0], rtol=1e-5)


def test_other_norms():
    by_sum = dataclasses.replace(SMALL, norm_after_router="sum", norm_scale=2.0)
    np.testing.assert_allclose(scores_of([1.0, -1, 3], by_sum), [0.125, 0, 0.375], rtol=1e-5)
    none = dataclasses.replace(SMALL, norm_after_router="none")
    np.testing.assert_array_equal(scores_of([1.0, -1, 3], none), [1, 0, 3])
    assert layer(by_sum).router_norm is None
    assert layer(SMALL).router_norm.scale.shape == (8,)


@pytest.fixture(scope="module")
def called():
    """A layer's call and its gradient, jitted over its parameters."""
    graphdef, state = nnx.split(layer())

    def call(state, x, segments):
        return nnx.merge(graphdef, state)(x, context(segments))

    def objective(state, x, segments, weights):
        y, aux = call(state, x, segments)
        losses = [aux.losses[name] for name in ("activation_locality", "chunk_sparsification")]
        return jnp.sum(y) * weights[0] + losses[0] * weights[1] + losses[1] * weights[2]

    return jax.jit(call), jax.jit(jax.grad(objective)), state


X = np.random.default_rng(1).normal(size=(1, 12, 16)).astype(np.float32)
ONES = np.ones((1, 12), np.int32)


def test_no_active_expert_gives_zero_and_finite_gradients(called):
    call, gradient, state = called
    off = jax.tree.map(lambda leaf: leaf, state)
    off["router_DE"][...] = -jnp.abs(off["router_DE"][...])
    y, aux = call(off, np.abs(X), ONES)
    np.testing.assert_array_equal(y, 0)
    assert aux.stats["ffn_density"] == 0
    grads = gradient(off, np.abs(X), ONES, np.ones(3, np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["router_DE"][...]).max() > 0, "the locality loss still reaches the router"


def test_the_formula(called):
    call, _, state = called
    y, _ = call(state, X, ONES)
    router, scale, up, down = (
        np.asarray(leaf[...], np.float64)
        for leaf in (state["router_DE"], state["router_norm"]["scale"], state["up_DF"], state["down_FD"])
    )
    x = X[0].astype(np.float64)
    active = np.maximum(x @ router, 0)
    a = active / np.sqrt(np.mean(active**2, -1, keepdims=True) + 1e-5) * scale
    hidden = x @ up
    hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(y[0], (hidden * np.repeat(a, 6, axis=-1)) @ down, atol=2e-5)


def test_permuting_experts_changes_nothing(called):
    call, _, state = called
    other = jax.tree.map(lambda leaf: leaf, state)
    order = np.random.default_rng(2).permutation(8)
    neurons = (order[:, None] * 6 + np.arange(6)).reshape(-1)
    state["router_norm"]["scale"][...] = jnp.linspace(0.5, 2, 8)
    other["router_norm"]["scale"][...] = state["router_norm"]["scale"][...][order]
    other["router_DE"][...] = state["router_DE"][...][:, order]
    other["up_DF"][...] = state["up_DF"][...][:, neurons]
    other["down_FD"][...] = state["down_FD"][...][neurons]
    (y, aux), (again, aux_again) = call(state, X, ONES), call(other, X, ONES)
    np.testing.assert_allclose(again, y, atol=1e-5)
    for name in aux.losses:
        np.testing.assert_allclose(aux_again.losses[name], aux.losses[name], rtol=1e-4)


def test_gate_exists_only_when_asked_for():
    assert layer().gate_DF is None
    gated = layer(dataclasses.replace(SMALL, gated=True))
    assert gated.gate_DF.shape == (16, 48)
    y, _ = jax.jit(lambda x: gated(x, context(ONES)))(X)
    assert np.abs(y).max() > 0


@pytest.mark.slow
def test_auxiliary_losses_can_be_left_out():
    assert layer(dataclasses.replace(SMALL, auxiliary_losses=False))(X, context(ONES))[1].losses == {}


def test_bfloat16_router_rounds():
    half = layer(dataclasses.replace(SMALL, router_dtype="bfloat16"))
    exact = layer()
    logits, _, scores = half.route(jnp.asarray(X))
    assert logits.dtype == scores.dtype == jnp.bfloat16
    error = jnp.abs(scores.astype(jnp.float32) - exact.route(jnp.asarray(X))[2]).max()
    assert 0 < error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("d_model", [128, 768, 1792])
def test_initial_router(d_model):
    x = jax.random.normal(jax.random.key(0), (1, 256, d_model))
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
    made = layer(BlockFFNConfig(experts=48, expert_width=1), d_model)
    logits, _, scores = made.route(x)
    assert float(jnp.std(logits)) == pytest.approx(0.32, rel=0.02)
    assert float(jnp.mean(scores != 0)) == pytest.approx(0.5, abs=0.02)
    for matrix in (made.up_DF, made.down_FD):
        assert float(jnp.std(matrix[...])) == pytest.approx(0.02 * (256 / d_model) ** 0.5, rel=0.03)


# Activation locality


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        (0.0, 0.0, 0.6931471806),
        (0.01, 0.01, 0.5822031089),
        (0.05, -0.05, 4.9732510939),
        (-0.05, 0.05, 4.9732510939),
        (0.05, 0.05, 0.0401796031),
        (0.3, -0.3, 29.9999999999973),
    ],
)
def test_locality_of_one_pair(earlier, later, expected):
    logits = jnp.array([[[earlier], [later]]])
    assert float(activation_locality(logits, one_document(2))) == pytest.approx(expected, abs=2e-6)


def test_locality_trains_both_sides():
    grads = jax.grad(lambda logits: activation_locality(logits, one_document(2)))(jnp.array([[[0.01], [0.02]]]))
    z, label = 1.0, 1 / (1 + np.exp(-2.0))
    expected = [100 * (1 / (1 + np.exp(-z)) - label), -100 * z * label * (1 - label)]
    np.testing.assert_allclose(grads[0, :, 0], expected, rtol=1e-4)


def test_locality_compares_within_documents_only():
    logits = jnp.array([[0.05, 0.05, -0.05, -0.05, 0.3, -0.3]])[..., None]
    alone = activation_locality(logits, context([[1, 2, 3, 4, 5, 0]]))
    assert alone == 0, "documents of one token have no predecessor"
    pairs = activation_locality(logits, context([[1, 1, 2, 2, 3, 0]]))
    assert float(pairs) == pytest.approx(0.0401796031, rel=1e-5)
    padded = activation_locality(logits, context([[1, 1, 2, 0, 0, 0]]))
    assert float(padded) == pytest.approx(0.0401796031, rel=1e-5)


# Chunk sparsification


def cs(scores, ctx=None, length=64, **kwargs):
    scores = jnp.asarray(scores, jnp.float32)
    return float(chunk_sparsification(scores, ctx or one_document(scores.shape[1]), length, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "expected"), [(48, 0.7399196), (40, 0.8020386), (56, 0.6841642), (128, 0.3942684)])
def test_chunk_loss_of_uniform_scores(experts, expected):
    assert cs(np.ones((1, 64, experts)) * 1000) == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize(("experts", "active", "expected"), [(48, 10, 0.2075807), (56, 10, 0.1778349)])
def test_chunk_loss_of_the_same_experts(experts, active, expected):
    scores = np.zeros((1, 64, experts))
    scores[..., :active] = 1000
    assert cs(scores) == pytest.approx(expected, abs=3e-6)


def test_chunk_loss_by_hand():
    p = np.array([[[0.5, 0.5, 0, 0], [0.25, 0, 0.75, 0]]]) * 1e6
    assert cs(p, length=2) == pytest.approx(0.4687350, abs=1e-6)
    one_hot = np.zeros((1, 64, 4))
    one_hot[..., 2] = 5
    assert cs(one_hot) == pytest.approx(0.25, abs=6e-4)


def test_padding_counts_only_under_the_reference_mean():
    scores = np.ones((1, 128, 48)) * 1000
    half = context([[1] * 64 + [0] * 64])
    assert cs(scores, half) == pytest.approx(0.7399196, abs=3e-6)
    assert cs(scores, context(np.zeros((1, 128)))) == 0
    empty = -6.402e-4
    assert cs(scores, context(np.zeros((1, 128))), reference_mean=True) == pytest.approx(empty, abs=1e-6)
    assert cs(scores, half, reference_mean=True) == pytest.approx((0.7399196 + empty) / 2, abs=3e-6)


@pytest.mark.slow
def test_chunks_end_with_their_document():
    scores = np.random.default_rng(3).random((1, 8, 6)) * 100
    packed = cs(scores, context([[1, 1, 1, 2, 2, 2, 2, 2]]), length=4)
    parts = [cs(scores[:, part], length=4) for part in (slice(0, 3), slice(3, 4), slice(4, 8))]
    assert packed == pytest.approx(np.mean(parts), rel=1e-5)
    whole = [cs(scores[:, part], length=4) for part in (slice(0, 4), slice(4, 8))]
    across = cs(scores, context([[1, 1, 1, 2, 2, 2, 2, 2]]), length=4, reference_mean=True)
    assert across == pytest.approx(np.mean(whole), rel=1e-5)
    assert abs(across - packed) > 1e-3


def test_chunk_loss_ignores_volume_and_the_learned_scale(called):
    logits = np.random.default_rng(4).normal(size=(1, 64, 8)) * 3
    logits[..., 0] = 1
    assert cs(scores_of(logits)) == pytest.approx(cs(scores_of(10 * logits)), rel=1e-4)
    active = np.maximum(logits, 0)
    rn = np.asarray(scores_of(logits))
    p = rn / (rn.sum(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(p, active / active.sum(-1, keepdims=True), atol=1e-5)
    _, gradient, state = called
    grads = gradient(state, X, ONES, np.array([0, 0, 1], np.float32))
    np.testing.assert_array_equal(grads["router_norm"]["scale"][...], 0)
    assert np.abs(grads["router_DE"][...]).max() > 1e-4


def test_losses_of_one_document_do_not_depend_on_another(called):
    """Row 0 holds documents 1 and 2. Changing the second changes the sums by its own part only."""
    call, _, state = called
    segments = np.array([[1] * 6 + [2] * 6])
    other = X.copy()
    other[:, 6:] = X[:, :6]
    together, exchanged = call(state, X, segments)[1].losses, call(state, other, segments)[1].losses
    first = call(state, X, np.array([[1] * 6 + [0] * 6]))[1].losses
    second = call(state, X, np.array([[0] * 6 + [2] * 6]))[1].losses
    twice = call(state, other, np.array([[0] * 6 + [2] * 6]))[1].losses
    name = "activation_locality"
    np.testing.assert_allclose(together[name], (first[name] + second[name]) / 2, rtol=1e-5)
    np.testing.assert_allclose(exchanged[name], (first[name] + twice[name]) / 2, rtol=1e-5)
    # Windows of four: document 1 has chunks of 4 and 2 tokens, so has document 2.
    name = "chunk_sparsification"
    np.testing.assert_allclose(together[name], (first[name] + second[name]) / 2, rtol=1e-5)
    np.testing.assert_allclose(exchanged[name], (first[name] + twice[name]) / 2, rtol=1e-5)


# Statistics


def stats(active, ctx=None, window=8):
    active = jnp.asarray(active, bool)
    found = activation_stats(active, ctx or one_document(active.shape[1]), window)
    return {name: float(value) for name, value in found.items()}


@pytest.mark.slow
def test_sparsity_of_tokens_and_chunks():
    active = np.random.default_rng(5).random((2, 64, 12)) < 0.1
    ctx = context(np.ones((2, 64)))
    density = {n: stats(active, ctx, n)[f"chunk_density_{n}"] for n in (1, 2, 4, 8, 16, 32, 64)}
    assert density[1] == pytest.approx(active.mean(), rel=1e-5), "a chunk of one token is the token"
    assert list(density.values()) == sorted(density.values())
    expected = active.reshape(2, 8, 8, 12).any(axis=2).mean()
    assert density[8] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "experts", "tls"), [(10, 48, 79.17), (6, 40, 85.0), (8, 48, 83.33), (10, 56, 82.14)])
def test_constant_routing(k, experts, tls):
    active = np.zeros((1, 32, experts))
    active[..., :k] = 1
    found = stats(active)
    assert round(100 * (1 - found["ffn_density"]), 2) == tls
    assert found["chunk_density_8"] == pytest.approx(found["ffn_density"])
    assert found["expert_reuse"] == 1


def test_disjoint_routing():
    active = np.repeat(np.eye(16)[None], 2, axis=-1)  # token t activates experts 2t and 2t + 1 of 32
    found = stats(active)
    assert found["chunk_density_8"] == pytest.approx(8 * 2 / 32)
    assert found["expert_reuse"] == 0


# The model


def test_model_averages_losses_over_layers(tokens):
    config = CONFIGS["blockffn"]
    out = forward(build(config))(tokens)
    assert set(out.losses) == {"activation_locality", "chunk_sparsification"}
    assert 0 < out.losses["chunk_sparsification"] < 1
    assert out.stats["ffn_density"].shape == out.stats["chunk_density_8"].shape == (config.layers,)
    assert (out.stats["chunk_density_8"] >= out.stats["ffn_density"]).all()


def test_records_agree_with_statistics(tokens):
    out = forward_recording(build(CONFIGS["blockffn"]), tokens)
    for index, (scores, gate) in enumerate(zip(out.records["expert_scores"], out.records["ffn_gate"], strict=True)):
        assert float(jnp.mean(scores != 0)) == pytest.approx(float(out.stats["ffn_density"][index]), rel=1e-5)
        assert gate.shape == (*scores.shape[:2], 48)
        np.testing.assert_array_equal(jnp.repeat(scores != 0, 6, axis=-1), gate != 0)


def forward_recording(model, tokens):
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens, record={"expert_scores", "ffn_gate"}))
    return call(state, tokens)


def test_accounting():
    ffn = BlockFFNConfig(experts=48, expert_width=64, expected_density=0.25, dense_twin_d_ff=2064)
    assert ffn.weights(768, 3072) == 4_755_504
    assert ffn.weights(768) == 768 * 48 + 48 + 2 * 768 * 768
    assert ffn.flops(768, 64) == 2 * 768 * 48 + 4 * 768 * 64
    assert ffn.dense_twin().d_ff == 2064
    assert BlockFFNConfig(experts=24, expert_width=32).dense_twin().d_ff == 520


def test_learning_rates_and_clips():
    """Multiplier d / 256 divides the rate of matrices and router scales, not of embeddings, head and norms."""
    from sparsezoo_jax.configs import preset
    from sparsezoo_jax.models.accounting import abstract_decoder
    from sparsezoo_jax.training.state import flatten

    for size, divisor in (("small", 3), ("2_8b", 8)):
        config = preset("blockffn", size)
        groups, names = config.train.groups, flatten(nnx.state(abstract_decoder(config.model), nnx.Param))
        assert isinstance(config.train, TrainConfig)
        assert isinstance(config.model, DecoderConfig)
        found = {name: groups[group_of(name, groups)] for name in names}
        full = {name for name in names if re.search(r"embedding_VD|output_DV|residual/|final_norm|_a_norm/", name)}
        assert len(full) == (7 if size == "small" else 4), full
        for name, group in found.items():
            assert group.lr_multiplier == pytest.approx(1 if name in full else 1 / divisor), name
            assert group.clip == (1.0 if name.endswith("router_DE") else None) or "router_DE" in name, name
            assert group.weight_decay == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "model.ffn.experts=0: must be above 0"),
        ({"chunk_length": 0}, "model.ffn.chunk_length=0: must be above 0"),
        ({"expected_density": 1.5}, "model.ffn.expected_density=1.5: must be in (0, 1]"),
        ({"init_std": 0.0}, "model.ffn.init_std=0.0: must be above 0 or None"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(SMALL, **change)
