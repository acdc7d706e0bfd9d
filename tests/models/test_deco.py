"""DECO's layer, loss and presets against numbers worked out from the released code, and against its formulas.

In float64 where numbers are compared closely; the entropy's mean is float32 whatever the rest is.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder, activated_parameters, count_parameters, dense_twin
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.deco import DECOConfig, router_entropy
from sparsezoo_jax.pallas_kernels.deco_ffn import deco_ffn
from sparsezoo_jax.pallas_kernels.deco_ffn.rows import deco_ffn_rows
from sparsezoo_jax.training.optimizers import is_matrix
from sparsezoo_jax.training.state import ModelTemplate, flatten, map_with_path
from tests.models.conftest import CONFIGS


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


in_float64 = pytest.mark.usefixtures("float64")


def one_document(tokens: int) -> CallContext:
    ones = jnp.ones((1, tokens), jnp.int32)
    return CallContext(jnp.zeros_like(ones), ones)


def layer(d_model=6, **changes):
    """A layer of two of which the first is dense."""
    config = DECOConfig(**{"experts": 4, "expert_width": 3, "shared_width": 4, **changes})
    f64 = jnp.dtype("float64")
    return config.build(BuildContext(d_model, 2, InitConfig(), f64, f64, first_layers=1), nnx.Rngs(0))


# Golden numbers: the released layer and regulariser, executed in float64 on this example.


def fill(shape, start, scale):
    return scale * np.sin(start + 1.3 * np.arange(np.prod(shape))).reshape(shape)


X, COTANGENT, COEFFICIENT = fill((5, 6), 0.1, 1), fill((5, 6), 1, 1), 0.3
PARAMETERS = {
    "router_DE": fill((4, 6), 0.2, 0.5).T,
    "router_scale_E": 0.1 + fill((4,), 0.3, 0.05),
    "expert_up_DF": fill((12, 6), 0.4, 0.6).T,
    "norm_scale_W": 1 + fill((3,), 0.5, 0.1),
    "expert_down_FD": fill((6, 12), 0.6, 0.7).T,
    "shared/gate_DF": fill((4, 6), 0.7, 0.5).T,
    "shared/up_DF": fill((4, 6), 0.8, 0.5).T,
    "shared/down_FD": fill((6, 4), 0.9, 0.5).T,
}


def filled(parameters, **changes):
    """Structure and state of a layer with these parameters by path."""
    graphdef, state = nnx.split(layer(**changes))
    return graphdef, map_with_path(lambda path, leaf: jnp.asarray(parameters[path]), nnx.to_pure_dict(state))


@pytest.fixture(scope="module")
def golden():
    """Of the example: value, output, auxiliary results, gradients; the compiled function; the layer."""
    with jax.enable_x64(True):
        graphdef, state = filled(PARAMETERS)

        def loss(state, x):
            y, aux = nnx.merge(graphdef, nnx.State(state))(x[None], one_document(5))
            return jnp.sum(y[0] * COTANGENT) + COEFFICIENT * aux.losses["router_entropy"], (y[0], aux)

        call = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, (y, aux)), grads = call(state, X)
        return value, y, aux, {**flatten(grads[0]), "x": grads[1]}, call, (graphdef, state)


def summary(array):
    """Sum, sum of squares, first and last number in C order."""
    return [float(array.sum()), float(np.square(array).sum()), float(array.ravel()[0]), float(array.ravel()[-1])]


@in_float64
def test_golden_output_and_loss(golden):
    value, y, aux, *_, (graphdef, state) = golden
    np.testing.assert_allclose(value, 2.44862536, atol=1e-6)
    # The mean over all layers, the dense one included: half of the entropy of the one layer that has it.
    np.testing.assert_allclose(2 * aux.losses["router_entropy"], 0.350132515, atol=1e-6)
    assert aux.stats["routed_density"] == aux.stats["ffn_density"] == 0.5
    np.testing.assert_allclose(
        y[0], [0.310942655, 0.0107996051, -0.199507868, -0.257973348, -0.0237818631, 0.259252101], atol=1e-8
    )
    np.testing.assert_allclose(summary(y), [0.103530429, 4.79079538, 0.310942655, 0.0221351397], atol=1e-8)
    made = nnx.merge(graphdef, nnx.State(state))
    scores = made.route(jnp.asarray(X)[None])[1][0]
    np.testing.assert_allclose(scores[0], [0.145451654, 0.00699962668, 0, 0], atol=1e-9)
    routed = y - made.shared(jnp.asarray(X)[None], one_document(5))[0][0]
    np.testing.assert_allclose(summary(routed), [0.106354895, 0.280496427, 0.0482747437, 0.0274559186], atol=1e-8)


GRADIENTS = {
    "x": [0.865310432, 16.8594596, 1.04999685, 0.960673577],
    "router_DE": [0.212124258, 0.107758822, 0.113985156, 0.027942993],
    "router_scale_E": [1.49790206, 1.95739199, 0.77318262, -0.635042568],
    "expert_up_DF": [0, 0.0129582255, -0.00453959231, 0.00530031002],
    "norm_scale_W": [0.202048572, 0.0145437622, 0.0882911354, 0.0686698268],
    "expert_down_FD": [0.145081782, 0.558039827, 0.225456444, -0.047669864],
    "shared/down_FD": [0.812080836, 14.2352474, 1.21895057, -0.2337228],
}


@in_float64
def test_golden_gradients(golden):
    grads = golden[3]
    for name, expected in GRADIENTS.items():
        # Tables give [outputs, inputs].
        np.testing.assert_allclose(
            summary(np.asarray(grads[name]).T if name != "x" else grads[name]), expected, atol=1e-6, err_msg=name
        )
    both = np.concatenate([grads["shared/gate_DF"].T, grads["shared/up_DF"].T])
    np.testing.assert_allclose(summary(both), [-2.42592379, 40.9520373, 1.25273898, -0.470689849], atol=1e-6)
    up = np.asarray(grads["expert_up_DF"]).T.reshape(4, -1)
    np.testing.assert_allclose(np.linalg.norm(up, axis=1), [0.0420875, 0.0912817, 0.0474788, 0.0245008], atol=1e-7)


# The layer by its formulas


E, W, D, N = 6, 4, 10, 7
RNG = np.random.default_rng(0)
ROUTED = {
    "up": RNG.normal(size=(D, E * W)),
    "down": RNG.normal(size=(E * W, D)),
    "scale": 1 + 0.1 * RNG.normal(size=W),
}
TOKENS = RNG.normal(size=(N, D))
# Expert 4 is active on no token, and the last token activates no expert.
SCORES = np.maximum(RNG.normal(size=(N, E)), 0) * (np.arange(E) != 4)
SCORES[-1] = 0


@jax.jit
def routed(x, scores, weights):
    return deco_ffn(x, scores, **weights, expert_width=W)


def by_active_experts(x, scores, up, down, scale, dy):
    """Output and gradients by rows of active experts, and of the mean over all rows, only (arXiv 2605.10933).

    What the mean's gradient adds to the rows of all experts, active or not, is one and the same vector.
    """
    rows, out = up.T.reshape(E, W, D), down.reshape(E, W, D)
    mean_row = up.T.mean(axis=0)
    y, grads = (
        np.zeros_like(x),
        {name: np.zeros_like(a) for name, a in (("x", x), ("scores", scores), ("scale", scale))},
    )
    d_rows, d_out, shift = np.zeros_like(rows), np.zeros_like(out), np.zeros(D)
    for t, token in enumerate(x):
        total = 0.0
        for e in np.flatnonzero(scores[t]):
            c = rows[e] @ token - token @ mean_row
            inverse = 1 / np.sqrt(np.mean(c**2) + 1e-5)
            n = c * inverse * scale
            s = 1 / (1 + np.exp(-n))
            hidden = n * s
            y[t] += scores[t, e] * hidden @ out[e]
            d_hidden = out[e] @ dy[t]
            d_out[e] += scores[t, e] * np.outer(hidden, dy[t])
            grads["scores"][t, e] = hidden @ d_hidden
            d_n = scores[t, e] * d_hidden * (s + n * s * (1 - s))
            grads["scale"] += d_n * c * inverse
            d_unit = d_n * scale
            d_c = inverse * (d_unit - c * inverse**2 * np.mean(d_unit * c))
            d_rows[e] += np.outer(d_c, token)
            grads["x"][t] += d_c @ rows[e]
            total += d_c.sum()
        grads["x"][t] -= total * mean_row
        shift -= total / (E * W) * token
    grads["up"] = (d_rows + shift).reshape(-1, D).T
    grads["down"] = d_out.reshape(-1, D)
    return y, grads, shift


@in_float64
def test_active_experts_alone_give_the_same_numbers_and_gradients():
    dy = np.random.default_rng(1).normal(size=(N, D))
    expected, grads, shift = by_active_experts(TOKENS, SCORES, **ROUTED, dy=dy)
    y, pull = jax.vjp(routed, TOKENS, SCORES, ROUTED)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_array_equal(y[-1], 0)
    dx, d_scores, d_weights = pull(dy)
    for name, found in {"x": dx, **d_weights}.items():
        np.testing.assert_allclose(found, grads[name], atol=1e-12, err_msg=name)
    # Inactive experts have a gradient of their score too, which ReLU stops.
    np.testing.assert_allclose(d_scores * (SCORES > 0), grads["scores"], atol=1e-12)
    np.testing.assert_allclose(d_weights["up"].sum(axis=1), 0, atol=1e-12)
    unused = slice(4 * W, 5 * W)
    np.testing.assert_allclose(d_weights["up"][:, unused], np.tile(shift[:, None], W), atol=1e-12)
    np.testing.assert_array_equal(d_weights["down"][unused], 0)
    assert np.abs(shift).max() > 1e-3


@in_float64
def test_the_units_do_not_know_the_mean_and_the_size_of_rows():
    y = routed(TOKENS, SCORES, ROUTED)
    shifted = {**ROUTED, "up": ROUTED["up"] + np.linspace(-3, 3, D)[:, None]}
    np.testing.assert_allclose(routed(TOKENS, SCORES, shifted), y, atol=1e-11)
    scaled = {**ROUTED, "up": 50 * ROUTED["up"]}
    change = np.abs(routed(TOKENS, SCORES, scaled) - y).max()
    assert 0 < change < 1e-3, "by eps alone"


@in_float64
def test_permuting_experts_changes_nothing():
    order = np.random.default_rng(2).permutation(E)
    neurons = (order[:, None] * W + np.arange(W)).reshape(-1)
    other = {"up": ROUTED["up"][:, neurons], "down": ROUTED["down"][neurons], "scale": ROUTED["scale"]}
    y = routed(TOKENS, SCORES, ROUTED)
    np.testing.assert_allclose(routed(TOKENS, SCORES[:, order], other), y, atol=1e-12)


@in_float64
def test_parts_of_the_activation():
    def by_hand(activation):
        v = TOKENS @ ROUTED["up"]
        c = (v - v.mean(-1, keepdims=True) if activation in ("norm_silu", "no_rms") else v).reshape(N, E, W)
        if activation in ("norm_silu", "no_mean"):
            c = c / np.sqrt(np.mean(c**2, -1, keepdims=True) + 1e-5) * ROUTED["scale"]
        return (c / (1 + np.exp(-c)) * SCORES[..., None]).reshape(N, -1) @ ROUTED["down"]

    for activation in ("norm_silu", "no_mean", "no_rms", "silu"):
        scale = ROUTED["scale"] if activation in ("norm_silu", "no_mean") else None
        weights = {**ROUTED, "scale": scale}
        y = deco_ffn(TOKENS, SCORES, **weights, expert_width=W, activation=activation)
        np.testing.assert_allclose(y, by_hand(activation), atol=1e-12, err_msg=activation)


@in_float64
@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_rows_of_active_experts_are_enough(implementation):
    """What decoding computes; rows of experts that no token takes are not even numbers."""
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in ROUTED.items()}
    up, down = arrays["up"].T, arrays["down"]
    unused = np.repeat(np.arange(E) == 4, W)[:, None]
    x, scores = jnp.asarray(TOKENS, jnp.float32), jnp.asarray(SCORES, jnp.float32)
    read = {"up": jnp.where(unused, jnp.nan, up), "down": jnp.where(unused, jnp.nan, down)}
    y = deco_ffn_rows(
        x,
        scores,
        **read,
        mean_row=up.mean(axis=0),
        scale=arrays["scale"],
        expert_width=W,
        implementation=implementation,
    )
    np.testing.assert_allclose(y, routed(TOKENS, SCORES, ROUTED), atol=1e-4)


@in_float64
def test_no_active_expert_leaves_the_shared_one(golden):
    *_, call, (graphdef, state) = golden
    off = {**state, "router_DE": -jnp.abs(state["router_DE"])}
    (_, (y, aux)), grads = call(off, np.abs(X))
    shared = nnx.merge(graphdef, nnx.State(off)).shared(jnp.abs(X)[None], one_document(5))[0]
    np.testing.assert_allclose(y, shared[0], atol=1e-15)
    assert aux.losses["router_entropy"] == aux.stats["routed_density"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads[0]["router_DE"], 0)


# Router entropy


def entropy(scores, valid=None):
    scores = jnp.asarray(scores, jnp.float64)
    ctx = one_document(scores.shape[1])
    if valid is not None:
        ctx.valid_BT = jnp.asarray(valid)
    return float(router_entropy(scores, ctx))


@in_float64
def test_entropy_of_equal_scores_and_of_one():
    for k in (2, 3, 8):
        assert entropy([[[0.7] * k + [0.0] * (8 - k)]]) == pytest.approx(np.log(k), abs=1e-4)
    assert entropy([[[0.7, 0, 0]]]) == pytest.approx(0, abs=3e-5)
    assert entropy([[[0.0, 0, 0]]]) == 0
    scores = np.random.default_rng(3).random((1, 5, 8)) * 10
    assert entropy(scores) == pytest.approx(entropy(7 * scores), abs=1e-5)
    assert entropy(scores, [[True] * 3 + [False] * 2]) == pytest.approx(entropy(scores[:, :3]), rel=1e-6)


@in_float64
def test_entropy_does_not_train_the_factors(golden):
    graphdef, state = golden[-1]

    def loss(state):
        return nnx.merge(graphdef, nnx.State(state))(jnp.asarray(X)[None], one_document(5))[1].losses["router_entropy"]

    grads = flatten(jax.grad(loss)(state))
    np.testing.assert_array_equal(grads.pop("router_scale_E"), 0)
    assert [name for name, g in grads.items() if np.abs(g).max() > 0] == ["router_DE"]


# The model and its presets


# Experts, layers, heads, widths: non-embedding parameters of the dense twin, weights of a token at a density of 20 %.
SIZES = {
    "0_1b": (108_552_960, 59_493_174, 6_816_874),
    "0_2b": (241_214_464, 128_764_974, 12_119_161),
    "0_5b": (525_382_400, 270_867_282, 19_762_061),
    "1_2b": (1_181_861_632, 607_303_552, 37_116_070),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_the_papers(size):
    model = preset("deco", size).model
    d, layers = model.d_model, model.layers
    twin, active, of_layer = SIZES[size]
    assert count_parameters(dense_twin(model)).non_embedding == twin
    norms = (2 * layers + 1) * d + (layers - 1) * model.ffn.expert_width
    assert round(activated_parameters(model).layers + norms) == active
    assert 4 * d**2 + 2 * d + model.ffn.expert_width + model.ffn.weights(d, model.ffn.d_ff) == of_layer
    assert {spec.attention.heads for spec in model.layer_specs()} == {d // 128}
    assert [spec.ffn.kind for spec in model.layer_specs()] == ["gated", *["deco"] * (layers - 1)]
    # The published twin is 0.5 to 1.5 % smaller than its model; that of equal parameters is wider.
    assert dataclasses.replace(model.ffn, dense_twin_d_ff=None).dense_twin().d_ff > model.first_ffn.d_ff


def test_matrices_decay_and_vectors_do_not():
    train = preset("deco", "0_1b").train
    assert (train.optimizer.weight_decay, train.optimizer.decay_embeddings, train.groups) == (0.1, True, ())
    found = ModelTemplate(lambda rngs: Decoder(CONFIGS["deco"], rngs=rngs)).parameters
    fixed = {path.split("/")[-1] for path, variable in found.items() if not is_matrix(variable)}
    assert fixed == {"scale", "router_scale_E", "norm_scale_W"}


def test_initial_weights():
    """One std, but for what is marked as an output: by sqrt(2 layers) less."""
    f32, std = jnp.dtype("float32"), preset("deco", "0_1b").model.init.scale
    ctx = BuildContext(256, 8, preset("deco", "0_1b").model.init, f32, f32)
    made = DECOConfig(experts=16).build(ctx, nnx.Rngs(0))
    for weight, expected in (
        *((weight, std) for weight in (made.router_DE, made.expert_up_DF, made.expert_down_FD, made.shared.up_DF)),
        (made.shared.down_FD, std / 4),
    ):
        assert float(jnp.std(weight[...])) == pytest.approx(expected, rel=0.05)
    np.testing.assert_allclose(made.router_scale_E[...], 0.1)
    np.testing.assert_array_equal(made.norm_scale_W[...], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "model.ffn.experts=0: must be above 0"),
        ({"shared_width": 0}, "model.ffn.shared_width=0: must be above 0"),
        ({"dense_twin_d_ff": 0}, "model.ffn.dense_twin_d_ff=0: must be above 0 or None"),
        ({"scale_init": 0.0}, "model.ffn.scale_init=0.0: must be above 0"),
        ({"expected_density": 1.5}, "model.ffn.expected_density=1.5: must be in (0, 1]"),
        ({"expert_activation": "norm_gelu"}, "expert_activation"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        dataclasses.replace(CONFIGS["deco"], ffn=dataclasses.replace(CONFIGS["deco"].ffn, **change))
