"""MoE-X against a worked example, its invariances, and its equivalences with a wide MLP and a dense one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import bytes_per_token, count_parameters, dense_twin, flops_per_token
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig, first_choice_balance, gate_statistics, sparsity_scores
from sparsezoo_jax.models.routers import Routing, top_k
from tests.models.conftest import CONFIGS, build

# Three experts of four neurons over three inputs: rows of W_enc are neurons, those of W_dec outputs.
X = np.array([1, -2, 0.5])
W_ENC = np.array(
    [
        [[0.5, -0.2, 0.1], [0.3, 0.4, -0.6], [-0.1, 0.2, 0.7], [0.6, -0.5, 0.2]],
        [[-0.4, 0.1, 0.2], [0.2, -0.3, 0.5], [-0.6, 0.8, -0.1], [0.0, 0.4, -0.2]],
        [[0.1, 0.1, 0.1], [-0.2, 0.3, -0.4], [0.5, -0.6, 0.2], [-0.3, 0.2, 0.1]],
    ]
)
W_DEC = np.array(
    [
        [[1, 0, 2, -1], [0, 1, 0, 1], [0.5, 0.5, -0.5, 0.5]],
        [[0, 1, 0, 1], [1, 0, -1, 0], [2, 0, 0, 1]],
        [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]],
    ]
)
UP, DOWN = W_ENC.swapaxes(1, 2), W_DEC.swapaxes(1, 2)  # [E, D, W] and [E, W, D]
FIXTURE = MoEXFFNConfig(experts=3, expert_width=4, k=2, score_eps=1e-12)
BASE = dataclasses.replace(CONFIGS["moex"], layers=3)


def context(shape=(1, 1), record=()):
    ones = jnp.ones(shape, jnp.int32)
    return CallContext(jnp.zeros(shape, jnp.int32), ones, record=frozenset(record))


def layer(config=FIXTURE, up=UP, down=DOWN, dtype=jnp.float32):
    """The FFN of `config` with these weights."""
    kind = jnp.dtype(dtype)
    ffn = config.build(BuildContext(up.shape[1], 1, InitConfig(), kind, kind), nnx.Rngs(0))
    ffn.up_EDW[...], ffn.down_EWD[...] = jnp.asarray(up, dtype), jnp.asarray(down, dtype)
    return ffn


# Compiled as one: op by op each of these would be dozens of programs.
@partial(nnx.jit, static_argnames="record")
def output(ffn, x, record=()):
    y, aux = ffn(x.reshape(1, -1, x.shape[-1]), context((1, x.size // x.shape[-1]), record))
    return y.reshape(x.shape), aux


@nnx.jit
def routed(ffn, x):
    """Scores and routing of tokens."""
    return ffn.scores(x), ffn.route(x)


def scores_of(ffn, x):
    return routed(ffn, jnp.asarray(x))[0]


def route(ffn, x):
    return routed(ffn, jnp.asarray(x))[1]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# ------------------------------------------------------------------------------------------------ the worked example


def test_gate_by_hand(x64):
    mean, variance = gate_statistics(jnp.asarray(UP))
    np.testing.assert_allclose(mean @ X, [0.425, -0.65, 0.025], atol=1e-12)
    np.testing.assert_allclose(variance @ X**2, [0.613125, 0.76875, 0.610625], atol=1e-12)
    np.testing.assert_allclose(np.sqrt(variance @ X**2), [0.78302299, 0.87678390, 0.78142498], atol=1e-8)
    scores = sparsity_scores(jnp.asarray(X), mean, variance, eps=1e-12)
    np.testing.assert_allclose(scores, [-0.41271061, 0.54151616, -0.02552223], atol=1e-8)
    np.testing.assert_allclose(4 * (1 - scores) / 2, [2.82542122, 0.91696768, 2.05104447], atol=1e-8)
    np.testing.assert_array_equal((W_ENC @ X > 0).sum(-1), [2, 1, 1])
    routing = route(layer(dtype=jnp.float64), X)
    np.testing.assert_allclose(routing.weights_BTE, [0, 0.63807952, 0.36192048], atol=1e-8)
    np.testing.assert_array_equal(routing.experts_BTK, [1, 2])


def test_the_rootless_variant_is_another(x64):
    literal = scores_of(layer(dataclasses.replace(FIXTURE, literal=True), dtype=jnp.float64), X)
    np.testing.assert_allclose(literal, [-0.51179727, 0.60218415, -0.03265759], atol=1e-8)
    assert np.abs(literal - scores_of(layer(dtype=jnp.float64), X)).max() > 0.09


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "ragged", "loop"])
def test_output_by_hand(implementation, x64):
    ffn = layer(dataclasses.replace(FIXTURE, implementation=implementation), dtype=jnp.float64)
    y, aux = output(ffn, jnp.asarray(X), record=("ffn_gate", "ffn_scores", "expert_scores"))
    np.testing.assert_allclose(y, [0.6699835, 0.65145686, 0.65145686], atol=1e-7)
    features = ffn.features(jnp.asarray(X))
    np.testing.assert_allclose(y, features @ ffn.dictionary, atol=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(features), [5, 10])
    np.testing.assert_allclose(features[jnp.array([5, 10])], [0.6699835, 0.65145686], atol=1e-7)
    np.testing.assert_allclose(aux.records["ffn_gate"][0, 0], features, atol=1e-15)
    np.testing.assert_allclose(aux.records["ffn_scores"][0, 0], (W_ENC @ X).reshape(-1), atol=1e-15)
    np.testing.assert_allclose(aux.records["expert_scores"][0, 0], [0, 0.63807952, 0.36192048], atol=1e-8)
    assert aux.stats["l0"] == 2
    assert aux.stats["ffn_density"] == pytest.approx(2 / 12)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "ragged", "loop"])
def test_gradients_go_through_the_statistics(implementation, x64):
    ffn = layer(dataclasses.replace(FIXTURE, implementation=implementation), dtype=jnp.float64)
    grads = nnx.jit(nnx.grad(lambda ffn: jnp.sum(output(ffn, jnp.asarray(X))[0])))(ffn)
    by_neuron = np.asarray(grads["up_EDW"][...]).swapaxes(1, 2)
    # Of expert 2 neuron 0 is inactive: what reaches its weights came through the gate.
    got = [by_neuron[e, m, i] for e, m, i in ((0, 0, 0), (1, 0, 0), (1, 2, 1), (2, 0, 0), (2, 1, 1), (2, 3, 2))]
    expected = [0, 0.08457047, -0.01423299, -0.14978318, 0.30787057, -0.07496848]
    np.testing.assert_allclose(got, expected, atol=1e-8)
    np.testing.assert_allclose(by_neuron[0], 0, atol=1e-15)


# ----------------------------------------------------------------------------------------------------- invariances


def random_layer(seed=0, experts=8, d=16, width=32, **changes):
    keys = jax.random.split(jax.random.key(seed), 3)
    mean = 0.3 * jax.random.normal(keys[0], (experts, d, 1))
    up = mean + jax.random.normal(keys[1], (experts, d, width))
    down = jax.random.normal(keys[2], (experts, width, d)) / width**0.5
    return layer(MoEXFFNConfig(experts=experts, expert_width=width, **changes), np.asarray(up), np.asarray(down))


def tokens_of(n=64, d=16):
    return jax.random.normal(jax.random.key(9), (n, d))


def test_scores_depend_on_directions_only():
    ffn, x = random_layer(), tokens_of()
    scores = scores_of(ffn, x)
    close = {"rtol": 1e-4, "atol": 1e-5}  # sums of 32 float32 products
    np.testing.assert_allclose(scores_of(ffn, 7.5 * x), scores, **close)
    np.testing.assert_allclose(scores_of(ffn, -x), -scores, **close)
    assert (np.abs(scores) < 1).all()
    up = ffn.up_EDW[...]
    ffn.up_EDW[...] = up.at[3].multiply(2.5)
    np.testing.assert_allclose(scores_of(ffn, x), scores, **close)
    ffn.up_EDW[...] = up[..., jax.random.permutation(jax.random.key(1), 32)]
    np.testing.assert_allclose(scores_of(ffn, x), scores, **close)
    order = jax.random.permutation(jax.random.key(2), 8)
    weights = route(layer(ffn.config, np.asarray(up), np.asarray(ffn.down_EWD[...])), x).weights_BTE
    ffn.up_EDW[...] = up[order]
    np.testing.assert_allclose(route(ffn, x).weights_BTE, weights[:, order], **close)


def test_literal_scores_depend_on_the_scale():
    ffn, x = random_layer(literal=True), tokens_of()
    assert np.abs(scores_of(ffn, 2 * x) - scores_of(ffn, x)).max() > 0.05


def test_weights_of_two_experts_are_bounded():
    ffn, x = random_layer(), 100 * tokens_of(512)
    weights = np.asarray(route(ffn, x).weights_BTE)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal((weights != 0).sum(-1), 2)
    kept = weights[weights != 0]
    assert kept.min() >= 0.11920292
    assert kept.max() <= 0.88079708
    alone = np.asarray(route(random_layer(k=1), x).weights_BTE)
    np.testing.assert_array_equal(np.sort(alone, axis=-1)[:, -1], 1)
    np.testing.assert_array_equal((alone != 0).sum(-1), 1)


def test_scores_predict_the_sparsity_of_gaussian_experts():
    d, width, experts = 64, 8192, 8
    rng = np.random.default_rng(0)
    mean = 0.02 * rng.normal(size=(experts, d, 1))
    up = mean + rng.uniform(0.02, 0.03, size=(experts, d, 1)) * rng.normal(size=(experts, d, width))
    x = rng.normal(size=(32, d))
    scores = np.asarray(sparsity_scores(jnp.asarray(x, jnp.float32), *gate_statistics(jnp.asarray(up, jnp.float32))))
    l0 = (np.einsum("nd,edw->new", x, up) > 0).sum(-1)
    law = norm.cdf(np.einsum("nd,ed->ne", x, up.mean(-1)) / np.sqrt(np.einsum("nd,ed->ne", x**2, up.var(-1))))
    np.testing.assert_allclose((1 - scores) / 2, law, atol=1e-5)
    error = np.abs(l0 / width - (1 - scores) / 2)
    assert error.mean() <= 0.004
    assert error.max() <= 0.0166
    assert np.corrcoef(scores.ravel(), l0.ravel())[0, 1] < -0.999


# ---------------------------------------------------------------------------------------------------- equivalences


def dense_layer(up, down):
    ctx = BuildContext(up.shape[0], 1, InitConfig(), jnp.dtype("float32"), jnp.dtype("float32"))
    dense = PlainFFNConfig(d_ff=up.shape[1], activation="relu").build(ctx, nnx.Rngs(0))
    dense.up_DF[...], dense.down_FD[...] = up, down
    return dense


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 8])
def test_copies_of_a_dense_layer_are_that_layer(k):
    rng = np.random.default_rng(0)
    dense = dense_layer(*(jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for shape in ((16, 32), (32, 16))))
    weights = {"up_DF": dense.up_DF[...], "down_FD": dense.down_FD[...]}
    config = MoEXFFNConfig(expert_width=32, k=k)
    x = tokens_of()

    def upcycled(noise):
        made = config.upcycled(dense.config, weights, noise, jax.random.key(0))
        return layer(config, np.asarray(made["up_EDW"]), np.asarray(made["down_EWD"]))

    twin = upcycled(0.0)
    np.testing.assert_array_equal(scores_of(twin, x), np.broadcast_to(scores_of(twin, x)[:, :1], (64, 8)))
    np.testing.assert_array_equal(route(twin, x).experts_BTK, np.broadcast_to(np.arange(k), (64, k)))
    np.testing.assert_allclose(output(twin, x)[0], output(dense, x)[0], atol=1e-6)
    noisy = upcycled(0.02)
    assert (np.std(scores_of(noisy, x), axis=-1) > 1e-5).all()
    if k < 8:
        assert len(np.unique(route(noisy, x).experts_BTK)) == 8
    ratio = noisy.up_EDW[...] / weights["up_DF"] - 1
    assert float(jnp.std(ratio)) == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(noisy.down_EWD[...], twin.down_EWD[...])


def test_a_decoder_is_its_dense_twin_when_all_experts_join(tokens):
    """With all experts chosen and equal weights the wide MLP has nothing that a plain one of its width has not."""
    config = dataclasses.replace(BASE, ffn=dataclasses.replace(BASE.ffn, gate="switch", k=8))
    model = build(config)
    twin = build(dataclasses.replace(config, ffn=PlainFFNConfig(d_ff=config.ffn.d_ff, activation="relu")))
    block, target = model.segments[0].blocks[0].ffn, twin.segments[0].blocks[0].ffn
    block.router_DE[...] = jnp.zeros_like(block.router_DE[...])
    target.up_DF[...] = block.up_EDW[...].swapaxes(1, 2).reshape(3, 24, -1)
    target.down_FD[...] = block.down_EWD[...].reshape(3, -1, 24) / 8
    for other in ("embedding_VD", "positions_PD"):
        getattr(twin, other)[...] = getattr(model, other)[...]
    nnx.update(twin.segments[0].blocks[0].attention, nnx.state(model.segments[0].blocks[0].attention))
    call = nnx.jit(lambda model, tokens: model(tokens).logits)
    np.testing.assert_allclose(call(model, tokens), call(twin, tokens), atol=1e-5)


def test_decoding_keeps_the_statistics(tokens):
    model = build(BASE)
    expected = nnx.jit(lambda model: model(tokens).logits)(model)
    single = model.unstacked()
    assert model.segments[0].blocks[0].ffn.mean_ED is None
    np.testing.assert_allclose(nnx.jit(lambda model: model(tokens).logits)(single), expected, atol=1e-5)
    ffn = single.segments[1].blocks[0].ffn
    x = tokens_of(d=24)
    before = scores_of(ffn, x)
    ffn.up_EDW[...] = ffn.up_EDW[...] + 1
    np.testing.assert_array_equal(scores_of(ffn, x), before)
    ffn.prepare()
    assert np.abs(scores_of(ffn, x) - before).max() > 0.1


# ------------------------------------------------------------------------------------------------------ balance loss


@partial(jax.jit, static_argnums=1)
def _balance_of(p, probabilities):
    return first_choice_balance(top_k(jnp.log(p), 2), context(p.shape[:2]), probabilities)


def balance_of(p_NE, probabilities="dense"):
    return float(_balance_of(np.asarray(p_NE, np.float32)[None], probabilities))


@pytest.mark.slow
def test_balance_loss():
    rng = np.random.default_rng(0)
    even = np.full((8, 8), 1 / 8) + 1e-3 * np.eye(8)  # every expert is the first choice of one token
    assert 0.001 * balance_of(even / even.sum(-1, keepdims=True)) == pytest.approx(0.001)
    collapsed = np.full((5, 8), 1e-9)
    collapsed[:, 3] = 1
    for kind in ("dense", "sparse"):
        assert 0.001 * balance_of(collapsed, kind) == pytest.approx(0.008, rel=1e-5)
    # First choices alone count, not both of the experts taken: those of the second choices are all expert 0 here.
    p = np.full((7, 8), 0.01)
    p[:, 0], p[np.arange(7), np.arange(1, 8)] = 0.3, 0.64
    mean, first = p.mean(0), np.array([0, *[1 / 7] * 7])
    assert balance_of(p) == pytest.approx(8 * mean @ first, rel=1e-5)
    kept = np.where(p >= 0.3, p, 0)
    assert balance_of(p, "sparse") == pytest.approx(8 * (kept / kept.sum(-1, keepdims=True)).mean(0) @ first, rel=1e-5)
    # Cauchy-Schwarz where f = P.
    for _ in range(5):
        f = rng.dirichlet(np.ones(8))
        assert 8 * f @ f >= 1
    one_hot = np.full((100, 8), 1e-9)
    one_hot[np.arange(100), rng.integers(0, 8, 100)] = 1
    assert balance_of(one_hot) >= 1


def test_padding_does_not_count():
    p = jnp.full((1, 4, 8), 0.01).at[0, :2, 0].set(0.93).at[0, 2:, 5].set(0.93)
    segments = jnp.array([[1, 1, 0, 0]])
    ctx = CallContext(jnp.zeros_like(segments), segments)
    loss = first_choice_balance(Routing(p, p > 0.5, p), ctx)
    assert float(loss) == pytest.approx(8 * 0.93)


@pytest.mark.slow
def test_unchosen_experts_learn_from_the_dense_balance_loss_only():
    def gradient(balance):
        ffn = random_layer(balance=balance)
        x = tokens_of(4)
        unused = np.setdiff1d(np.arange(8), np.unique(route(ffn, x).experts_BTK))
        assert unused.size
        grads = nnx.jit(nnx.grad(lambda ffn: output(ffn, x)[1].losses["balance"]))(ffn)
        return np.abs(np.asarray(grads["up_EDW"][...]))[unused].max()

    assert gradient("dense") > 0
    assert gradient("sparse") < 1e-6 * gradient("dense"), "rounding of weights that are divided by their sum"


# --------------------------------------------------------------------------------------------- sparsity, the 2x2 grid


def true_l0(ffn, x):
    """Active units of every expert, [tokens, E]; how many the chosen ones and the best ones have together; `l0`."""
    _, aux = output(ffn, x, record=("ffn_scores",))
    ffn_scores = np.asarray(aux.records["ffn_scores"][0])
    l0 = (ffn_scores.reshape(len(x), ffn.config.experts, -1) > 0).sum(-1)
    chosen = np.take_along_axis(l0, np.asarray(route(ffn, x).experts_BTK).reshape(len(x), -1), axis=-1).sum(-1)
    return l0, chosen, np.sort(l0, axis=-1)[:, : ffn.config.k].sum(-1), float(aux.stats["l0"])


@pytest.mark.slow
def test_relu_and_the_gate_make_units_sparse():
    x = 0.1 * tokens_of(256)  # far out GELU underflows to 0
    mean = {}
    for gate in ("sparsity", "switch"):
        for activation in ("relu", "gelu_tanh"):
            ffn = random_layer(gate=gate, activation=activation)
            _, chosen, oracle, mean[gate, activation] = true_l0(ffn, x)
            if activation == "relu":
                assert mean[gate, activation] == pytest.approx(chosen.mean())
            assert (chosen >= oracle).all()
    assert mean["sparsity", "gelu_tanh"] > 0.98 * 2 * 32
    assert mean["switch", "relu"] < 0.75 * 2 * 32
    assert mean["sparsity", "relu"] < 0.75 * mean["switch", "relu"]
    l0, chosen, oracle, _ = true_l0(random_layer(), x)
    assert chosen.mean() < 1.1 * oracle.mean()
    scores = np.asarray(scores_of(random_layer(), x))
    assert np.corrcoef(scores.ravel(), l0.ravel())[0, 1] < -0.9, "32 neurons are few"


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["sparsity", "switch"])
def test_forms_agree_in_the_model(gate, tokens):
    def loss_and_grads(implementation):
        ffn = dataclasses.replace(BASE.ffn, gate=gate, implementation=implementation)
        graphdef, state = nnx.split(build(dataclasses.replace(BASE, ffn=ffn)))

        def loss(state):
            out = nnx.merge(graphdef, state)(tokens)
            return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) - out.logits[..., 0]) + 0.1 * out.losses["balance"]

        return jax.jit(jax.value_and_grad(loss))(state)

    expected = loss_and_grads("dense")
    for implementation in ("ragged", "loop"):
        for a, b in zip(jax.tree.leaves(loss_and_grads(implementation)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


# -------------------------------------------------------------------------------------------------------- accounting


def test_parameters_and_cost():
    ffn = MoEXFFNConfig(experts=8, expert_width=6, k=2)
    assert ffn.d_ff == 48
    # Means and variances of 8 experts, two experts' first maps, and the rows of the second for active neurons.
    assert ffn.weights(24) == 24 * (16 + 12 + 12)
    assert ffn.weights(24, active=3) == 24 * (16 + 12 + 3)
    assert dataclasses.replace(ffn, gate="switch").flops(24, active=3) == 2 * 24 * (8 + 12 + 3)
    for gate in ("sparsity", "switch"):
        config = dataclasses.replace(BASE, ffn=dataclasses.replace(BASE.ffn, gate=gate))
        count = count_parameters(config)
        assert count.total - count.active == 3 * 2 * 24 * 6 * BASE.ffn.expert_width
        assert count_parameters(dense_twin(config)) == dataclasses.replace(count, active=count.total)
        assert flops_per_token(config, 8) < flops_per_token(dense_twin(config), 8)
        assert bytes_per_token(config, 8) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 9}, r"model.ffn.k=9: must be from 1 to 8 experts"),
        ({"expert_width": 0}, r"model.ffn.expert_width=0: must be above 0"),
        ({"score_eps": 0.0}, r"model.ffn.score_eps=0.0: must be above 0"),
        ({"literal": True, "gate": "switch"}, r"model.ffn.literal=True: is for gate=sparsity only"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE.ffn, **changes)
