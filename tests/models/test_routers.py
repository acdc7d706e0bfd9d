"""Routers by hand-computed numbers, and the losses that balance them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.models import routers
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import CallContext


def context(segments):
    segments = jnp.asarray(segments)
    return CallContext(jnp.zeros_like(segments), segments)


def scores(batch=2, length=40, count=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, length, count))


def one(values):
    return jnp.asarray(values, jnp.float32)[None, None]


def test_top_k_by_hand():
    routing = routers.top_k(one([1.0, 3.0, 2.0, -1.0]), 2)
    expected = np.exp([3.0, 2.0]) / np.exp([3.0, 2.0]).sum()
    np.testing.assert_allclose(routing.weights_BTE[0, 0], [0, expected[0], expected[1], 0], rtol=1e-6)
    np.testing.assert_array_equal(routing.active_BTE[0, 0], [False, True, True, False])
    np.testing.assert_array_equal(routing.experts_BTK[0, 0], [1, 2])


# Experts and k of BlockFFN's four baselines, and the token-level sparsity of its table 2, in percent.
@pytest.mark.slow
@pytest.mark.parametrize(("count", "k", "tls"), [(48, 10, 79.17), (40, 6, 85.00), (48, 8, 83.33), (56, 10, 82.14)])
@pytest.mark.parametrize("shared", [0, 2])
def test_token_level_sparsity_of_fixed_budgets(count, k, tls, shared):
    routing = routers.top_k(scores(count=count - shared), k - shared)
    active = jnp.pad(routing.active_BTE, ((0, 0), (0, 0), (shared, 0)), constant_values=True)
    density = activation_stats(active, context(jnp.ones((2, 40), jnp.int32)))["ffn_density"]
    assert round(100 * (1 - float(density)), 2) == tls


def test_biased_sigmoid_chooses_by_bias_and_weighs_without():
    s = one([0.0, 1.0, 2.0])
    plain, biased = (routers.biased_sigmoid(s, jnp.asarray(b), 2, 2.5) for b in ([0.0] * 3, [1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(plain.active_BTE[0, 0], [False, True, True])
    np.testing.assert_array_equal(biased.active_BTE[0, 0], [True, False, True])
    gates = 1 / (1 + np.exp([-0.0, -2.0]))
    np.testing.assert_allclose(biased.weights_BTE[0, 0, [0, 2]], 2.5 * gates / gates.sum(), rtol=1e-6)


def test_groups_by_a_restatement():
    """Token by token in float64: the groups of largest two best, then the best in these; weights without the bias."""
    count, groups, kept, k = 24, 6, 2, 5
    rng = np.random.default_rng(0)
    s, bias = 2 * rng.normal(size=(1, 200, count)), 0.3 * rng.normal(size=count)
    routing = routers.biased_sigmoid(jnp.asarray(s), jnp.asarray(bias), k, 2.5, groups, kept)
    plain = routers.biased_sigmoid(jnp.asarray(s), jnp.asarray(bias), k, 2.5)
    expected = np.zeros(s.shape)
    for t, token in enumerate(s[0]):
        gates = 1 / (1 + np.exp(-token))
        biased = gates + bias
        by_group = [sorted(biased[g * 4 : g * 4 + 4])[-2:] for g in range(groups)]
        best = np.argsort([sum(pair) for pair in by_group])[-kept:]
        allowed = [e for e in range(count) if e // 4 in best]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
        expected[0, t, chosen] = 2.5 * gates[chosen] / gates[chosen].sum()
    np.testing.assert_allclose(routing.weights_BTE, expected, atol=1e-6)
    assert np.mean(np.any(plain.active_BTE != routing.active_BTE, axis=-1)) > 0.5


def test_a_group_that_is_left_out_is_left_out_whatever_the_bias():
    """Scores + bias of the kept group may be negative: a masked one must not come in as a zero."""
    s = one([3.0, 3.0, -1.0, -1.0])
    routing = routers.biased_sigmoid(s, jnp.asarray([-2.0, -2.0, -3.0, -3.0]), 2, 1.0, 2, 1)
    np.testing.assert_array_equal(routing.active_BTE[0, 0], [True, True, False, False])


def test_bias_has_no_gradient_and_moves_against_the_load():
    def total(bias):
        return jnp.sum(routers.biased_sigmoid(scores(), bias, 2, 1.0).weights_BTE[..., 0])

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(8)), 0)
    moved = routers.balanced_bias(jnp.zeros((2, 3)), jnp.array([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5]]), 0.1)
    np.testing.assert_allclose(moved, [[-0.1, 0, 0.1], [0, 0, 0]], atol=1e-7)
    uneven = jnp.array([0.9, 0.1, 0.1, 0.1])  # one above the mean, three below it
    moved = routers.balanced_bias(jnp.ones(4), uneven, 0.1, zero_mean=True)
    np.testing.assert_allclose(moved, [1 - 0.15, 1.05, 1.05, 1.05], atol=1e-7)


def test_loss_free_bias_evens_out_the_loads():
    ctx = context(jnp.ones((2, 40), jnp.int32))
    s = scores() + jnp.arange(8) / 2  # later experts are preferred

    @jax.jit
    def step(bias):
        load = routers.loads(routers.biased_sigmoid(s, bias, 2, 1.0).active_BTE, ctx)
        return routers.balanced_bias(bias, load, 0.01), load.max() / load.mean()

    bias, first = step(jnp.zeros(8))
    for _ in range(60):
        bias, last = step(bias)
    assert first > 2
    assert last < 1.3


def test_relu_takes_what_is_positive():
    routing = routers.relu(one([0.5, -0.5, 0.0, 2.0]))
    np.testing.assert_array_equal(routing.weights_BTE[0, 0], [0.5, 0, 0, 2.0])
    np.testing.assert_array_equal(routing.active_BTE[0, 0], [True, False, False, True])


@pytest.mark.parametrize(
    ("p", "kept"), [(0.1, [2]), (0.45, [2]), (0.55, [2, 0]), (0.85, [2, 0, 3]), (0.999, [2, 0, 3, 1])]
)
def test_top_p_keeps_the_expert_that_crosses(p, kept):
    q = np.array([0.3, 0.1, 0.5, 0.1 + 1e-3])
    q /= q.sum()
    routing = routers.top_p(one(np.log(q)), p)
    assert set(np.flatnonzero(routing.active_BTE[0, 0])) == set(kept)
    np.testing.assert_allclose(routing.weights_BTE[0, 0, np.array(kept)], q[kept] / q[kept].sum(), rtol=1e-5)
    np.testing.assert_allclose(routing.weights_BTE.sum(), 1, rtol=1e-6)


def test_sparse_mixer_golden():
    s = one([1.0, 0.95, -1.0])
    pi = np.exp([1.0, 0.95]) / np.exp([1.0, 0.95]).sum()
    assert pi.round(4).tolist() == [0.5125, 0.4875]
    weight, grad = jax.value_and_grad(lambda s: routers.sparse_mixer(s, 1, 0.1, None).weights_BTE.sum())(s)
    np.testing.assert_allclose(weight, pi[0], rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], [0.2498, -0.2498, 0], atol=5e-5)


@pytest.mark.slow
def test_sparse_mixer_rounds_are_without_replacement_and_not_renormalised():
    routing = routers.sparse_mixer(one([4.0, 1.0, 2.0, -3.0]), 3, 0.1, None)
    np.testing.assert_array_equal(routing.experts_BTK[0, 0], [0, 2, 1])
    np.testing.assert_allclose(routing.weights_BTK[0, 0], 1.0, rtol=1e-6)
    everything = routers.sparse_mixer(scores(count=5), 5, 0.1, jax.random.key(1))
    assert everything.active_BTE.all()


def test_sparse_mixer_samples_in_proportion_and_halves_by_heuns_rule():
    s = jnp.broadcast_to(one([1.0, 0.95, -1.0]), (1, 20_000, 3))
    draw = jax.jit(lambda s: routers.sparse_mixer(s, 1, 0.1, jax.random.key(0)))
    routing = draw(s)
    share = routing.active_BTE.mean(axis=(0, 1))
    np.testing.assert_allclose(share, [0.5125, 0.4875, 0], atol=0.015)  # four standard errors
    second = np.asarray(routing.weights_BTK[routing.experts_BTK == 1])
    np.testing.assert_allclose(np.unique(second.round(5)), [0.4875 / 3, 0.4875], atol=1e-4)
    np.testing.assert_allclose((second > 0.4).mean(), 0.25, atol=0.02)
    # The gradient is the whole weight's, whether or not it was cut to a third.
    grad = jax.grad(lambda s: draw(s).weights_BTE.sum())(s)[0]
    cut = np.asarray(routing.experts_BTK[0, :, 0]) == 1
    np.testing.assert_allclose(grad[cut], np.broadcast_to([-0.2498, 0.2498, 0], grad[cut].shape), atol=5e-5)


def test_sparse_mixer_draws_every_round_anew():
    s = np.array([1.0, 0.98, 0.96, 0.94])
    routing = jax.jit(lambda s: routers.sparse_mixer(s, 2, 0.1, jax.random.key(0)))(
        jnp.broadcast_to(one(s), (1, 20_000, 4))
    )
    p = np.exp(s) / np.exp(s).sum()
    (first, second), weights = np.asarray(routing.experts_BTK[0]).T, np.asarray(routing.weights_BTK[0]).T
    whole = np.stack([weights[0] / p[first], weights[1] / (p[second] / (1 - p[first]))]) > 0.9
    # Neither round took its best expert, 0: each weight is whole with probability 1/4, whatever the other's is.
    sampled = (first != 0) & (second != 0)
    assert sampled.mean() > 0.3
    np.testing.assert_allclose(whole[:, sampled].mean(axis=1), 1 / 4, atol=0.02)
    np.testing.assert_allclose(whole[:, sampled].all(axis=0).mean(), 1 / 16, atol=0.015)


def test_sparse_mixer_is_finite_at_zero_and_negative_scores():
    for values in ([0.0, 0.0, 0.0], [-1.0, -1.05, -9.0], [0.0, -1e-30, 5e-39]):
        routing, grad = jax.value_and_grad(lambda s: routers.sparse_mixer(s, 2, 0.1, None).weights_BTE.sum())(
            one(values)
        )
        assert np.isfinite(routing)
        assert jnp.isfinite(grad).all()


def test_balance_loss_is_one_for_even_routing_and_e_for_collapse():
    ctx = context(jnp.ones((1, 4), jnp.int32))
    even = routers.Routing(jnp.eye(4)[None], jnp.eye(4, dtype=bool)[None], jnp.full((1, 4, 4), 0.25))
    np.testing.assert_allclose(routers.balance_loss(even, ctx), 1)
    lone = jnp.broadcast_to(jnp.eye(4)[0], (1, 4, 4))
    np.testing.assert_allclose(routers.balance_loss(routers.Routing(lone, lone > 0, lone), ctx), 4)


def test_z_loss_by_the_formula():
    s = scores(1, 10, 6)
    expected = np.mean(np.log(np.exp(np.asarray(s, np.float64)).sum(-1)) ** 2)
    np.testing.assert_allclose(routers.z_loss(s, context(jnp.ones((1, 10), jnp.int32))), expected, rtol=1e-6)


def test_l1_loss_by_the_formula():
    length, count, k = 10, 6, 2
    routing = routers.relu(scores(1, length, count))
    weights = np.asarray(routing.weights_BTE[0], np.float64)
    expected = count / (length**2 * k) * (weights.sum(axis=0) * (weights > 0).sum(axis=0)).sum()
    ctx = context(jnp.ones((1, length), jnp.int32))
    np.testing.assert_allclose(routers.l1_balance_loss(routing, ctx, k), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        lambda s, ctx: routers.balance_loss(routers.top_k(s, 3), ctx),
        lambda s, ctx: routers.l1_balance_loss(routers.relu(s), ctx, 3),
        lambda s, ctx: routers.entropy_loss(routers.top_p(s, 0.4), ctx),
        routers.z_loss,
        lambda s, ctx: routers.loads(s > 0, ctx).max(),
    ],
)
def test_padding_does_not_count(loss):
    s = scores(1, 12)
    padded = context(jnp.array([[1] * 5 + [2] * 4 + [0] * 3]))
    alone = loss(s[:, :9], context(jnp.ones((1, 9), jnp.int32)))
    np.testing.assert_allclose(loss(s, padded), alone, rtol=1e-6)
    np.testing.assert_allclose(loss(s.at[:, 9:].set(100.0), padded), alone, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(s, padded)[:, 9:], 0)
