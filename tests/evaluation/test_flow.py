"""Activation flow against its definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.evaluation import flow, measure
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.ffn import GatedFFNConfig

SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 3, [1] * 20])


def summed(x, segments=SEGMENTS, **records):
    given = {"residual": jnp.asarray(x, jnp.float32), **records}
    sums = flow.flow_sums(given, CallContext(jnp.zeros_like(segments), jnp.asarray(segments)))
    return {name: np.asarray(value, np.float64) for name, value in sums.items()}


def active_by_hand(x_D, p):
    """The fewest dimensions whose shares sum to p."""
    order = np.argsort(-np.abs(x_D))
    held = np.cumsum(np.abs(x_D)[order]) / np.abs(x_D).sum()
    return set(order[: int(np.argmax(held >= p)) + 1])


@pytest.fixture(scope="module")
def states():
    return np.random.default_rng(0).normal(size=(2, 20, 24)) ** 3


def test_figures_by_hand(states):
    found = flow.figures(summed(states))["residual"]
    active = {}
    for index in zip(*np.nonzero(SEGMENTS), strict=True):
        active[index] = active_by_hand(states[index], 0.5)
    real = list(active)
    assert found.width == 24
    assert found.flow == pytest.approx(np.mean([np.abs(states[i]).sum() for i in real]))
    assert found.dims_50 == pytest.approx(np.mean([len(active[i]) for i in real]))
    assert found.dims_90 == pytest.approx(np.mean([len(active_by_hand(states[i], 0.9)) for i in real]))
    pairs = [((b, t - 1), (b, t)) for b, t in real if t and SEGMENTS[b, t - 1] == SEGMENTS[b, t]]
    overlap = [len(active[a] & active[b]) / len(active[a] | active[b]) for a, b in pairs]
    assert found.jaccard == pytest.approx(np.mean(overlap))
    before = {b: active[a] for a, b in pairs}
    runs = sum(len(active[i] - before.get(i, set())) for i in real)
    assert found.run_length == pytest.approx(sum(len(active[i]) for i in real) / runs)


def test_shared_and_specialised_dimensions():
    x = np.full((2, 20, 12), 0.01)
    x[..., 0] = 10  # of every token
    x[0, 3, 1] = 100  # of one token of 37
    x[:, ::3, 2] = 30  # of every third token, where it holds more than half alone: 12 of 37
    found = flow.figures(summed(x))["residual"]
    assert (found.shared, found.specialised) == (0, 2), "the first is left with 24 of 37 tokens"
    x[..., 0] = 1000
    found = flow.figures(summed(x))["residual"]
    assert (found.shared, found.specialised) == (1, 0)
    assert found.run_length == pytest.approx(37 / 3), "one run in each document"
    assert (found.dims_50, found.jaccard) == (1, 1)


def test_batches_add_up(states):
    whole, parts = summed(states), [summed(states[i : i + 1], SEGMENTS[i : i + 1]) for i in (0, 1)]
    for name, value in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-5)


@pytest.mark.slow
def test_padding_and_long_batches(states):
    spoilt = np.where(SEGMENTS[..., None] > 0, states, 1e6)
    for name, value in summed(spoilt).items():
        np.testing.assert_allclose(value, summed(states)[name], rtol=1e-6)
    many = np.concatenate([states] * 40)
    assert summed(many, np.concatenate([SEGMENTS] * 40))["flow_residual_tokens"] == 37 * (flow.TOKENS // 20 // 2) + 17
    assert flow.figures(summed(states, 0 * SEGMENTS))["residual"].jaccard is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["dense", "mohd"])
def test_flow_of_a_decoder(arch):
    residual = preset("mohd").model.residual if arch == "mohd" else preset("dense").model.residual
    config = DecoderConfig(
        vocab_size=64,
        d_model=32,
        layers=2,
        max_seq_len=16,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
        ffn=GatedFFNConfig(d_ff=16),
        residual=residual,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(16)[None] + 0 * tokens}
    layers = measure(model, config, [batch, batch]).layers
    records = model(tokens, record=("residual", "sublayer_input")).records
    for layer, residual, (attention, ffn) in zip(layers, records["residual"], records["sublayer_input"], strict=True):
        assert list(layer.flow) == list(flow.STREAMS)
        for stream, x in zip(flow.STREAMS, (residual, attention, ffn), strict=True):
            assert layer.flow[stream].flow == pytest.approx(float(jnp.abs(x).sum(-1).mean()), rel=1e-4)
        # A token of MoHD has half of the width.
        assert layer.flow["ffn_input"].dims_90 <= (16 if arch == "mohd" else 32)
