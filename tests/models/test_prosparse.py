"""ProSparse: the mean L1 loss, the threshold outside of training, and starting from a SiLU model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs.prosparse import PRESETS
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.inference.layouts import Formats
from sparsezoo_jax.inference.packing import packed
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.training.warm_start import _converted

THRESHOLD = 0.3
CONFIG = DecoderConfig(
    vocab_size=32,
    d_model=16,
    layers=3,
    max_seq_len=16,
    attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
    ffn=GatedFFNConfig(d_ff=24, activation="relu", l1=True, threshold=THRESHOLD),
)
TOKENS = jnp.arange(14).reshape(2, 7)
SEGMENTS = jnp.ones((2, 7), jnp.int32).at[1, 5:].set(0)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def outputs(model):
    """Of training and evaluation; the latter as scanned and as unrolled layers."""

    def call(model):
        return model(TOKENS, segment_ids=SEGMENTS, record=("ffn_scores", "ffn_gate", "ffn_hidden"))

    evaluated = call(model)
    model.train()
    trained = call(model)
    model.eval()
    return trained, evaluated


def test_gates_below_the_threshold_are_zero_except_in_training(outputs):
    for out, threshold in zip(outputs, (0.0, THRESHOLD), strict=True):
        for layer in range(3):
            scores, gate = (np.asarray(out.records[name][layer]) for name in ("ffn_scores", "ffn_gate"))
            expected = np.where(scores >= threshold, np.maximum(scores, 0), 0)
            np.testing.assert_array_equal(gate, expected)
            share = np.mean(gate[np.asarray(SEGMENTS) > 0] != 0)
            np.testing.assert_allclose(out.stats["ffn_density"][layer], share, rtol=1e-5)
    assert np.all(outputs[1].stats["ffn_density"] < outputs[0].stats["ffn_density"] - 0.05)


def test_the_loss_is_a_mean_over_elements_summed_over_layers(outputs):
    for out in outputs:
        hidden = np.stack([np.asarray(x) for x in out.records["ffn_hidden"]])[:, np.asarray(SEGMENTS) > 0]
        np.testing.assert_allclose(out.losses["mean_l1"], np.abs(hidden).mean(axis=(1, 2)).sum(), rtol=1e-5)


def test_packed_layers_keep_the_threshold(model):
    laid_out = packed(model, Formats())
    cache = laid_out.init_cache(2, 8)
    out = laid_out(TOKENS[:, :6], cache=cache)
    last = laid_out(TOKENS[:, 6:], cache=out.cache)
    whole = model(TOKENS)
    np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, -1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.logits, whole.logits[:, :6], rtol=1e-4, atol=1e-4)


def test_drelu_counts_neurons_that_are_not_zero():
    ffn = GatedFFNConfig(d_ff=24, activation="relu", up_activation="relu")
    layer = ffn.build(CONFIG.build_context(), nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 7, 16))
    y_BTD, aux = layer(x_BTD, CallContext(jnp.zeros((2, 7), jnp.int32), SEGMENTS))
    gate, up, down = (np.asarray(weight[...]) for weight in (layer.gate_DF, layer.up_DF, layer.down_FD))
    hidden = np.maximum(x_BTD @ gate, 0) * np.maximum(x_BTD @ up, 0)
    np.testing.assert_allclose(y_BTD, hidden @ down, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux.stats["ffn_density"], np.mean(hidden[np.asarray(SEGMENTS) > 0] > 0), rtol=1e-5)
    # Both maps from the stream are needed whole to know the active neurons, of which the third one is.
    assert ffn.weights(16, 6) == 16 * (24 + 24 + 6)
    assert ffn.flops(16, 6) == 2 * ffn.weights(16, 6)
    assert ffn.dense_twin().weights(16) == 3 * 16 * 24


def test_a_silu_model_gives_all_parameters():
    silu = DecoderConfig(
        vocab_size=32,
        d_model=16,
        layers=3,
        max_seq_len=16,
        attention=CONFIG.attention,
        ffn=GatedFFNConfig(d_ff=24, activation="silu"),
    )
    key = jax.random.key(0)

    def parameters(config, seed):
        return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(seed)), nnx.Param))

    given = parameters(silu, 1)
    made = _converted(silu, CONFIG, 0.0, parameters(CONFIG, 0), given, key)
    jax.tree.map(np.testing.assert_array_equal, made, given)


def test_the_dense_twin_has_no_threshold():
    twin = CONFIG.ffn.dense_twin()
    assert isinstance(twin, GatedFFNConfig)
    assert twin.threshold == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": -0.1, "activation": "relu"}, "model.ffn.threshold=-0.1: must be at least 0"),
        ({"threshold": float("inf"), "activation": "relu"}, "model.ffn.threshold=inf: must be at least 0, and finite"),
        ({"threshold": 0.1, "activation": "silu"}, "must be 0 with model.ffn.activation=silu: a threshold is for relu"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        GatedFFNConfig(d_ff=8, **values)


@pytest.mark.parametrize(
    ("size", "points"),
    [
        ("7b", {0: 0.0, 5_000: 0.0, 5_500: 2.5e-3, 6_000: 5e-3, 11_000: 5e-2, 14_000: 0.125, 16_400: 0.2}),
        ("13b", {5_500: 0.0, 6_750: 5e-3, 10_900: 1e-2, 13_000: 1.5e-2, 15_500: 2e-2}),
        ("1b", {10_000: 0.0, 15_000: 1e-3, 22_000: 5e-3, 30_000: 2.75e-2, 35_000: 5e-2, 94_999: 5e-2}),
    ],
)
def test_the_paper_s_weights_at_the_paper_s_steps(size, points):
    (objective,) = PRESETS[size].train.objectives
    found = [float(objective.coefficient({}, jnp.int32(step))) for step in points]
    np.testing.assert_allclose(found, list(points.values()), rtol=1e-5, atol=1e-9)
