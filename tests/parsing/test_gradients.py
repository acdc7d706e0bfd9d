"""Statistics of gradients, and the regression that reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.parsing import share_of
from sparsezoo_jax.parsing.gradients import (
    STATISTICS,
    gradient_statistics,
    probe,
    shared_paths,
    statistics,
    train_decoders,
)
from sparsezoo_jax.training.state import ModelTemplate


def test_statistics():
    g = np.array([[3.0, -4.0], [0.0, 1.0]])
    rms = np.sqrt(26 / 4)
    expected = np.log([rms, 2 / rms, 4 / rms, (81 + 256 + 1) / 4 / rms**4])
    np.testing.assert_allclose(statistics(jnp.asarray(g)), expected, rtol=1e-5)
    # Of another size nothing but the first changes, even where fourth powers are no float32 numbers.
    small = np.asarray(statistics(jnp.asarray(1e-12 * g)))
    np.testing.assert_allclose(small, expected + np.log([1e-12, 1, 1, 1]), rtol=1e-4)
    assert np.all(np.isfinite(statistics(jnp.zeros(3))))


def test_a_regression_tells_what_is_linear_and_nothing_else():
    draw = np.random.default_rng(0)
    x, test = draw.standard_normal((300, 5)), draw.standard_normal((100, 5))
    direction = draw.standard_normal((5, 3))
    told = probe(10 * x + 7, np.argmax(x @ direction, 1), 10 * test + 7)
    assert np.mean(told == np.argmax(test @ direction, 1)) > 0.9
    noise = probe(x, draw.integers(0, 3, 300), test)
    assert np.mean(noise == draw.integers(0, 3, 100)) < 0.55


def test_intervals_are_over_groups():
    right = np.array([1, 1, 0, 0] * 25, bool)
    even = share_of(right, np.arange(100) // 4)
    assert (even.value, even.low, even.high, even.groups) == (0.5, 0.5, 0.5, 25)
    # All of a group together: as few as there are groups, of standard deviation 0.5 / sqrt(16).
    torn = share_of(np.repeat(np.arange(16) % 2 == 0, 50), np.repeat(np.arange(16), 50))
    assert torn.low == pytest.approx(0.5 - 1.96 * 0.125, abs=0.07)
    assert torn.high == pytest.approx(0.5 + 1.96 * 0.125, abs=0.07)


def test_gradients_are_those_of_each_decoder_and_sequence():
    attention = GQAConfig(heads=1, kv_heads=1, head_dim=8)
    config = DecoderConfig(
        vocab_size=16,
        d_model=8,
        layers=1,
        max_seq_len=8,
        attention=attention,
        ffn=PlainFFNConfig(d_ff=8, activation="relu"),
        scan_layers=False,
    )
    text = np.random.default_rng(0).integers(0, 16, (8, 7)).astype(np.int32)
    trained = train_decoders(config, [3, 4], text, steps=20, batch_size=4, learning_rate=1e-2)
    assert trained.losses.shape == (2,)
    assert np.all(trained.losses < np.log(16))
    paths = shared_paths(trained.template)
    left_out = set(ModelTemplate(lambda rngs: Decoder(config, rngs=rngs)).parameters) - set(paths)
    assert len(left_out) == 2
    assert all("/ffn/" in path for path in left_out)
    assert not any("/ffn/" in path for path in paths)
    found = gradient_statistics(trained, text[:3])
    assert found.shape == (2, 3, len(paths) * len(STATISTICS))
    params, variables = (jax.tree.map(lambda leaf: leaf[1], tree) for tree in (trained.params, trained.variables))

    def loss(params):
        logits = trained.template.merge(params, variables)(text[2:3, :-1]).logits
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), text[2:3, 1:, None], -1))

    first = jax.grad(loss)(params)
    for name in paths[0].split("/"):
        first = first[name] if name in first else first[int(name)]
    np.testing.assert_allclose(found[1, 2, : len(STATISTICS)], statistics(first), rtol=1e-3, atol=1e-4)
    assert pytest.approx(found[0, 2]) != found[1, 2]
