"""Meters of experts: against their definitions token by token, at numbers worked out by hand, and on small decoders."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.evaluation import evaluate_model, measure
from sparsezoo_jax.evaluation.expert_meters import CHUNKS, expert_meters, summarise_experts
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.moe import MoEFFNConfig


@functools.partial(jax.jit, static_argnums=2)
def summarise(scores_BTE, segments_BT, shared):
    return summarise_experts(scores_BTE, CallContext(jnp.zeros_like(segments_BT), segments_BT), shared)


def totals_of(active_BTE, segments_BT=None, shared=0):
    """Sums over one batch, as `measure` adds them up."""
    active_BTE = np.asarray(active_BTE, np.float32)
    segments_BT = np.ones(active_BTE.shape[:2], np.int32) if segments_BT is None else np.asarray(segments_BT, np.int32)
    return {name: np.asarray(x) for name, x in summarise(active_BTE, segments_BT, shared).items()}


def meters(*args, **kwargs):
    return expert_meters([totals_of(*args, **kwargs)])


def percent(value):
    return round(100 * value, 2)


def documents(active_BTE, segments_BT):
    """The tokens of each document."""
    for row, segments in zip(active_BTE, segments_BT, strict=True):
        for segment in np.unique(segments[segments > 0]):
            yield row[segments == segment]


def naive_cls(runs, n):
    """Share of experts off in all of n consecutive tokens, over whole chunks of the runs."""
    off = [1 - run[i : i + n].any(axis=0) for run in runs for i in range(0, len(run) - n + 1, n)]
    return np.mean(off) if off else None


SEGMENTS = np.array([[1] * 37 + [2] * 64 + [3] * 1 + [0] * 10, [1] * 5 + [2] * 107, [1] * 112])
ACTIVE = np.random.default_rng(0).random((3, 112, 20)) < np.linspace(0.01, 0.3, 20)
ACTIVE[0, -10:] = True  # padding may be anything


def test_definitions():
    found, runs = meters(ACTIVE, SEGMENTS), list(documents(ACTIVE, SEGMENTS))
    tokens = np.concatenate(runs)
    assert len(runs) == 6
    assert found.tls == pytest.approx(1 - tokens.mean())
    for n in CHUNKS:
        assert found.cls[str(n)] == pytest.approx(naive_cls(runs, n)), n
        stream = np.concatenate([run[1:] for run in runs])
        assert found.cls_stream[str(n)] == pytest.approx(naive_cls([stream], n)), n
    pairs = [(a, b) for run in runs for a, b in itertools.pairwise(run) if a.any()]
    assert found.reuse == pytest.approx(np.mean([(a & b).sum() / a.sum() for a, b in pairs]))
    counts = tokens.sum(axis=-1)
    assert found.active.mean == pytest.approx(counts.mean())
    assert found.active.percentiles["95"] == np.percentile(counts, 95, method="inverted_cdf")
    assert found.tokens_by_active == pytest.approx(np.bincount(counts, minlength=21) / len(counts))
    assert found.load == pytest.approx(tokens.mean(axis=0))
    assert found.max_load == pytest.approx(tokens.mean(axis=0).max() / tokens.mean())
    assert (found.experts, found.shared, found.dead) == (20, 0, 0)


def test_batches_add_up():
    whole = meters(ACTIVE[1:], SEGMENTS[1:])
    first, second = totals_of(ACTIVE[1:2], SEGMENTS[1:2]), totals_of(ACTIVE[2:], SEGMENTS[2:])
    added = expert_meters([{name: first[name] + second[name] for name in first}])
    assert added.cls == pytest.approx(whole.cls)
    assert added.reuse == pytest.approx(whole.reuse)
    assert added.load == pytest.approx(whole.load)


def test_layers_are_pooled_by_tokens_chunks_and_pairs():
    layers = [ACTIVE, np.concatenate([ACTIVE, ACTIVE], axis=-1)[..., :25] & (np.arange(25) != 3)]
    pooled = expert_meters([totals_of(layer, SEGMENTS) for layer in layers] + [{}])
    alone = [meters(layer, SEGMENTS) for layer in layers]
    for n in ("1", "8", "64"):
        assert pooled.cls[n] == pytest.approx((20 * alone[0].cls[n] + 25 * alone[1].cls[n]) / 45), n
    assert pooled.active.mean == pytest.approx((alone[0].active.mean + alone[1].active.mean) / 2)
    assert (pooled.experts, pooled.dead, len(pooled.load)) == (45, 1, 45)
    assert expert_meters([{}, {}]) is None


def test_tls_is_cls_of_one_token_and_cls_falls_with_length():
    active = np.random.default_rng(1).random((2, 128, 12)) < 0.05
    found = meters(active)
    assert found.tls == found.cls["1"] == pytest.approx(1 - active.mean())
    values = list(found.cls.values())
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


@pytest.mark.parametrize(("k", "experts", "tls"), [(10, 48, 79.17), (6, 40, 85.0), (8, 48, 83.33), (10, 56, 82.14)])
@pytest.mark.parametrize("shared", [0, 2])
def test_top_k_routing(k, experts, tls, shared):
    """k experts a token, whichever: TLS is 1 - k / experts, shared ones counted in both."""
    draw = np.random.default_rng(2)
    order = np.argsort(draw.random((2, 64, experts - shared)), axis=-1)
    active = np.concatenate([np.ones((2, 64, shared), bool), order < k - shared], axis=-1)
    found = meters(active, shared=shared)
    assert percent(found.tls) == tls
    assert found.tokens_by_active[k] == 1
    assert found.cls["64"] < found.tls
    assert (found.experts, found.shared, len(found.load)) == (experts, shared, experts - shared)
    assert found.max_load < 2, "a shared expert would be experts / k above the mean"


@pytest.mark.parametrize(("k", "experts", "tls"), [(10, 48, 79.17), (6, 40, 85.0), (8, 48, 83.33), (10, 56, 82.14)])
def test_constant_routing(k, experts, tls):
    found = meters(np.broadcast_to(np.arange(experts) < k, (1, 64, experts)))
    assert {percent(value) for value in found.cls.values()} == {tls}
    assert found.cls_stream["32"] == pytest.approx(found.tls)
    assert found.reuse == 1
    assert found.dead == experts - k
    assert found.max_load == pytest.approx(experts / k)


def test_identical_tokens_within_chunks():
    """Chunks of 8 equal tokens: CLS_8 = TLS, longer chunks join different ones."""
    active = np.repeat(np.eye(16), 8, axis=0)[None]  # chunk c activates expert c
    found = meters(active)
    assert found.cls["8"] == found.tls == 1 - 1 / 16
    assert found.cls["16"] == 1 - 2 / 16


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_disjoint_experts(n):
    """n tokens with k experts of their own each: 1 - n k / E are never active."""
    k, experts = 2, 64
    active = np.repeat(np.eye(32), k, axis=1)[None]  # token t activates experts 2t and 2t + 1
    found = meters(active)
    assert found.cls[str(n)] == pytest.approx(1 - n * k / experts)
    assert found.reuse == 0


def test_tokens_without_experts():
    nothing = meters(np.zeros((1, 8, 4)))
    assert (nothing.tls, nothing.reuse, nothing.max_load, nothing.dead) == (1, None, None, 4)
    half = np.zeros((1, 4, 4))
    half[0, 1, :2] = half[0, 2, 1:] = 1  # pairs: token 1 keeps 1 of 2, token 2 none of 3; token 0 has none to keep
    assert meters(half).reuse == pytest.approx(1 / 4)


def test_short_documents_have_no_long_chunks():
    segments = np.repeat(np.arange(1, 5), 8)[None]
    found = meters(np.ones((1, 32, 4)), segments)
    assert found.cls["8"] == 0
    assert found.cls["16"] is None
    assert found.cls_stream["16"] == 0, "28 tokens follow another one"
    assert found.cls_stream["32"] is None


# On decoders

CONFIG = DecoderConfig(
    vocab_size=61,
    d_model=24,
    layers=3,
    max_seq_len=48,
    attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
    ffn=BlockFFNConfig(experts=8, expert_width=6, init_std=0.5),
)


def batches(count=2):
    draw = np.random.default_rng(4)
    for _ in range(count):
        segments = np.array([[1] * 20 + [2] * 28, [1] * 40 + [0] * 8, [1] * 48]).astype(np.int32)
        tokens = draw.integers(0, 61, (3, 48))
        positions = np.concatenate([np.arange(20), np.arange(28), np.arange(48), np.arange(48)]).reshape(3, 48)
        yield {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "segment_ids": segments,
            "positions": positions,
            "mask": segments > 0,
        }


def measured(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = Decoder(config, rngs=nnx.Rngs(0))
    return measure(model, config, batches()), model


@pytest.mark.slow
def test_every_layer_of_blockffn():
    found, model = measured()
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, **inputs: nnx.merge(graphdef, state)(record={"expert_scores"}, **inputs).records)
    recorded = [call(state, tokens_BT=b["tokens"], segment_ids=b["segment_ids"]) for b in batches()]
    for index, layer in enumerate(found.layers):
        runs = [
            run
            for records, batch in zip(recorded, batches(), strict=True)
            for run in documents(np.asarray(records["expert_scores"][index]) != 0, batch["segment_ids"])
        ]
        assert layer.experts.tls == pytest.approx(naive_cls(runs, 1))
        assert layer.experts.cls["8"] == pytest.approx(naive_cls(runs, 8))
        assert layer.experts.tls == pytest.approx(1 - layer.ffn.density), "every neuron of an active expert is active"
    assert found.experts.tls == pytest.approx(np.mean([layer.experts.tls for layer in found.layers]))
    assert found.as_dict()["experts"]["cls"]["64"] is None


@pytest.mark.slow
def test_statistics_of_training_agree():
    """Token density and reuse as training logs them are those of the meters; its chunks end with windows instead."""
    found, model = measured()
    logged = evaluate_model(model, batches()).stats
    for index, layer in enumerate(found.layers):
        assert logged["ffn_density"][index] == pytest.approx(1 - layer.experts.tls, rel=1e-5)
        assert logged["expert_reuse"][index] == pytest.approx(layer.experts.reuse, rel=0.02)  # a mean of batches' means


@pytest.mark.slow
@pytest.mark.parametrize("router", ["topk", "deepseek", "grin", "ling", "remoe", "topp"])
def test_every_router(router):
    found, model = measured(layers=1, ffn=MoEFFNConfig(experts=8, expert_width=6, k=3, router=router, router_std=0.5))
    experts = found.layers[0].experts
    assert experts.experts == 8
    assert experts.shared == (2 if router == "deepseek" else 0)
    assert experts.cls["16"] < experts.cls["2"] < experts.tls < 1
    assert found.sparsity(model.config).active_neurons == (pytest.approx((1 - experts.tls) * 8 * 6),)
    if router not in ("remoe", "topp"):
        assert experts.tls == pytest.approx(1 - 3 / 8)
        assert experts.tokens_by_active == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_dense_model():
    found, _ = measured(layers=1, ffn=GatedFFNConfig(d_ff=16))
    assert found.experts is None
    assert found.layers[0].experts is None
