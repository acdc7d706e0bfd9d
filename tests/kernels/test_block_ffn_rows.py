"""BlockFFN's experts for a few tokens against their definition, and against the form that is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import block_ffn, block_ffn_rows
from sparsezoo_jax.pallas_kernels.block_ffn import rows_gpu
from sparsezoo_jax.pallas_kernels.block_ffn.rows import reference
from sparsezoo_jax.pallas_kernels.triton import times_weights
from tests.covering import pairs
from tests.kernels.few_rows import STORAGE, Draw, close, compiled, implementation, rounds


@pytest.fixture(params=["xla", "native", "pallas_gpu_interpret", "pallas_tpu_interpret"])
def apply(request):
    return compiled(block_ffn_rows, implementation(request.param))


definition = jax.jit(reference, static_argnames="activation")


def layer(draw, experts, width, d, gated):
    (up, up_scale), (down, down_scale), (gate, gate_scale) = (draw.weights(experts, width, d) for _ in range(3))
    return ((up, down, gate), (up_scale, down_scale, gate_scale)) if gated else (
        (up, down, None), (up_scale, down_scale, None)
    )  # fmt: skip


def scores_of(draw, m, experts, density):
    """Scores of different experts for each token; the last token has none."""
    scores = draw.rng.uniform(0.5, 2.0, (m, experts)) * (draw.rng.random((m, experts)) < density)
    scores[-1] = 0
    return jnp.asarray(scores, draw.tokens_dtype)


# Of every implementation, any two of these.
@pytest.mark.slow
@pytest.mark.parametrize(("storage", "gated", "m", "density"), pairs(STORAGE, [False, True], [1, 3, 8], [0.3, 1.0]))
def test_is_the_definition(request, apply, storage, gated, m, density):
    draw = Draw(storage)
    x, scores = draw.tokens(m + 1, 37), scores_of(draw, m + 1, 7, density)
    weights, scales = layer(draw, 7, 5, 37, gated)
    y = apply(x, scores, *weights, scales=scales)
    close(y, definition(x, scores, *weights, scales=scales)[0], rounds(request, storage))
    np.testing.assert_array_equal(y[-1], 0)


def test_prompts_are_taken_in_slices():
    """A token's result does not depend on its slice; 256 tokens are one."""
    draw = Draw("float32")
    x, scores = draw.tokens(300, 20), scores_of(draw, 300, 6, 0.3)
    weights, _ = layer(draw, 6, 5, 20, gated=True)
    form = compiled(block_ffn_rows, implementation("native"))
    y, active = form(x, scores, *weights, return_active=True)
    close(y, definition(x, scores, *weights)[0])
    alone, counted = form(x[250:266], scores[250:266], *weights, return_active=True)
    np.testing.assert_array_equal(y[250:266], alone)
    np.testing.assert_array_equal(active[250:266], counted)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "width", "d"), [(1, 1, 1), (3, 40, 16), (70, 2, 9)])
def test_odd_sizes(apply, experts, width, d):
    draw = Draw("bfloat16")
    x, scores = draw.tokens(2, d), scores_of(draw, 2, experts, 0.5).at[0, 0].set(1.0)
    weights, _ = layer(draw, experts, width, d, gated=True)
    close(apply(x, scores, *weights), definition(x, scores, *weights)[0])


@pytest.mark.slow
def test_is_the_form_that_is_trained(apply):
    draw = Draw("float32")
    x, scores = draw.tokens(3, 12), scores_of(draw, 3, 6, 0.5)
    (up, down, gate), _ = layer(draw, 6, 4, 12, gated=True)
    columns = [w.reshape(24, 12).T for w in (up, gate)]
    expected = block_ffn(x, scores, columns[0], down.reshape(24, 12), columns[1], expert_width=4)
    close(apply(x, scores, up, down, gate), expected)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu_tanh"])
def test_other_activations_and_their_active_units(apply, activation):
    draw = Draw("float32")
    x, scores = draw.tokens(4, 20), scores_of(draw, 4, 6, 0.5)
    weights, _ = layer(draw, 6, 40, 20, gated=False)
    y, active = apply(x, scores, *weights, activation=activation, return_active=True)
    expected, units = definition(x, scores, *weights, activation=activation)
    close(y, expected)
    if activation != "gelu_tanh":  # far below 0 it may or may not be rounded to 0
        np.testing.assert_array_equal(active, units)
        assert (active[:-1] < 40 * jnp.sum(scores != 0, axis=-1)[:-1]).all()


@pytest.mark.parametrize("form", ["native", "pallas_gpu_interpret"])
def test_rows_of_units_that_are_zero_are_not_read(form):
    draw = Draw("float32")
    x = jnp.abs(draw.tokens(3, 12))
    scores = jnp.ones((3, 4))
    (up, down, _), _ = layer(draw, 4, 33, 12, gated=False)
    idle = draw.rng.random((4, 33, 1)) < 0.6
    up = jnp.where(idle, -jnp.abs(up), up)
    call = jax.jit(partial(block_ffn_rows, activation="relu", implementation=implementation(form)))
    poisoned = call(x, scores, up, jnp.where(idle, jnp.nan, down))
    np.testing.assert_array_equal(poisoned, call(x, scores, up, down))
    close(poisoned, definition(x, scores, up, down, activation="relu")[0])


@pytest.mark.parametrize("form", ["xla", "native", "pallas_gpu_interpret"])  # a TPU's tiles: test_weighted_rows
@pytest.mark.parametrize("gated", [False, True])
def test_only_active_experts_are_read(form, gated, monkeypatch):
    def spread(values, weights, **options):
        return jnp.where(jnp.isnan(weights).any(), jnp.nan, times_weights(values, weights, **options))

    # The kernel for GPUs leaves out hidden units of inactive experts even if it has read them.
    monkeypatch.setattr(rows_gpu, "times_weights", spread)
    draw = Draw("float32")
    x, scores = draw.tokens(3, 12), scores_of(draw, 3, 9, 0.3).at[:, 4].set(0.0)
    weights, _ = layer(draw, 9, 4, 12, gated)
    inactive = ~(scores != 0).any(axis=0)
    assert inactive[4]
    poisoned = [None if w is None else jnp.where(inactive[:, None, None], jnp.nan, w) for w in weights]
    call = jax.jit(partial(block_ffn_rows, implementation=implementation(form)))
    np.testing.assert_array_equal(call(x, scores, *poisoned), call(x, scores, *weights))


@pytest.mark.parametrize(("storage", "activation"), [*((each, "silu") for each in STORAGE), ("int8", "relu")])
def test_a_row_does_not_depend_on_the_others(storage, activation):
    draw = Draw(storage)
    x, scores = draw.tokens(9, 50), scores_of(draw, 9, 11, 0.4)
    weights, scales = layer(draw, 11, 70, 50, gated=False)
    form = partial(block_ffn_rows, scales=scales, activation=activation, implementation=implementation("native"))
    apply = jax.jit(form)
    together = apply(x, scores, *weights)
    for i in range(9):
        np.testing.assert_array_equal(apply(x[i : i + 1], scores[i : i + 1], *weights)[0], together[i])


@pytest.mark.slow
def test_not_a_number_stays_in_its_row(apply):
    draw = Draw("float32")
    x, scores = draw.tokens(4, 12), scores_of(draw, 4, 6, 1.0)
    x, scores = x.at[1, 3].set(jnp.nan), scores.at[2, 0].set(jnp.nan)
    weights, _ = layer(draw, 6, 4, 12, gated=False)
    close(apply(x, scores, *weights), definition(x, scores, *weights)[0])


@pytest.mark.slow
def test_a_token_without_experts_gets_nothing_of_its_numbers(apply):
    draw = Draw("float32")
    x, scores = draw.tokens(4, 12).at[-1, ::2].set(jnp.inf), scores_of(draw, 4, 6, 0.5)
    weights, _ = layer(draw, 6, 20, 12, gated=True)
    y, active = apply(x, scores, *weights, activation="relu", return_active=True)
    expected, units = definition(x[:-1], scores[:-1], *weights, activation="relu")
    close(y[:-1], expected)
    np.testing.assert_array_equal(y[-1], 0)
    np.testing.assert_array_equal(active, [*units, 0])


def test_weights_of_different_types(apply):
    draw = Draw("float32")
    x, scores = draw.tokens(3, 12), scores_of(draw, 3, 6, 0.5)
    types = enumerate(("int8", "float32", "bfloat16"))
    (up, up_scale), (down, _), (gate, _) = (Draw(name, seed).weights(6, 5, 12) for seed, name in types)
    y = apply(x, scores, up, down, gate, scales=(up_scale, None, None))
    expected, _ = definition(x, scores, up, down, gate, scales=(up_scale, None, None))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("m", [16, 17])
def test_most_tokens_of_the_kernel(m):
    draw = Draw("float32")
    x, scores = draw.tokens(m, 12), scores_of(draw, m, 6, 0.5)
    weights, _ = layer(draw, 6, 4, 12, gated=False)
    call = partial(block_ffn_rows, x, scores, *weights, implementation="pallas_gpu_interpret")
    if m == 16:
        close(call(), definition(x, scores, *weights)[0])
        with pytest.raises(ConfigError, match='has no error function for gelu; use "xla"'):
            call(activation="gelu")
    else:
        with pytest.raises(ConfigError, match='takes up to 16 tokens, not 17; use "xla"'):
            call()


def test_bad_input():
    x, scores, up = jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((4, 5, 3))
    with pytest.raises(ConfigError, match=r"block_ffn_rows.down=\(4, 3, 5\): must be \(4, 5, 3\)"):
        block_ffn_rows(x, scores, up, up.swapaxes(1, 2))
    with pytest.raises(ConfigError, match=r"block_ffn_rows.scores=\(2, 3\): must be \(2, 4\)"):
        block_ffn_rows(x, scores[:, 1:], up, up)
