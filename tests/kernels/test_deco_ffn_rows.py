"""DECO's experts for a few tokens against the form that is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.deco_ffn import NORMALISE, deco_ffn
from sparsezoo_jax.pallas_kernels.deco_ffn.rows import deco_ffn_rows
from sparsezoo_jax.pallas_kernels.rows import dequantised
from tests.kernels.few_rows import STORAGE, Draw, close, implementation, rounds

FORMS = ["xla", "native"]
E, W, D = 7, 12, 37


def inputs(draw, m, width=W):
    """Tokens, scores of which the last token's are all 0, maps, mean row and scale; factors of int8 maps."""
    (up, up_scale), (down, down_scale) = draw.weights(E * width, D), draw.weights(E * width, D)
    scores = draw.rng.uniform(0.5, 2, (m, E)) * (draw.rng.random((m, E)) < 0.4) * (np.arange(m) < m - 1)[:, None]
    # A mean that is not small against the units: it is removed from each of them.
    x = draw.tokens(m, D) + jnp.asarray(0.5, draw.tokens_dtype)
    mean_row = dequantised(up, up_scale).mean(axis=0)
    scale = jnp.asarray(draw.rng.uniform(0.5, 1.5, width), jnp.float32)
    return (x, jnp.asarray(scores, jnp.float32), up, down, mean_row, scale), (up_scale, down_scale)


def trained(arrays, scales, **form):
    x, scores, up, down, _, scale = arrays
    maps = dequantised(up, scales[0]).T, dequantised(down, scales[1])
    return deco_ffn(x.astype(jnp.float32), scores, *maps, scale, **form).astype(x.dtype)


def compiled(form, scales=(None, None), width=W, **how):
    how = {"expert_width": width, "scales": scales, "implementation": implementation(form), **how}
    return jax.jit(partial(deco_ffn_rows, **how))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGE)
def test_is_the_form_that_is_trained(request, form, storage):
    arrays, scales = inputs(Draw(storage), 4)
    y = compiled(form, scales)(*arrays)
    close(y, trained(arrays, scales, expert_width=W), rounds(request, storage))
    np.testing.assert_array_equal(y[-1], 0)


def test_prompts_are_taken_in_slices():
    """A token's result does not depend on its slice; 256 tokens are one."""
    (x, scores, *maps), _ = inputs(Draw("float32"), 300)
    form = compiled("native")
    y = form(x, scores, *maps)
    close(y, trained((x, scores, *maps), (None, None), expert_width=W))
    np.testing.assert_array_equal(y[250:266], form(x[250:266], scores[250:266], *maps))


@pytest.mark.parametrize("activation", ["no_mean", "no_rms", "silu"])
def test_parts_of_the_activation(activation):
    (*arrays, scale), scales = inputs(Draw("float32"), 2)
    arrays = (*arrays, scale if activation in NORMALISE else None)
    form = {"expert_width": W, "activation": activation}
    close(compiled("native", activation=activation)(*arrays), trained(arrays, scales, **form))


@pytest.mark.parametrize("width", [1, 70])
def test_other_widths(width):
    """Fewer units than an operation has parts, and more than a vector has places."""
    arrays, scales = inputs(Draw("bfloat16"), 2, width)
    close(compiled("native", scales, width)(*arrays), trained(arrays, scales, expert_width=width))


@pytest.mark.parametrize("form", FORMS)
def test_only_active_experts_are_read(form):
    (x, scores, up, down, *rest), _ = inputs(Draw("float32"), 3)
    scores = scores.at[:, 4].set(0)
    idle = jnp.repeat(~(scores != 0).any(axis=0), W)[:, None]
    call = compiled(form)
    poisoned = call(x, scores, jnp.where(idle, jnp.nan, up), jnp.where(idle, jnp.nan, down), *rest)
    np.testing.assert_array_equal(poisoned, call(x, scores, up, down, *rest))


@pytest.mark.parametrize("storage", STORAGE)
def test_a_row_does_not_depend_on_the_others(storage):
    (x, scores, *rest), scales = inputs(Draw(storage), 6)
    call = compiled("native", scales)
    together = call(x, scores, *rest)
    for i in range(6):
        np.testing.assert_array_equal(call(x[i : i + 1], scores[i : i + 1], *rest)[0], together[i])


def test_arguments_that_do_not_fit():
    (x, scores, up, down, mean_row, scale), _ = inputs(Draw("float32"), 2)
    call = partial(deco_ffn_rows, x, scores, up, down, mean_row)
    with pytest.raises(ConfigError, match=r"deco_ffn_rows.scale=None: must be \(12,\)"):
        call(None, expert_width=W)
    with pytest.raises(ConfigError, match=r"deco_ffn_rows.scale=\(12,\): must be None"):
        call(scale, expert_width=W, activation="silu")
    with pytest.raises(ConfigError, match=r"deco_ffn_rows.up=\(84, 37\): must be \(91, 37\)"):
        call(scale, expert_width=W + 1)
