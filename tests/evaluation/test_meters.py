"""Meters against their definitions in NumPy, on given scores and on a small decoder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation import measure, summaries
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.decoder import Output
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.records import RECORDS
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig
from sparsezoo_jax.pallas_kernels.spark_ffn import select_neurons

FFN = SparkFFNConfig(d_ff=64, top_k=6, r=8)
CONFIG = DecoderConfig(
    vocab_size=512,
    d_model=16,
    layers=1,
    max_seq_len=32,
    attention=SparkAttentionConfig(heads=2, kv_heads=1, head_dim=8, top_k=4, r=4),
    ffn=FFN,
)


class Given(nnx.Module):
    """Stands for a decoder whose scores are known: every token has its own row of scores."""

    def __init__(self, scores_VF, *, selection="statistical", gate_VF=None):
        self.scores_VF = nnx.Param(jnp.asarray(scores_VF, jnp.float32))
        gate = select_neurons(self.scores_VF[...], FFN.top_k, selection) if gate_VF is None else gate_VF
        self.gate_VF = nnx.Param(jnp.asarray(gate))

    def __call__(self, tokens, *, segment_ids, positions, record, summarise):
        scores, gate = self.scores_VF[...][tokens], self.gate_VF[...][tokens]
        spec = CONFIG.layer_specs()[0]
        records = {"ffn_scores": scores, "ffn_gate": gate}
        if record:
            summary = summarise(records, spec, CallContext(positions, segment_ids))
        return Output(scores, scores, {}, {}, None, {name: (value,) for name, value in summary.items()})


def batches_of(tokens_NBT, padding=0):
    """Batches of given tokens; the last `padding` positions of every row are padding."""
    for tokens in tokens_NBT:
        segments = np.ones(tokens.shape, np.int32)
        segments[:, tokens.shape[1] - padding :] = 0
        yield {"tokens": tokens, "segment_ids": segments, "positions": np.arange(tokens.shape[1])[None] + 0 * tokens}


def measured(model, tokens, padding=0):
    return measure(model, CONFIG, batches_of(tokens, padding)).layers[0]


TOKENS = np.arange(512).reshape(4, 4, 32)
NORMAL = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)


def test_activity_counts_real_tokens_only():
    model = Given(NORMAL)
    layer = measured(model, TOKENS, padding=5)
    kept = TOKENS[..., :-5].reshape(-1)
    active = np.asarray(model.gate_VF[...])[kept] != 0
    counts = active.sum(-1)
    assert layer.ffn.active.mean == pytest.approx(counts.mean())
    assert layer.ffn.active.std == pytest.approx(counts.std())
    assert layer.ffn.density == pytest.approx(active.mean())
    assert layer.ffn.density_std == pytest.approx(active.mean(-1).std())
    expected = {str(p): int(np.percentile(counts, p, method="inverted_cdf")) for p in (5, 25, 50, 75, 95)}
    assert layer.ffn.active.percentiles == expected
    assert layer.ffn.frequency == pytest.approx(np.sort(active.mean(0))[::-1])
    assert (layer.ffn.neurons, layer.ffn.target) == (64, 6)
    # Blocks of a batch's tokens one after another, padding among them, which uses nothing.
    real = np.pad(np.ones((4, 4, 27), bool), ((0, 0), (0, 0), (0, 5)))[..., None]
    used = (np.asarray(model.gate_VF[...])[TOKENS] != 0) & real
    for length in (8, 32, 128):
        assert layer.ffn.unions[str(length)] == pytest.approx(used.reshape(-1, length, 64).any(1).mean())
    assert list(layer.ffn.unions) == ["8", "16", "32", "64", "128"], "a batch has no block of 256"


def test_what_stays_from_token_to_token():
    """Of tokens that follow another one of their document; documents are not told apart by what they hold."""
    tokens = np.repeat(TOKENS[..., :16], 2, axis=-1)  # every other token is as the one before
    gates = np.asarray(Given(NORMAL).gate_VF[...])[tokens]
    same = gates[:, :, 1:] == gates[:, :, :-1]
    assert 0.5 < same.mean() < 1
    assert measured(Given(NORMAL), tokens).ffn.temporal_sparsity == pytest.approx(same.mean())
    kept = measured(Given(NORMAL), tokens, padding=5).ffn.temporal_sparsity
    assert kept == pytest.approx(same[:, :, : 32 - 5 - 1].mean())
    assert measured(Given(NORMAL), TOKENS[..., :1]).ffn.temporal_sparsity is None


def test_dead_neurons():
    scores = NORMAL.copy()
    scores[:, [3, 40]] = -2  # below every threshold
    assert measured(Given(NORMAL), TOKENS).ffn.dead == 0
    dead = measured(Given(scores), TOKENS).ffn
    assert dead.dead == 2
    zeros = np.array([given == 0 for given in Given(scores).gate_VF[...]])[TOKENS].reshape(-1, 64)
    assert dead.dynamic_dead == pytest.approx(np.mean(zeros & ~zeros.all(axis=0)), abs=1e-6)
    assert dead.frequency[-2:] == [0, 0]
    assert dead.frequency[-3] > 0
    # A neuron that one token of the last batch activates is alive.
    scores[TOKENS[-1, 2, 31], 3] = 9
    assert measured(Given(scores), TOKENS).ffn.dead == 1
    padded = measured(Given(scores), TOKENS, padding=1).ffn
    assert padded.dead == 2, "but not if that token is padding"


def naive_quality(scores, selected, k):
    """Mean precision, recall, F1 and Jaccard over rows, by sets."""
    rows = []
    for row, mask in zip(scores, selected, strict=True):
        top, chosen = set(np.argsort(-row)[:k].tolist()), set(np.flatnonzero(mask).tolist())
        hits = len(top & chosen)
        rows.append(
            (
                hits / len(chosen) if chosen else np.nan,
                hits / len(top),
                2 * hits / (len(chosen) + len(top)),
                hits / len(top | chosen),
            )
        )
    return np.nanmean(rows, axis=0)


@pytest.mark.parametrize("selection", ["statistical", "exact", "random"])
def test_selection_of_neurons(selection):
    gate = np.random.default_rng(1).random((512, 64)) < 0.1 if selection == "random" else None
    gate = None if gate is None else gate.astype(np.float32)
    model = Given(NORMAL, selection=selection if gate is None else "none", gate_VF=gate)
    quality = measured(model, TOKENS).ffn_selection
    expected = naive_quality(NORMAL, np.asarray(model.gate_VF[...]) != 0, 6)
    got = [quality.precision, quality.recall, quality.f1, quality.jaccard]
    assert got == pytest.approx(expected, rel=1e-5)
    assert quality.rows == 512
    assert quality.selected_share == pytest.approx((np.asarray(model.gate_VF[...]) != 0).mean())
    assert quality.target_share == pytest.approx(6 / 64)
    if selection == "exact":
        assert got == [1, 1, 1, 1]


def test_rows_without_a_selection_have_no_precision():
    gate = np.zeros((512, 64), np.float32)
    nothing = measured(Given(NORMAL, gate_VF=gate), TOKENS).ffn_selection
    assert nothing.precision is None
    assert nothing.recall == 0
    gate[5, np.argmax(NORMAL[5])] = 1
    one = measured(Given(NORMAL, gate_VF=gate), TOKENS).ffn_selection
    assert one.precision == 1
    assert one.recall == pytest.approx(1 / 6 / 512)


def test_ties_are_all_in_the_top():
    scores = np.tile(np.arange(64) // 8, (512, 1)).astype(np.float32)  # the 8 largest are equal, k is 6
    gate = (scores == 7).astype(np.float32)
    quality = measured(Given(scores, gate_VF=gate), TOKENS).ffn_selection
    assert (quality.precision, quality.recall) == (1, 1)


def test_large_batches_are_sampled(monkeypatch):
    """Fewer rows than tokens: figures stay near those of all rows, which are not all alike."""
    monkeypatch.setattr(summaries, "ROWS", 40)
    tokens = np.random.default_rng(2).permutation(512).reshape(2, 8, 32)
    layer = measured(Given(NORMAL), tokens)
    assert layer.ffn_selection.rows == 80
    expected = naive_quality(NORMAL, np.asarray(Given(NORMAL).gate_VF[...]) != 0, 6)
    assert layer.ffn_selection.recall == pytest.approx(expected[1], abs=0.06)  # 4 standard errors of 80 rows
    assert layer.ffn.density == pytest.approx((np.asarray(Given(NORMAL).gate_VF[...]) != 0).mean()), "not sampled"


def test_sampled_rows_cover_all_positions():
    rows = jnp.arange(8 * 4 * 64)[:, None]
    drawn = np.asarray(summaries._spread(rows))[:, 0]
    assert len(np.unique(drawn)) == summaries.ROWS
    assert len(np.unique(drawn % 64)) == 64


def test_normal_scores_lie_on_the_diagonal():
    wide = 5 + 3 * np.random.default_rng(3).normal(size=(512, 1024))
    scores = measured(Given(wide, gate_VF=np.ones((512, 1), np.float32)), TOKENS).ffn_scores
    assert scores.scores == 512 * 1024
    assert scores.skewness == pytest.approx(0, abs=0.014)  # 4 standard errors, sqrt(6 / n)
    assert scores.excess_kurtosis == pytest.approx(0, abs=0.03)
    assert min(scores.normal_quantiles) == -3.5
    np.testing.assert_allclose(scores.score_quantiles, scores.normal_quantiles, atol=0.1)
    middle = np.abs(scores.normal_quantiles) <= 2
    np.testing.assert_allclose(
        np.asarray(scores.score_quantiles)[middle], np.asarray(scores.normal_quantiles)[middle], atol=0.02
    )


def test_other_distributions():
    skewed = np.random.default_rng(4).exponential(size=(512, 64)).astype(np.float32)
    scores = measured(Given(skewed), TOKENS).ffn_scores
    z = (skewed - skewed.mean(-1, keepdims=True)) / skewed.std(-1, keepdims=True)
    assert scores.skewness == pytest.approx(stats.skew(z, axis=None), rel=1e-4)
    assert scores.excess_kurtosis == pytest.approx(stats.kurtosis(z, axis=None), rel=1e-4)
    probabilities = stats.norm.cdf(scores.normal_quantiles)
    # Half a bin of the histogram; beyond 3 few scores lie between two of its edges.
    near = np.abs(scores.normal_quantiles) <= 2.5
    np.testing.assert_allclose(
        np.asarray(scores.score_quantiles)[near],
        np.quantile(z, probabilities[near]),
        atol=summaries.LIMIT / summaries.BINS * 2,
    )
    constant = measured(Given(np.ones((512, 64))), TOKENS)
    assert constant.ffn_scores is None, "rows of equal scores have no shape"


def test_no_tokens():
    with pytest.raises(DataError, match="no token"):
        measure(Given(NORMAL), CONFIG, [])


# ------------------------------------------------------------------------------------------------- A decoder of its own

SPARK = dataclasses.replace(
    CONFIG,
    vocab_size=64,
    layers=4,
    layer_pattern=("local", "global"),
    attention=SparkAttentionConfig(heads=4, kv_heads=2, head_dim=8, top_k=4, r=4, window=16),
)


@pytest.fixture(scope="module")
def spark():
    """A decoder, its batches, its meters and all that it records."""
    model = Decoder(SPARK, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(5).integers(0, 64, (2, 3, 32))
    batches = list(batches_of(tokens, padding=3))
    batches[1]["segment_ids"][:, 12:29] = 2
    batches[1]["positions"] = np.array(batches[1]["positions"])
    batches[1]["positions"][:, 12:29] -= 12
    graphdef, state = nnx.split(model)
    call = jax.jit(
        lambda state, b: nnx.merge(graphdef, state)(
            b["tokens"], segment_ids=b["segment_ids"], positions=b["positions"], record=tuple(RECORDS)
        )
    )
    outputs = [jax.device_get(call(state, batch)) for batch in batches]
    return model, batches, measure(model, SPARK, iter(batches)), outputs


def queries_of(spark, layer):
    """For each real query of each head: scores of its visible keys and which are selected."""
    _, batches, _, outputs = spark
    for batch, output in zip(batches, outputs, strict=True):
        scores, selected, visible = (
            output.records[f"attention_{name}"][layer] for name in ("scores", "selected", "visible")
        )
        for b, t in np.argwhere(batch["segment_ids"] > 0):
            seen = visible[b, t]
            for head in range(4):
                yield scores[b, head, t, seen], selected[b, head, t, seen]


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(4))
def test_attended_keys(spark, layer):
    meters = spark[2].layers[layer].attention
    queries = list(queries_of(spark, layer))
    attended = np.array([selected.sum() for _, selected in queries])
    visible = np.array([len(scores) for scores, _ in queries])
    assert meters.attended.mean == pytest.approx(attended.mean())
    assert meters.attended.std == pytest.approx(attended.std())
    assert meters.attended.percentiles["50"] == np.percentile(attended, 50, method="inverted_cdf")
    assert meters.visible == sorted(set(visible.tolist()))
    assert meters.attended_by_visible == pytest.approx([attended[visible == n].mean() for n in meters.visible])
    assert meters.attended_by_visible[:4] == [1, 2, 3, 4], "few keys: all are attended"
    assert meters.attended_beyond_target == pytest.approx(attended[visible > 4].mean())
    assert spark[2].sparsity(SPARK).attended_keys[layer] == meters.attended_beyond_target


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(4))
def test_selection_of_keys(spark, layer):
    quality = spark[2].layers[layer].attention_selection
    several = [(scores, selected) for scores, selected in queries_of(spark, layer) if len(scores) > 4]
    expected = np.array([naive_quality([s], [m], 4) for s, m in several])
    assert quality.rows == len(several), "no more rows than are compared, so none is left out"
    assert quality.precision == pytest.approx(expected[:, 0].mean(), abs=1e-5)
    assert quality.recall == pytest.approx(expected[:, 1].mean(), abs=1e-5)
    assert quality.f1 == pytest.approx(expected[:, 2].mean(), abs=1e-5)
    assert quality.jaccard == pytest.approx(expected[:, 3].mean(), abs=1e-5)
    shares = sum(m.sum() for _, m in several) / sum(len(s) for s, _ in several)
    assert quality.selected_share == pytest.approx(shares)
    z = np.concatenate([(s - s.mean()) / s.std() for s, _ in several])
    scores = spark[2].layers[layer].attention_scores
    assert scores.scores == len(z)
    assert scores.skewness == pytest.approx(stats.skew(z), abs=1e-3)
    assert scores.excess_kurtosis == pytest.approx(stats.kurtosis(z), abs=1e-3)


@pytest.mark.slow
def test_density_is_that_of_the_statistics(spark):
    _, batches, meters, outputs = spark
    weights = np.array([(batch["segment_ids"] > 0).sum() for batch in batches])
    for layer in range(4):
        density = np.average([output.stats["ffn_density"][layer] for output in outputs], weights=weights)
        attended = np.average([output.stats["attended_keys"][layer] for output in outputs], weights=weights)
        assert meters.layers[layer].ffn.density == pytest.approx(density, rel=1e-5)
        assert meters.layers[layer].attention.attended.mean == pytest.approx(attended, rel=1e-5)
    assert (meters.tokens, meters.batches) == (weights.sum(), 2)
    assert json.loads(json.dumps(meters.as_dict(), allow_nan=False))["layers"][2]["ffn"]["target"] == 6


@pytest.mark.slow
def test_a_dense_model_has_meters_without_selection(spark):
    config = dataclasses.replace(
        SPARK, attention=GQAConfig(heads=4, kv_heads=2, head_dim=8, window=16), ffn=GatedFFNConfig(d_ff=24)
    )
    meters = measure(Decoder(config, rngs=nnx.Rngs(0)), config, spark[1])
    for layer in meters.layers:
        assert layer.ffn.density == 1
        assert layer.ffn.target is None
        assert layer.ffn_selection is None
        assert layer.attention_selection is None
        assert layer.attention.attended_by_visible == layer.attention.visible
    assert meters.sparsity(config).attended_keys == (None,) * 4
    assert meters.sparsity(config).active_neurons == (24,) * 4
