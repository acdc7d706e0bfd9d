"""The CETT-PPL meter against a NumPy restatement of its paper's algorithm, on small random decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation import evaluate_model
from sparsezoo_jax.evaluation.cett import GRID, RATIO, Calibrated, LayerThresholds, Thinned, find_cett, parse_share
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFN, GatedFFNConfig
from sparsezoo_jax.models.moe import MoEFFNConfig

CONFIG = DecoderConfig(
    vocab_size=64,
    d_model=16,
    layers=2,
    max_seq_len=16,
    attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
    ffn=GatedFFNConfig(d_ff=48, activation="silu", bias=True),
)


def made(config=CONFIG, seed=0):
    model = Decoder(config, rngs=nnx.Rngs(seed))
    # Sharper logits than at the start, so that the loss feels what is dropped.
    model.final_norm.scale[...] = 8.0 * jnp.ones_like(model.final_norm.scale[...])
    return model


@pytest.fixture(scope="module")
def batches():
    """Three rows of padding in the second batch; targets are what the model predicts itself."""
    model, rng, result = made(), np.random.default_rng(0), []
    for padding in (0, 3):
        tokens = rng.integers(0, 64, (4, 16)).astype(np.int32)
        segments = np.ones_like(tokens)
        segments[:, 16 - padding :] = 0
        logits = model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments)).logits
        result.append(
            {
                "tokens": tokens,
                "segment_ids": segments,
                "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
                "targets": np.asarray(jnp.argmax(logits, axis=-1), np.int32),
                "mask": segments > 0,
            }
        )
    return result


@pytest.fixture(scope="module")
def calibrated(batches):
    return Calibrated(made(), lambda: iter(batches))


def units(model, batches):
    """Hidden units and down projections of all layers, float64."""
    hidden = [[], []]
    for b in batches:
        out = model(b["tokens"], segment_ids=jnp.asarray(b["segment_ids"]), record=("ffn_hidden",))
        for layer, a in enumerate(out.records["ffn_hidden"]):
            hidden[layer].append(np.asarray(a, np.float64)[b["segment_ids"] > 0])
    down = np.asarray(model.segments[0].blocks[0].ffn.down_FD[...], np.float64)
    return [np.concatenate(h) for h in hidden], list(down)


def test_thresholds_are_those_of_the_paper_s_search(calibrated, batches):
    for layer, (a, w) in enumerate(zip(*units(made(), batches), strict=True)):
        norms = np.abs(a) * np.linalg.norm(w, axis=1)
        assert len(a) == 4 * 16 + 4 * 13
        top = np.quantile(norms.ravel()[:: max(1, norms.size // 65536)], 0.99)
        grid = np.linspace(norms.min(), top, 65536)

        def cett(threshold, a=a, w=w, norms=norms):
            lost = np.where(norms > threshold, 0, a) @ w
            return np.mean(np.linalg.norm(lost, axis=1) / np.linalg.norm(a @ w, axis=1))

        for c in (0.05, 0.3):
            found = calibrated.thresholds(c)[layer]
            index = np.argmin(np.abs(grid - found))
            # The grid is made in float32 there.
            np.testing.assert_allclose(grid[index], found, rtol=1e-5)
            assert cett(grid[index]) <= c + 1e-6
            assert cett(grid[index + 1]) > c - 1e-6


def test_a_layer_s_threshold_stays_within_its_grid():
    layer = LayerThresholds(jnp.eye(4)[:, :3] * jnp.arange(1, 4) + 0.01, jnp.ones((3, 2)))
    assert layer.at(0.0) == layer.grid[0]
    assert layer.at(2.0) == layer.grid[GRID - 1]


def test_units_are_dropped_from_the_product_as_in_the_paper(batches, calibrated, monkeypatch):
    model, thresholds = made(), calibrated.thresholds(0.2)
    found = evaluate_model(Thinned(model, "cett", thresholds), batches)
    output, calls, active = GatedFFN.output, [], []

    def thinned(self, hidden, stream):
        limit = thresholds[len(calls) % 2] / jnp.linalg.norm(self.down_FD[...], axis=-1)
        calls.append(hidden)
        hidden = jnp.where(jnp.abs(hidden) < limit, 0, hidden)
        active.append(hidden != 0)
        return output(self, hidden, stream)

    monkeypatch.setattr(GatedFFN, "output", thinned)
    direct = Decoder(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(direct, nnx.state(model))
    losses, counts = [], []
    for b in batches:
        # An edit that changes nothing makes the layers run one after another.
        out = direct(b["tokens"], segment_ids=jnp.asarray(b["segment_ids"]), edit=lambda name, layer, x: x)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), b["targets"][..., None], axis=-1)[..., 0]
        losses.append(-np.sum(np.where(b["mask"], picked, 0)))
        counts.append(b["mask"].sum())
    np.testing.assert_allclose(found.loss, np.sum(losses) / np.sum(counts), rtol=1e-5)
    ratios = [np.concatenate([np.asarray(active[2 * i + j])[b["mask"]] for i, b in enumerate(batches)]) for j in (0, 1)]
    np.testing.assert_allclose(found.stats[RATIO], [r.mean() for r in ratios], atol=1e-6)
    assert 0.05 < ratios[0].mean() < 0.95


def test_the_outer_search_meets_the_asked_for_perplexity(calibrated, batches):
    cett = find_cett([calibrated], 0.05)
    # The loss is a step function of CETT over few tokens.
    assert calibrated.point("cett", cett - 2e-6).increase < 0.05
    assert calibrated.point("cett", cett + 2e-6).increase >= 0.05 - 1e-3
    other = Calibrated(made(seed=1), lambda: iter(batches))
    joint = find_cett([calibrated, other], 0.05)
    mean = np.mean([model.point("cett", joint - 2e-6).increase for model in (calibrated, other)])
    assert mean < 0.05
    assert joint != cett


def test_rivals_are_their_definitions(calibrated, batches):
    hidden, _ = units(made(), batches)
    exact = calibrated.point("threshold", 0.0)
    np.testing.assert_allclose(exact.activation_ratio, 1.0)
    assert abs(exact.increase) < 1e-6
    assert hidden[0].all()
    # The first layer sees the same gates whatever its own units do.
    gates = []
    for b in batches:
        out = made()(b["tokens"], segment_ids=jnp.asarray(b["segment_ids"]), record=("ffn_gate",))
        gates.append(np.abs(np.asarray(out.records["ffn_gate"][0]))[b["mask"]])
    share = np.mean(np.concatenate(gates) >= 0.2)
    np.testing.assert_allclose(calibrated.point("threshold", 0.2).activation_ratio[0], share, atol=1e-6)
    top = calibrated.point("top_k", 0.25)
    np.testing.assert_allclose(top.activation_ratio, 12 / 48, atol=1e-6)
    assert top.increase > 0


@pytest.mark.parametrize("count", [1, 3])
def test_thresholds_are_one_a_layer(calibrated, count):
    with pytest.raises(ConfigError, match=f"thresholds=<{count} values>: must be one a layer, 2"):
        Thinned(calibrated.model, "cett", [0.1] * count)


@pytest.mark.parametrize("text", ["0%", "100%", "1", "-1%", "nan%", "one%", "%"])
def test_shares_out_of_range_are_refused(text):
    with pytest.raises(ConfigError, match="must be a percentage above 0% and below 100%"):
        parse_share(text)


def test_percentages_are_shares():
    assert parse_share("1%") == 0.01
    assert parse_share("2.5%") == 0.025


def test_kinds_without_hidden_units_are_refused(batches):
    config = DecoderConfig(
        vocab_size=64,
        d_model=16,
        layers=1,
        max_seq_len=16,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
        ffn=MoEFFNConfig(experts=4, expert_width=8, k=2),
    )
    with pytest.raises(ConfigError, match=r"ffn.kind=moe: --cett can't measure it: layer 0 shows no hidden units"):
        Calibrated(made(config), lambda: iter(batches))
