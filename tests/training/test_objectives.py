import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from sparsezoo_jax.compilation.flops import matmul_flops
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation.cross_entropy import chunked_token_loss, objective, token_loss
from sparsezoo_jax.training.objectives import (
    AdaptiveFactor,
    FixedObjective,
    SineProgressive,
    check_objectives,
)


def test_token_loss_matches_a_float64_reference():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 7)) * 5, rng.integers(0, 7, (2, 5))
    mask = rng.random((2, 5)) < 0.6
    found = token_loss(jnp.float32(logits), jnp.int32(targets), jnp.array(mask))
    cross_entropy = -np.take_along_axis(log_softmax(logits, -1), targets[..., None], -1)[..., 0]
    log_z = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(found.cross_entropy_sum, cross_entropy[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(found.z_sum, (log_z[mask] ** 2).sum(), rtol=1e-5)
    assert found.count == mask.sum()


@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_the_loss_in_chunks_is_that_of_all_logits(chunk):
    """Under a mask with a chunk of no targets, with logits that are not finite where there are none."""
    rng = np.random.default_rng(0)
    hidden = jnp.float32(rng.normal(size=(2, 12, 5))).at[0, 4].set(jnp.nan)
    weight = jnp.float32(rng.normal(size=(5, 7)))
    targets = jnp.int32(rng.integers(0, 7, (2, 12)))
    mask = jnp.asarray(rng.random((2, 12)) < 0.6).at[:, 4].set(False).at[:, 0].set(True).at[:, ::4].set(False)

    def whole(hidden, weight):
        sums = token_loss(hidden @ weight, targets, mask)
        return objective(sums, 0.1), sums

    def chunked(hidden, weight):
        return chunked_token_loss(lambda h: h @ weight, hidden, targets, mask, chunk, z_loss=0.1)

    def all_of(loss):
        def weighed(*arrays):
            value, sums = loss(*arrays)
            return 3 * value, (value, sums)

        without = jax.jit(weighed)(hidden, weight)
        return without, jax.jit(jax.grad(weighed, argnums=(0, 1), has_aux=True))(hidden, weight)

    for ours, theirs in zip(jax.tree.leaves(all_of(chunked)), jax.tree.leaves(all_of(whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gradient_in_chunks_makes_no_logits_twice():
    """Three products a chunk: logits, and the gradients of states and weights."""
    hidden, weight, targets = jnp.ones((2, 12, 5)), jnp.ones((5, 7)), jnp.zeros((2, 12), int)

    def loss(hidden, weight):
        return chunked_token_loss(lambda h: h @ weight, hidden, targets, targets == 0, 3)[0]

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, weight).jaxpr
    assert matmul_flops(traced, "cpu") == 3 * 2 * (2 * 12) * 5 * 7


@pytest.mark.slow
def test_masked_positions_can_hold_anything():
    logits = jnp.array([[[1.0, 2.0], [jnp.nan, jnp.inf]]])
    targets, mask = jnp.array([[0, -100]]), jnp.array([[True, False]])

    def loss(logits):
        return token_loss(logits, targets, mask).cross_entropy_sum

    value, gradient = jax.value_and_grad(loss)(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
    assert (gradient[0, 1] == 0).all()
    assert token_loss(logits, targets, jnp.array([[True, True]])).count == 2


def test_bfloat16_logits_are_summed_in_float32():
    # 300 tokens of the same loss: a bfloat16 sum would stick at multiples of 2.
    logits = jnp.zeros((1, 300, 3), jnp.bfloat16)
    found = token_loss(logits, jnp.zeros((1, 300), int), jnp.ones((1, 300), bool))
    np.testing.assert_allclose(found.cross_entropy_sum, 300 * np.log(3), rtol=1e-5)


def test_fixed_objective():
    objective = FixedObjective(loss="balance", weight=0.25)
    assert objective.coefficient(objective.init(), jnp.int32(7)) == 0.25


def test_fixed_objective_rises_along_a_line():
    objective = FixedObjective(loss="l1", weight=0.5, warmup_start=10, warmup_end=20)
    found = [float(objective.coefficient({}, jnp.int32(step))) for step in (0, 10, 11, 15, 20, 1000)]
    np.testing.assert_allclose(found, [0, 0, 0.05, 0.25, 0.5, 0.5], rtol=1e-6)
    for start, end in ((5, 5), (3, 0), (7, 6)):
        with pytest.raises(ConfigError, match=f"warmup_end={end}: must be above train.objectives.warmup_start={start}"):
            FixedObjective(loss="l1", weight=1, warmup_start=start, warmup_end=end)


def test_sine_progressive_follows_the_formula():
    peaks, steps = (0.1, 0.5, 0.4, 2.0), (10, 30, 40, 100)
    objective = SineProgressive(loss="l1", peaks=peaks, steps=steps)

    def expected(t):
        if t <= steps[0]:
            return peaks[0]
        for i in range(1, 4):
            if t <= steps[i]:
                eta = 0.5 * (np.sin(-np.pi / 2 + np.pi * (t - steps[i - 1]) / (steps[i] - steps[i - 1])) + 1)
                return peaks[i - 1] + eta * (peaks[i] - peaks[i - 1])
        return peaks[-1]

    at = range(0, 130)
    found = [float(objective.coefficient(objective.init(), jnp.int32(t))) for t in at]
    np.testing.assert_allclose(found, [expected(t) for t in at], rtol=1e-5)


def test_adaptive_factor_follows_the_reference_trace():
    objective = AdaptiveFactor(loss="cs", weight=0.05)
    number = np.arange(1, 2001)
    losses = np.select(
        [number <= 1000, number <= 1100, number <= 1200, number <= 1300], [0.5, 0.4, 0.44, 0.441], 3.528
    ).astype(np.float32)

    def body(state, inputs):
        step, loss = inputs
        coefficient = objective.coefficient(state, step)
        return objective.update(state, {"losses/cs": loss}, step), coefficient

    _, found = jax.lax.scan(body, objective.init(), (jnp.arange(2000), losses))
    trace = {
        1: 0.05,
        1000: 0.05,
        1100: 0.05,
        1101: 0.0499,
        1150: 0.045,
        1200: 0.04,
        1201: 0.04004,
        1300: 0.044,
        1301: 0.044011,
        1400: 0.0451,
        1401: 0.046649,
        1500: 0.2,
        1501: 0.2,
        2000: 0.2,
    }
    np.testing.assert_allclose([found[n - 1] for n in trace], list(trace.values()), rtol=1e-4)


def test_adaptive_factor_keeps_to_its_own_bounds():
    """The loss doubles once, then goes on rising by a hundredth at a time."""
    objective = AdaptiveFactor(loss="cs", weight=0.5, start=2, interval=1, min_factor=1.2, max_ratio=3.0)
    state, found = objective.init(), []
    for step, loss in enumerate([1.0, 1.0, 2.0, 2.02, 2.04, 2.06, 2.08]):
        found.append(float(objective.coefficient(state, jnp.int32(step))))
        state = objective.update(state, {"losses/cs": jnp.float32(loss)}, jnp.int32(step))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5, 1.0, 1.2, 1.44, 1.5], rtol=1e-6)


def test_adaptive_factor_survives_a_loss_of_zero():
    objective = AdaptiveFactor(loss="cs", weight=0.05, start=4, interval=2)
    state = objective.init()
    for step in range(20):
        state = objective.update(state, {"losses/cs": jnp.float32(0)}, jnp.int32(step))
        assert objective.coefficient(state, jnp.int32(step)) == jnp.float32(0.05)


def test_an_unknown_loss_lists_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"train\.objectives\.loss=balanse: the model's auxiliary losses are: a, balance"
    ):
        check_objectives((FixedObjective(loss="balanse", weight=1),), ["balance", "a"], [])
    check_objectives((FixedObjective(loss="a", weight=1),), ["balance", "a"], [])
