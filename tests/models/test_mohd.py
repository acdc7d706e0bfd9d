"""MoHD: routing, gates, fusion, the two forms of its maps, its limits (vanilla models), and its accounting."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import mohd as presets
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.huggingface.layouts import write_model
from sparsezoo_jax.models import (
    DecoderConfig,
    activated_parameters,
    bytes_per_token,
    count_parameters,
    dense_twin,
    flops_per_token,
)
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext, InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.mohd import BlockRouter, Fusion, MoHDConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.spark import SparkAttentionConfig
from tests.models.conftest import build, forward

BASE = DecoderConfig(
    vocab_size=61,
    d_model=32,
    layers=2,
    max_seq_len=48,
    attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
    ffn=GatedFFNConfig(d_ff=24, activation="silu"),
    residual=MoHDConfig(blocks=8, active=4, shared=2, router_std=0.5),
)


def with_residual(config=BASE, **changes) -> DecoderConfig:
    return dataclasses.replace(config, residual=dataclasses.replace(config.residual, **changes))


def with_parameters_of(config, source):
    """The decoder of `config` with the corner of each of `source`'s parameters that it has room for."""
    model = build(config)
    given = {path: value[...] for path, value in nnx.to_flat_state(nnx.state(source, nnx.Param))}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = given[path][tuple(slice(0, n) for n in variable.shape)]
        nnx.update(model, nnx.from_flat_state([(path, variable)]))
    return model


ONE = dataclasses.replace(BASE, layers=1)


def recorded(config, tokens):
    """The output of a decoder with the residual stream and the sublayers' inputs."""
    graphdef, state = nnx.split(build(config))
    names = ("residual", "sublayer_input")
    return jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens, record=names))(state, tokens)


def blocks_read(inputs):
    """Booleans [2, B, T, N]: the blocks of width 4 that attention and feed-forward network see."""
    return (np.asarray(inputs).reshape(*inputs.shape[:3], 8, 4) != 0).any(-1)


def with_fusion(model):
    """The model with fusions that do something."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "across_QPP":
            variable[...] = 0.3 * jax.random.normal(jax.random.key(5), variable.shape)
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
    return model


# --- Limits: what must be a vanilla model.


@pytest.mark.parametrize("implementation", ["dense", "loop"])
def test_all_of_the_width_without_gates_and_fusion_is_a_vanilla_model_bit_for_bit(tokens, implementation):
    config = with_residual(active=8, shared=8, shared_gate="hard", fusion="none", implementation=implementation)
    model = build(config)
    vanilla = with_parameters_of(dataclasses.replace(config, residual=PreNormConfig()), model)
    np.testing.assert_array_equal(forward(model)(tokens).logits, forward(vanilla)(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("post_norm", [False, True])
def test_shared_blocks_alone_are_a_narrower_vanilla_model(tokens, post_norm):
    config = with_residual(
        active=4,
        shared=4,
        shared_gate="hard",
        fusion="none",
        norm_after_mask=True,
        masked_head=True,
        post_norm=post_norm,
    )
    model = build(config)
    narrow = with_parameters_of(
        dataclasses.replace(config, d_model=16, residual=PreNormConfig(post_norm=post_norm)), model
    )
    expected = forward(narrow)(tokens).logits
    np.testing.assert_allclose(forward(model)(tokens).logits, expected, atol=1e-5)
    fused = with_fusion(
        build(dataclasses.replace(config, residual=dataclasses.replace(config.residual, fusion="monarch")))
    )
    nnx.update(fused, nnx.state(model, nnx.Param))
    assert np.abs(forward(fused)(tokens).logits - expected).max() > 1e-3, "fusion carries information between blocks"


# --- The two forms.


def loss_and_gradients(config, tokens):
    graphdef, state = nnx.split(with_fusion(build(config)))

    def loss(state):
        out = nnx.merge(graphdef, state)(tokens)
        cross_entropy = jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) - out.logits[..., 0])
        return cross_entropy + 0.1 * out.losses["width_balance"], out.logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    return value, logits, {path: x[...] for path, x in nnx.to_flat_state(gradients)}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"masked_head": True}, {"output_blocks": "routed", "routers": "layer"}], ids=str)
def test_grouped_forms_equal_the_masked_one(tokens, changes):
    # Small initial weights, as models start: with unit variance throughout, rounding grows 20-fold on its way.
    calm = dataclasses.replace(BASE, init=InitConfig(kind="fixed", scale=0.05, embedding_std=1.0))
    value, logits, gradients = loss_and_gradients(with_residual(calm, **changes, implementation="dense"), tokens)
    assert all(gradient.any() for path, gradient in gradients.items() if path[-1] == "centroids_DN")
    for implementation in ("loop", "ragged"):
        found = loss_and_gradients(with_residual(calm, **changes, implementation=implementation), tokens)
        assert found[0] == pytest.approx(float(value), rel=1e-5)
        np.testing.assert_allclose(found[1], logits, atol=1e-5 * float(jnp.abs(logits).max()))
        for path, expected in gradients.items():
            # Float32 sums in another order; a block too many or too few would be of the size of the whole.
            error, size = jnp.linalg.norm(found[2][path] - expected), jnp.linalg.norm(expected)
            assert float(error) <= 1e-5 * float(size) + 1e-6, path


@pytest.mark.slow
def test_decoding_reads_only_the_slabs_of_active_blocks(tokens):
    """A decode step is the same with nothing but nan in the weights of the other blocks."""
    model = build(with_residual(ONE, fusion="none")).unstacked()
    token, cache = tokens[:1, :1], model.init_cache(1, 8)
    graphdef, saved = nnx.split(model)
    step = jax.jit(lambda state: nnx.merge(graphdef, state)(token, cache=cache, record=("sublayer_input",)))
    saved = jax.tree.map(jnp.array, saved)
    out = step(saved)
    used = blocks_read(out.records["sublayer_input"][0])[:, 0, 0]
    np.testing.assert_array_equal(used.sum(-1), 4)
    block = model.segments[0].blocks[0]
    sides = {
        0: [(block.attention.projections, name) for name in ("q_DNH", "k_DKH", "v_DKH", "o_NHD")],
        1: [(block.ffn, name) for name in ("gate_DF", "up_DF", "down_FD")],
    }

    def spoilt(blocks_of):
        """Logits with nan in the weights of the blocks that `blocks_of` gives for each sublayer."""
        for sublayer, weights in sides.items():
            bad = jnp.repeat(blocks_of(sublayer), 4)
            for module, name in weights:
                weight = getattr(module, name)
                leading = name.partition("_")[2].startswith("D")
                shape = (32, *(1,) * (weight.ndim - 1)) if leading else (32,)
                weight[...] = jnp.where(bad.reshape(shape), jnp.nan, weight[...])
        logits = step(nnx.state(model)).logits
        nnx.update(model, saved)
        return logits

    np.testing.assert_array_equal(spoilt(lambda sublayer: ~used[sublayer]), out.logits)
    for sublayer in sides:
        first = jnp.arange(8) == jnp.argmax(used[sublayer])
        assert np.isnan(spoilt(lambda s, sublayer=sublayer, first=first: first & (s == sublayer))).any()


# --- Router and gates.


def router_of(config):
    """A router over a stream as wide as there are blocks, whose scores are its input if centroids are the identity."""
    model = dataclasses.replace(BASE, d_model=config.blocks, residual=config)
    router = BlockRouter(config, model.build_context(), nnx.Rngs(0))
    router.centroids_DN[...] = jnp.eye(config.blocks)
    return router


def context(segments_BT):
    segments_BT = jnp.asarray(segments_BT)
    return CallContext(jnp.zeros_like(segments_BT), segments_BT)


def chosen_by_hand(z_N, config):
    """Active blocks of a token with these scores."""
    order = np.argsort(-z_N[config.shared :], kind="stable")[: config.routed] + config.shared
    return np.isin(np.arange(config.blocks), [*range(config.shared), *order])


def gates_by_hand(z_N, active_N, config):
    affinity = np.exp(z_N - z_N.max())
    g = affinity / affinity.sum() * active_N
    first = config.shared if config.shared_gate == "hard" else 0
    soft, delta = g[first:], config.active / config.blocks
    match config.scale_mode:
        case "rms" | "mean":
            soft = (config.active - first) * soft / soft.sum()
        case "y_literal":
            soft = config.blocks * soft.sum() * soft
    a = {"rms": delta**-0.5, "mean": 1 / delta}.get(config.scale_mode, 1)
    return (1 if config.norm_after_mask else a) * np.concatenate([np.ones(first), soft])


SCORES = np.random.default_rng(0).normal(size=(2, 5, 8))


@pytest.mark.slow
@pytest.mark.parametrize("shared_gate", ["soft", "hard"])
@pytest.mark.parametrize("scale", ["rms", "mean", "y_literal", "none"])
@pytest.mark.parametrize("norm_after_mask", [False, True])
def test_gates_and_their_gradient(scale, shared_gate, norm_after_mask):
    config = MoHDConfig(
        blocks=8, active=5, shared=2, scale_mode=scale, shared_gate=shared_gate, norm_after_mask=norm_after_mask
    )
    router, ctx = router_of(config), context(np.ones((2, 5), int))
    chosen, _ = router(jnp.asarray(SCORES, jnp.float32), ctx)
    weight = np.random.default_rng(1).normal(size=SCORES.shape)
    gradient = jax.grad(lambda z: jnp.sum(router(z, ctx)[0].gates_BTN * weight))(jnp.asarray(SCORES, jnp.float32))
    for i in np.ndindex(2, 5):
        z, active = SCORES[i], chosen_by_hand(SCORES[i], config)
        np.testing.assert_array_equal(chosen.active_BTN[i], active)
        assert set(np.asarray(chosen.routed_BTK[i])) == set(np.flatnonzero(active)[2:])
        np.testing.assert_allclose(chosen.gates_BTN[i], gates_by_hand(z, active, config), rtol=1e-5)
        # The choice is constant, the kept affinities are not: differences of the formula with the same blocks.
        for n in range(8):
            step = 1e-5 * (np.arange(8) == n)
            up, down = (gates_by_hand(z + sign * step, active, config) for sign in (1, -1))
            assert gradient[(*i, n)] == pytest.approx((up - down) @ weight[i] / 2e-5, abs=2e-5)


def test_uniform_affinities_keep_energy_or_sum():
    for scale, total, power in (("rms", 8, 2), ("mean", 8, 1), ("y_literal", 8 * (3 / 8) ** 2, 1), ("none", 3 / 8, 1)):
        config = MoHDConfig(blocks=8, active=3, shared=1, scale_mode=scale)
        chosen, _ = router_of(config)(jnp.zeros((1, 4, 8)), context(np.ones((1, 4), int)))
        np.testing.assert_allclose(jnp.sum(chosen.gates_BTN**power, axis=-1), total, rtol=1e-6)


def balance_of(config, scores, segments):
    return router_of(config)(jnp.asarray(scores, jnp.float32), context(segments))[1].losses["width_balance"]


def test_balance_loss():
    config = MoHDConfig(blocks=8, active=5, shared=2)
    segments = np.array([[1, 1, 1, 2, 0], [1, 1, 0, 0, 0]])
    assert balance_of(config, np.zeros((2, 5, 8)), segments) == pytest.approx(1)
    affinity = np.exp(SCORES) / np.exp(SCORES).sum(-1, keepdims=True)
    real = segments > 0
    taken = np.stack([chosen_by_hand(z, config) for z in SCORES[real]])[:, 2:]
    f = 6 / (3 * real.sum()) * taken.sum(0)
    special = affinity[real][:, 2:]
    p = (special / special.sum(-1, keepdims=True)).mean(0)
    assert balance_of(config, SCORES, segments) == pytest.approx(f @ p, rel=1e-5)
    other = dataclasses.replace(config, balance="unnormalised")
    assert balance_of(other, SCORES, segments) == pytest.approx(6 * taken.mean(0) @ special.mean(0), rel=1e-5)
    collapsed = np.broadcast_to([0, 0, 9, 9, 9, -9, -9, -9], (2, 5, 8))
    assert balance_of(config, collapsed, segments) == pytest.approx(2, rel=1e-3), "half of the routed blocks take all"


@pytest.mark.slow
def test_bias_evens_out_loads_without_moving_gates():
    config = with_residual(balance="bias", bias_rate=0.25, masked_head=True)
    model = build(config)
    out = forward(model)(jnp.zeros((1, 6), jnp.int32))
    model.after_step(out.observed, jax.random.key(0))
    for layer in range(2):
        for name in ("attention_residual", "ffn_residual"):
            load = out.observed[layer][name]["router"]["load"]
            bias = getattr(model.segments[0].blocks[0], name).router.bias_E[...][layer]
            np.testing.assert_allclose(bias, 0.25 * np.sign(np.mean(load) - load))
    np.testing.assert_allclose(np.abs(model.head.router.bias_E[...]), 0.25)
    router = router_of(MoHDConfig(blocks=8, active=5, shared=2, balance="bias"))
    router.bias_E[...] = jnp.array([9.0, 0, 0, 0, 0, 9])
    chosen, _ = router(jnp.asarray(SCORES, jnp.float32), context(np.ones((2, 5), int)))
    assert chosen.active_BTN[..., [2, 7]].all()
    for i in np.ndindex(2, 5):
        expected = gates_by_hand(SCORES[i], np.asarray(chosen.active_BTN[i]), router.config)
        np.testing.assert_allclose(chosen.gates_BTN[i], expected, rtol=1e-5)


def test_warmup_goes_from_all_blocks_to_the_active_ones():
    config = MoHDConfig(blocks=8, active=4, shared=2, warmup_steps=4, implementation="dense")
    router, ctx = router_of(config), context(np.ones((2, 5), int))
    z, counts = jnp.asarray(SCORES, jnp.float32), []
    for _ in range(6):
        chosen, aux = router(z, ctx)
        count = np.asarray(chosen.active_BTN.sum(-1))
        counts.append(int(count[0, 0]))
        assert (count == count[0, 0]).all()
        np.testing.assert_allclose(jnp.mean(chosen.gates_BTN, axis=-1), np.sqrt(count / 8), rtol=1e-5)
        router.after_step(aux.observed, jax.random.key(0))
    assert counts == [8, 7, 6, 5, 4, 4]


def test_initial_weights_scale_by_the_active_inputs_or_all():
    active, everything = (
        nnx.to_flat_state(nnx.state(build(with_residual(ONE, init_fan_in=name)), nnx.Param))
        for name in ("active", "all")
    )
    for (path, ours), (_, theirs) in zip(active, everything, strict=True):
        reads_stream = path[-1] in ("q_DNH", "k_DKH", "v_DKH", "gate_DF", "up_DF")
        factor = (4 / 8) ** 0.5 if reads_stream else 1
        np.testing.assert_allclose(theirs[...], factor * ours[...], rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize(("blocks", "active", "shared"), [(16, 6, 2), (16, 16, 3), (37, 1, 0), (8, 7, 7), (24, 14, 9)])
def test_warmup_rounds_up_whole_numbers(blocks, active, shared):
    rng = np.random.default_rng(0)
    for warmup in (1, 10, 100, 999, 10**6, 2**31 - 2):
        at = np.sort(np.append(rng.integers(0, warmup + 2, 1000), [warmup])) if warmup > 999 else np.arange(1001)
        config = MoHDConfig(blocks=blocks, active=active, shared=shared, warmup_steps=warmup, implementation="dense")
        left = [max(Fraction(warmup - int(step), warmup), 0) for step in at]
        expected = [active - shared + math.ceil((blocks - active) * share) for share in left]
        np.testing.assert_array_equal(config.routed_at(jnp.asarray(at, jnp.int32)), expected)
        # As the router asks: float32 numbers of one step were rounded in other ways than those of many.
        for step in range(12):
            assert at[step] != step or config.routed_at(jnp.int32(step)) == expected[step]


@pytest.mark.slow
def test_a_random_router_does_not_learn(tokens):
    """One that is learned does: `test_grouped_forms_equal_the_masked_one`."""
    gradients = loss_and_gradients(with_residual(ONE, router="random", implementation="dense"), tokens)[2]
    centroids = [gradient for path, gradient in gradients.items() if path[-1] == "centroids_DN"]
    assert len(centroids) == 2
    assert not any(gradient.any() for gradient in centroids)


def test_one_router_for_a_layer(tokens):
    masked = with_residual(ONE, implementation="dense")
    for inputs in recorded(with_residual(routers="layer", implementation="dense"), tokens).records["sublayer_input"]:
        attention, ffn = blocks_read(inputs)
        np.testing.assert_array_equal(attention, ffn)
    attention, ffn = blocks_read(recorded(masked, tokens).records["sublayer_input"][0])
    assert (attention != ffn).any()


def test_only_active_blocks_are_written(tokens):
    # The masked form: of the grouped ones nothing but active blocks comes back from a sublayer.
    out = recorded(with_residual(fusion="none", implementation="dense"), tokens)
    before, after = out.records["residual"]
    reads = blocks_read(out.records["sublayer_input"][1])
    changed = (np.asarray(after - before).reshape(2, 30, 8, 4) != 0).any(-1)
    np.testing.assert_array_equal(changed, reads.any(0))
    np.testing.assert_allclose(out.stats["width_density"], 0.5)
    aside = recorded(with_residual(ONE, fusion="none", sublayers="attention"), tokens)
    attention, ffn = blocks_read(aside.records["sublayer_input"][0])
    assert (attention.sum(-1) == 4).all()
    assert ffn.all()


# --- Fusion.


@pytest.mark.parametrize(("kind", "groups"), [("monarch", 4), ("square", 6), ("block_diagonal", 4)])
def test_fusion_is_its_matrix(kind, groups):
    config = dataclasses.replace(BASE, d_model=36, residual=MoHDConfig(blocks=4, active=2, shared=1, fusion=kind))
    fusion, size = Fusion(config.residual, config.build_context()), 36 // groups
    y = jax.random.normal(jax.random.key(0), (2, 3, 36))
    np.testing.assert_array_equal(fusion(y), y)
    fusion.within_PQQ[...] = jax.random.normal(jax.random.key(1), (groups, size, size))
    matrix = np.zeros((36, 36))
    for p, block in enumerate(fusion.within_PQQ[...]):
        matrix[p * size : (p + 1) * size, p * size : (p + 1) * size] = block
    if kind != "block_diagonal":
        fusion.across_QPP[...] = jax.random.normal(jax.random.key(2), (size, groups, groups))
        across, permutation = np.zeros((36, 36)), np.zeros((36, 36))
        for j, block in enumerate(fusion.across_QPP[...]):
            across[j * groups : (j + 1) * groups, j * groups : (j + 1) * groups] = block
        for p, j in np.ndindex(groups, size):
            permutation[j * groups + p, p * size + j] = 1
        matrix = permutation.T @ across @ permutation @ matrix
    np.testing.assert_allclose(fusion(y), y + y @ matrix.T, rtol=1e-4, atol=1e-4)
    assert (
        count_parameters(config).total
        == config.layers * 2 * config.residual.fusion_weights(36)
        + count_parameters(with_residual(config, fusion="none")).total
    )


# --- Accounting (section 9 of the reconstruction in docs/mohd.md).


def block_weights(base):
    width, d_ff, layers = presets.BASES[base]
    return layers * (4 * width * width + 3 * width * d_ff)


@pytest.mark.parametrize("base", presets.BASES)
@pytest.mark.parametrize("variant", presets.VARIANTS)
def test_parameters_and_activated_ones(base, variant):
    width, _, layers = presets.BASES[base]
    times, blocks, active, _ = presets.VARIANTS[variant]
    model, d = presets.PRESETS[f"{base}_{variant}"].model, times * width
    delta, near = active / blocks, model.residual.fusion_shape(d)
    b, routers, fusion = block_weights(base), layers * 2 * blocks * d, layers * 2 * d * sum(near)
    norms = (2 * layers + 1) * d
    assert count_parameters(model).non_embedding == times * b + routers + fusion + norms
    found = activated_parameters(model)
    assert found.layers == pytest.approx(delta * times * b + routers + delta * fusion, rel=1e-12)
    assert found.head == 32_000 * d
    masked = activated_parameters(with_residual(model, masked_head=True))
    assert masked.head == delta * d * 32_000 + blocks * d
    if variant[0] == "x":
        assert delta * times == pytest.approx(1)
    assert flops_per_token(model, 1) - flops_per_token(dense_twin(model), 1) == pytest.approx(
        2 * (found.layers - times * b), rel=1e-9
    )
    assert bytes_per_token(model, 1) > 2 * found.layers


def test_sizes_of_the_paper():
    assert block_weights("355m") == pytest.approx(289.4e6, rel=1e-3)
    assert block_weights("1_13b") == pytest.approx(1006.6e6, rel=1e-3)
    # Untied embeddings of 32,000 words, as the vanilla models have them.
    for base, total in (("355m", 354.99e6), ("495m", 494.7e6), ("1_13b", 1137.8e6)):
        width, _, layers = presets.BASES[base]
        assert block_weights(base) + (2 * layers + 1) * width + 2 * 32_000 * width == pytest.approx(total, rel=1e-3)
    for variant, routers, fusion in (("x2", 1.6e6, 8.9e6), ("x3", 2.4e6, 16.4e6), ("x4", 3.1e6, 25.2e6)):
        residual, d = presets.PRESETS[f"355m_{variant}"].model.residual, 1024 * int(variant[1])
        # Those figures are for 16 blocks and sqrt(D) groups; 2,048 and 3,072 are no squares.
        assert 24 * 2 * 16 * d == pytest.approx(routers, rel=0.02)
        assert 24 * 2 * residual.fusion_weights(d) == pytest.approx(fusion, rel=0.07)


# --- Mistakes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": 9}, r"model.residual.active=9: must be from 1 to 8"),
        ({"shared": 5}, r"model.residual.shared=5: must be from 0 to 4"),
        ({"blocks": 12}, r"model.residual.blocks=12: must divide model.d_model=32"),
        ({"router_std": -1.0}, r"model.residual.router_std=-1.0"),
        ({"warmup_steps": 3}, r"model.residual.implementation=None: must be dense with warmup_steps"),
        ({"routers": "layer", "sublayers": "ffn"}, r"model.residual.routers=layer"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        with_residual(**changes)


def test_kinds_that_need_all_of_the_width():
    spark = SparkAttentionConfig(heads=2, kv_heads=1, head_dim=8, top_k=4, r=4)
    with pytest.raises(ConfigError, match=r"model.attention.kind=spark: needs all of the width"):
        dataclasses.replace(BASE, attention=spark)
    assert with_residual(sublayers="ffn").residual.active_width(32, "attention") == 32
    dataclasses.replace(with_residual(sublayers="ffn"), attention=spark)


def test_no_hugging_face_layout_holds_it():
    with pytest.raises(UserError, match=r"model.residual.kind=mohd: only pre_norm"):
        write_model(BASE, "there")
