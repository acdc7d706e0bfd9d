"""Mixture of experts as a layer of a decoder: dispatch, training with every router, state that is no parameter."""

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import DecoderConfig, bytes_per_token, count_parameters, dense_twin, flops_per_token
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.decoder import call_context
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.routers import RouterName
from tests.models.conftest import build

ROUTERS = get_args(RouterName)
BASE = DecoderConfig(
    vocab_size=61,
    d_model=24,
    layers=3,
    max_seq_len=48,
    layer_pattern=("local", "global"),
    attention=GQAConfig(heads=2, kv_heads=1, head_dim=8, window=7),
    ffn=MoEFFNConfig(experts=8, expert_width=6, k=4, router_std=0.5),
)


logits_of = nnx.jit(lambda model, tokens: model(tokens).logits)


def with_ffn(base=BASE, **changes) -> DecoderConfig:
    return dataclasses.replace(base, ffn=dataclasses.replace(base.ffn, **changes))


#: Layers that are all alike and so one program, where a test is about layers and not about what holds them.
ALIKE = dataclasses.replace(BASE, layers=2, layer_pattern=("global",))


@pytest.fixture(scope="module", params=ROUTERS)
def config(request):
    return with_ffn(BASE if request.param == "deepseek" else ALIKE, router=request.param)


@pytest.fixture(scope="module")
def result(config, tokens):
    graphdef, state = nnx.split(build(config))
    return jax.jit(lambda state: nnx.merge(graphdef, state)(tokens, record=["expert_scores"]))(state)


@pytest.mark.slow
def test_every_router_gives_its_losses_statistics_and_records(config, result):
    router = config.ffn.router
    usual = {"balance", "router_z"}
    expected = {"remoe": {"l1_balance"}, "topp": {*usual, "router_entropy"}}.get(router, usual)
    assert set(result.losses) == expected
    assert {"ffn_density", "chunk_density_8", "expert_reuse", "max_load"} <= set(result.stats)
    recorded = jnp.stack(result.records["expert_scores"])
    assert recorded.shape == (config.layers, 2, 30, 8)
    np.testing.assert_allclose(result.stats["ffn_density"], (recorded != 0).mean(axis=(1, 2, 3)), rtol=1e-5)
    if router in ("topk", "deepseek", "grin", "ling"):
        np.testing.assert_allclose(result.stats["ffn_density"], 4 / 8, rtol=1e-6)
    if router == "deepseek":
        np.testing.assert_array_equal(recorded[..., :2], 1)
        np.testing.assert_allclose(recorded[..., 2:].sum(-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_dispatch_forms_agree_in_the_model(tokens):
    def loss_and_grads(implementation):
        config = with_ffn(ALIKE, router="deepseek", gated=True, implementation=implementation)
        graphdef, state = nnx.split(build(config))

        def loss(state):
            out = nnx.merge(graphdef, state)(tokens)
            return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) - out.logits[..., 0]) + 0.1 * out.losses["balance"]

        return jax.jit(jax.value_and_grad(loss))(state)

    expected = loss_and_grads("dense")
    for implementation in ("ragged", "loop"):
        for a, b in zip(jax.tree.leaves(loss_and_grads(implementation)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_layer_by_hand(gated, tokens):
    """One layer's output is the weighted sum of its experts' outputs, shared experts beside them."""
    model = build(with_ffn(ALIKE, router="deepseek", gated=gated, implementation="loop"))
    ffn = model.unstacked().segments[0].blocks[0].ffn
    x = np.random.default_rng(0).normal(size=(1, 5, 24)).astype(np.float32)
    ctx = call_context(model.config, tokens[:1, :5])
    ctx.record = frozenset({"expert_scores"})
    y, aux = nnx.jit(lambda ffn, x: ffn(x, ctx))(ffn, x)
    up, down, shared_up, shared_down = (
        np.asarray(p[...], np.float64) for p in (ffn.up_EDW, ffn.down_EWD, ffn.shared_up_DF, ffn.shared_down_FD)
    )
    silu = lambda h: h / (1 + np.exp(-h))  # noqa: E731
    wide = np.asarray(x[0], np.float64)
    gates, shared_gate = (np.asarray(ffn.gate_EDW), np.asarray(ffn.shared_gate_DF)) if gated else (None, None)

    def hidden(up, gate):
        return silu(wide @ up) if gate is None else silu(wide @ gate) * (wide @ up)

    expected = hidden(shared_up, shared_gate) @ shared_down
    weights = np.asarray(aux.records["expert_scores"], np.float64)[0, :, 2:]
    for e in range(6):
        expected += weights[:, e : e + 1] * (hidden(up[e], None if gates is None else gates[e]) @ down[e])
    np.testing.assert_allclose(y[0], expected, atol=1e-5)


@pytest.mark.slow
def test_noise_needs_training_mode_and_follows_the_seed(tokens):
    model = build(with_ffn(ALIKE, router="grin", competition=2.0))
    calm = logits_of(model, tokens)
    np.testing.assert_array_equal(logits_of(model, tokens), calm)
    model.train()
    first, second = logits_of(model, tokens), logits_of(model, tokens)
    assert not np.array_equal(first, calm)
    assert not np.array_equal(first, second)
    again = build(with_ffn(ALIKE, router="grin", competition=2.0))
    again.train()
    np.testing.assert_array_equal(logits_of(again, tokens), first)
    model.eval()
    np.testing.assert_array_equal(logits_of(model, tokens), calm)


@pytest.mark.slow
def test_noise_is_the_same_scanned_and_unrolled(tokens):
    config = with_ffn(ALIKE, router="grin", competition=2.0)

    def trained(scan):
        model = build(dataclasses.replace(config, scan_layers=scan))
        model.train()
        return logits_of(model, tokens)

    np.testing.assert_allclose(trained(True), trained(False), atol=1e-4)


def test_no_two_layers_draw_the_same_experts(tokens):
    """Four layers in periods of two whose router knows nothing: what they take is noise alone."""
    model = build(dataclasses.replace(with_ffn(router="grin", router_std=0.0), layers=4))
    model.train()
    graphdef, state = nnx.split(model)
    draw = jax.jit(lambda state: nnx.merge(graphdef, state)(tokens, record=["expert_scores"]).records)
    taken = [np.asarray(scores) != 0 for scores in draw(state)["expert_scores"]]
    for one, other in itertools.combinations(taken, 2):
        assert (one == other).all(axis=-1).mean() < 0.2, "4 of 8 experts: 70 ways"


def test_initial_weights_of_experts():
    model = build(dataclasses.replace(with_ffn(router="deepseek", expert_std=0.3, router_std=0.02), layers=1))
    ffn = model.segments[0].blocks[0].ffn
    experts = ("up_EDW", "down_EWD", "shared_up_DF", "shared_down_FD")
    stds = {name: float(jnp.std(getattr(ffn, name)[...])) for name in (*experts, "router_DE")}
    assert stds == pytest.approx({**dict.fromkeys(experts, 0.3), "router_DE": 0.02}, rel=0.2)


def test_every_layer_has_random_numbers_of_its_own():
    segments = jnp.ones((1, 2), jnp.int32)
    ctx = CallContext(segments, segments, rng=jax.random.key(0))
    keys = {tuple(jax.random.key_data(ctx.folded(i).folded(j).rng).tolist()) for i in range(3) for j in range(2)}
    assert len(keys) == 6
    assert CallContext(segments, segments).folded(1).rng is None


def test_parameters_and_cost():
    for router in ROUTERS:
        config = with_ffn(router=router)
        routed, shared = (6, 2) if router == "deepseek" else (8, 0)
        ffn = 24 * (routed + 2 * 8 * 6)
        attention = 24 * 8 * (2 * 2 + 2)
        assert count_parameters(config).non_embedding == 3 * (attention + ffn + 2 * 24) + 24
        assert config.ffn.shared == shared
        # The router and 4 experts of 6 neurons, two matrices each; the target or as measured.
        assert config.ffn.weights(24) == 24 * (routed + 2 * 4 * 6)
        assert config.ffn.flops(24, active=12) == 2 * 24 * (routed + 2 * 12)
    gated = with_ffn(router="deepseek", gated=True)
    assert gated.ffn.weights(24) == 24 * (6 + 3 * 4 * 6)
    assert count_parameters(gated).total - count_parameters(with_ffn(router="deepseek")).total == 3 * 24 * 8 * 6
    assert count_parameters(gated).total - count_parameters(gated).active == 3 * 3 * 24 * 4 * 6
    assert with_ffn(router="topp").ffn.target_active is None
    assert flops_per_token(BASE, 8) > 0
    assert bytes_per_token(BASE, 8) > 0


def test_dense_twin():
    # BlockFFN's small size: a SwiGLU layer of 2,064 neurons has exactly the parameters.
    small = with_ffn(experts=48, expert_width=64)
    assert dense_twin(small).ffn.d_ff == 2064
    twin, own = count_parameters(dense_twin(small)), count_parameters(small)
    assert (twin.total, twin.embedding) == (own.total, own.embedding)
    assert twin.active == twin.total
    assert own.total - own.active == 3 * 2 * 24 * (48 - 4) * 64, "44 of 48 experts are idle"
    for router in ("topk", "deepseek"):
        odd = with_ffn(router=router)
        difference = count_parameters(dense_twin(odd)).total - count_parameters(odd).total
        assert abs(difference) <= 3 * 3 * 24 / 2, "half a neuron of three matrices in three layers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 9}, r"model.ffn.k=9: must be from 1 to 8"),
        ({"k": 2, "router": "deepseek"}, r"model.ffn.k=2: must be from 3 to 8"),
        ({"shared_experts": 8}, r"model.ffn.shared_experts=8: must be from 0 to 7"),
        ({"top_p": 1.0}, r"model.ffn.top_p=1.0"),
        ({"groups": 2}, r"model.ffn.groups=2: must be 1 for router=topk; ling has groups"),
        ({"router": "ling", "groups": 3}, r"model.ffn.groups=3: must divide the 8 routed experts into groups of at"),
        ({"router": "ling", "groups": 8, "kept_groups": 4}, r"model.ffn.groups=8: must divide"),
        ({"router": "ling", "groups": 4, "kept_groups": 5}, r"model.ffn.kept_groups=5: must be from 1 to 4 groups"),
        ({"router": "ling", "groups": 4}, r"model.ffn.kept_groups=1: must hold 4 experts for a token, not 2"),
        ({"router": "remoe", "implementation": "loop"}, r"model.ffn.implementation=loop: must be dense or None"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_ffn(**changes)
