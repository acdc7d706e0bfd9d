"""The formulas of activation sparsity, restated in NumPy: thresholds, masks and what masked layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.masks import ActivationSparsity, MaskedWidth
from sparsezoo_jax.models.sparsified import SparsifiedAttentionConfig, SparsifiedFFNConfig
from sparsezoo_jax.sparsification import METHODS, sparsified_config
from sparsezoo_jax.sparsification.calibration import BINS, EDGES, bin_of, threshold
from sparsezoo_jax.sparsification.methods import RELEASED
from tests.models.conftest import CONFIGS

D, F = 12, 20
X = np.random.default_rng(0).standard_normal((2, 5, D)).astype(np.float32)


def counted(values):
    """Their histogram as the calibration makes it."""
    place = np.asarray(bin_of(jnp.abs(jnp.asarray(values, jnp.float32))))
    return np.stack([np.bincount(place[sign], minlength=BINS) for sign in (values >= 0, values < 0)])


def test_bins_are_those_between_the_edges():
    draw = np.random.default_rng(1)
    scores = np.concatenate([[0, 2**-40, 2**-32, 1, 65535, 1e30], 10 ** draw.uniform(-9, 4, 500), EDGES[1:-1:997]])
    scores = scores.astype(np.float32)
    expected = np.clip(np.searchsorted(EDGES, scores.astype(np.float64), side="right") - 1, 0, BINS - 1)
    np.testing.assert_array_equal(bin_of(jnp.asarray(scores)), expected)
    assert np.all(np.diff(EDGES)[1:] <= EDGES[1:-1] / 512)


def released_cats(values, share):
    """As the authors' code counts and inverts: 19,999 bins, two of them open."""
    edges = np.concatenate([[-np.inf], np.linspace(-2, 2, 19_998), [np.inf]])
    counts, _ = np.histogram(np.abs(values), edges)
    return edges[np.searchsorted(np.cumsum(counts) / counts.sum(), share, side="right")]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.65, 0.9])
def test_thresholds_are_quantiles(share):
    values = np.random.default_rng(2).standard_normal(20_000) * 0.3 + 0.05
    counts = counted(values)
    found = threshold(counts, share)
    assert found == pytest.approx(np.quantile(np.abs(values), share), rel=2e-3)
    assert np.mean(np.abs(values) <= found) == pytest.approx(share, abs=1e-3)
    # TEAL's: the quantile of the signed values at (1 + s) / 2, here not the same, for their mean is not 0.
    symmetric = np.quantile(values, 0.5 + share / 2)
    assert threshold(counts, share, "symmetric") == pytest.approx(symmetric, rel=4e-3)
    assert abs(symmetric / found - 1) > 0.02
    assert threshold(counts, share, "grid") == pytest.approx(released_cats(values, share), abs=2.5e-4)


def test_thresholds_at_the_ends():
    half_zero = np.concatenate([np.zeros(500), np.linspace(0.1, 1, 500)])
    assert threshold(counted(half_zero), 0.4) == 0  # all of it is zeros already
    assert threshold(counted(half_zero), 0.75) == pytest.approx(0.55, rel=0.01)
    assert threshold(counted(np.ones(10)), 0) == 0
    assert threshold(counted(np.full(100, 50.0)), 0.5, "grid") == 2  # CATS's grid ends there


def test_wide_scores_keep_their_resolution():
    """One outlier of a million times the others changes nothing: in equal bins they would all be in the first."""
    values = np.append(np.random.default_rng(3).standard_normal(5000) * 1e-2, 1e4)
    assert threshold(counted(values), 0.5) == pytest.approx(np.quantile(np.abs(values), 0.5), rel=5e-3)


def build(kind):
    ctx = BuildContext(D, 1, InitConfig(), jnp.dtype("float32"), jnp.dtype("float32"))
    return kind.build(ctx, nnx.Rngs(0))


def call(layer, x=X, **context):
    ids = jnp.ones(x.shape[:2], jnp.int32)
    ctx = CallContext(jnp.broadcast_to(jnp.arange(x.shape[1]), ids.shape), ids, **context)
    return layer(jnp.asarray(x), ctx)


def sparse_ffn(of, method, target=0.5, cuts=None, **changes):
    sparsity = method._replace(maps=tuple(n for n in method.maps if n in of.linear_maps(D))).sparsity(target, **changes)
    if sparsity.weighted:
        method = method._replace(maps=sparsity.maps)
    layer = build(SparsifiedFFNConfig(of=of, sparsity=sparsity))
    values = [target if cuts is None else cuts[name] for name in layer.masks.names]
    layer.masks.cut_P[...] = jnp.asarray(values, jnp.float32)
    return layer


def silu(x):
    return x / (1 + np.exp(-x))


def weights(layer):
    return (np.asarray(w[...]) for w in (layer.inner.gate_DF, layer.inner.up_DF, layer.inner.down_FD))


GATED = GatedFFNConfig(d_ff=F, activation="silu")


def test_cats():
    """`y = ((v m) (x W_up)) W_down` with v = silu(x W_gate) and m = |v| > t: equal is dead."""
    layer = sparse_ffn(GATED, METHODS["cats"], cuts={"neurons": 0.1})
    gate, up, down = weights(layer)
    v = silu(X @ gate)
    m = np.abs(v) > 0.1
    y, aux = call(layer)
    np.testing.assert_allclose(y, ((v * m) * (X @ up)) @ down, atol=1e-5)
    assert 0.2 < m.mean() < 0.9
    assert aux.stats["density_neurons"] == pytest.approx(m.mean(), abs=1e-6)
    assert aux.stats["ffn_density"] == pytest.approx(m.mean(), abs=1e-6)


def test_a_score_equal_to_its_threshold_is_left_out():
    layer = sparse_ffn(PlainFFNConfig(d_ff=F), METHODS["teal"], cuts={"up": 0.5, "down": 0.0})
    x = np.full((1, 1, D), 0.5, np.float32)
    _, aux = call(layer, x)
    assert aux.stats["density_up"] == 0
    _, aux = call(layer, np.nextafter(x, np.float32(1)))
    assert aux.stats["density_up"] == 1


def kept_by_threshold(x, t):
    return np.where(np.abs(x) > t, x, 0)


def kept_largest(x, norms, share):
    score, kept = np.abs(x) * norms, round((1 - share) * x.shape[-1])
    rank = np.argsort(np.argsort(-score, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.where(rank < kept, x, 0)


def test_teal():
    """`S_t(x)_i = x_i 1[|x_i| > t]` for every map, gate and up with thresholds of their own on one input."""
    t = {"gate": 0.4, "up": 0.9, "down": 0.05}
    layer = sparse_ffn(GATED, METHODS["teal"], cuts=t)
    gate, up, down = weights(layer)
    hidden = silu(kept_by_threshold(X, 0.4) @ gate) * (kept_by_threshold(X, 0.9) @ up)
    y, aux = call(layer)
    np.testing.assert_allclose(y, kept_by_threshold(hidden, 0.05) @ down, atol=1e-5)
    assert aux.stats["density_up"] == pytest.approx(np.mean(np.abs(X) > 0.9), abs=1e-6)
    assert aux.stats["density_down"] == pytest.approx(np.mean(np.abs(hidden) > 0.05), abs=1e-6)


@pytest.mark.parametrize("released", [False, True])
def test_wina(released):
    """The K largest |x_i| c_i, c_i the norm of row i of the map's weights; the released code has c on k and gate."""
    method = (RELEASED if released else METHODS)["wina"]
    maps = ("gate", "up", "down")
    method = method._replace(maps=maps, weighted=tuple(n for n in method.weighted if n in maps))
    layer = sparse_ffn(GATED, method, target=0.5)
    gate, up, down = weights(layer)
    ones = np.ones(1)

    def norms(w, name):
        return np.linalg.norm(w, axis=1) if name == "gate" or not released else ones

    to_gate, to_up = kept_largest(X, norms(gate, "gate"), 0.5), kept_largest(X, norms(up, "up"), 0.5)
    hidden = silu(to_gate @ gate) * (to_up @ up)
    y, aux = call(layer)
    np.testing.assert_allclose(y, kept_largest(hidden, norms(down, "down"), 0.5) @ down, atol=1e-5)
    for name in maps:
        assert aux.stats[f"density_{name}"] == pytest.approx(0.5, abs=1e-6)
    assert np.any(to_gate != kept_largest(X, ones, 0.5))


def test_attention_masks_its_four_maps():
    of = GQAConfig(heads=3, kv_heads=1, head_dim=4)
    sparsity = ActivationSparsity(maps=("q", "k", "o"), target=0.5, gate="top_k", weighted=("k", "o"))
    layer = build(SparsifiedAttentionConfig(of=of, sparsity=sparsity))
    layer.masks.cut_P[...] = jnp.full(3, 0.5)
    seen = {}

    class Spy:
        def channels(self, name, x, weight=None):
            return seen.setdefault(name, masked.channels(name, x, weight))

        def added(self, name, y):
            return masked.added(name, y)

        def read(self, x, w):
            return x @ w

        def write(self, y, w):
            return jnp.einsum("btnh,nhd->btd", y, w)

    ids = jnp.ones((2, 5), jnp.int32)
    masked = MaskedWidth(layer.masks, CallContext(ids, ids))
    projections = layer.inner.projections
    q, k, v = projections.qkv(jnp.asarray(X), Spy())
    w = {name: np.asarray(getattr(projections, f"{name}_D{'N' if name == 'q' else 'K'}H")[...]) for name in "qkv"}
    norms = np.linalg.norm(w["k"].reshape(D, -1), axis=1)
    np.testing.assert_allclose(q, np.einsum("btd,dnh->btnh", kept_largest(X, np.ones(1), 0.5), w["q"]), atol=1e-5)
    np.testing.assert_allclose(k, np.einsum("btd,dnh->btnh", kept_largest(X, norms, 0.5), w["k"]), atol=1e-5)
    np.testing.assert_allclose(v, np.einsum("btd,dnh->btnh", X, w["v"]), atol=1e-5)
    mixed = np.random.default_rng(5).standard_normal((2, 5, 3, 4)).astype(np.float32)
    o = np.asarray(projections.o_NHD[...]).reshape(12, D)
    expected = kept_largest(mixed.reshape(2, 5, 12), np.linalg.norm(o, axis=1), 0.5) @ o
    np.testing.assert_allclose(projections.output(jnp.asarray(mixed), Spy()), expected, atol=1e-5)
    assert masked.densities.keys() == {"density_q", "density_k", "density_o"}


def test_the_error_is_that_of_the_channels_left_out_where_rows_are_orthogonal():
    """`||y - y_dense||^2 = sum of x_i^2 c_i^2` over them, which is why WINA leaves out the smallest |x_i| c_i."""
    layer = sparse_ffn(PlainFFNConfig(d_ff=F), METHODS["wina"]._replace(maps=("up",), weighted=("up",)))
    rows = np.linalg.qr(np.random.default_rng(4).standard_normal((F, D)))[0].T * np.linspace(0.5, 2, D)[:, None]
    layer.inner.up_DF[...] = jnp.asarray(rows, jnp.float32)
    kept = kept_largest(X, np.linspace(0.5, 2, D), 0.5)
    error = np.sum(np.square(X @ rows - kept @ rows), axis=-1)
    np.testing.assert_allclose(error, np.sum(np.square((X - kept) * np.linspace(0.5, 2, D)), axis=-1), rtol=1e-4)
    found = layer.inner.scores(jnp.asarray(kept), CallContext(jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5))).width)
    _, aux = call(layer, record=frozenset({"ffn_scores"}))
    np.testing.assert_allclose(aux.records["ffn_scores"], found, atol=1e-5)


def test_first_tokens_read_everything():
    whole, sparse = (
        np.asarray(call(sparse_ffn(GATED, METHODS["teal"], cuts=dict.fromkeys(("gate", "up", "down"), t)))[0])
        for t in (0.0, 0.5)
    )
    mixed, _ = call(sparse_ffn(GATED, METHODS["teal"], cuts=dict.fromkeys(("gate", "up", "down"), 0.5), dense_tokens=2))
    np.testing.assert_allclose(mixed[:, :2], whole[:, :2], atol=1e-6)
    np.testing.assert_allclose(mixed[:, 2:], sparse[:, 2:], atol=1e-6)
    assert np.abs(whole - sparse).max() > 0.01


def test_gradients_pass_where_channels_are_kept():
    layer = sparse_ffn(PlainFFNConfig(d_ff=F), METHODS["teal"]._replace(maps=("up",)), cuts={"up": 0.5})
    gradient = jax.grad(lambda x: jnp.sum(call(layer, x)[0] ** 2))(jnp.asarray(X))
    np.testing.assert_array_equal(gradient != 0, np.abs(X) > 0.5)


def test_accounting_counts_what_is_left():
    """With D = 12 and F = 20, three maps of 240 weights."""
    cats, teal = (SparsifiedFFNConfig(of=GATED, sparsity=METHODS[m].sparsity(0.5)) for m in ("cats", "teal"))
    assert (GATED.weights(D), cats.weights(D), teal.weights(D)) == (720, 240 + 240, 360)
    assert cats.weights(D, 5) == 240 + 2 * 12 * 5  # as measured
    assert teal.flops(D) == 720
    relu = SparsifiedFFNConfig(of=GatedFFNConfig(d_ff=F, activation="relu"), sparsity=METHODS["teal"].sparsity(0.5))
    assert relu.weights(D, 5) == 120 + 5 * 6 + 12 * 5  # a neuron that is 0 needs no channel of its own either
    attention = GQAConfig(heads=3, kv_heads=1, head_dim=4)
    sparse = SparsifiedAttentionConfig(of=attention, sparsity=METHODS["teal"].sparsity(0.25))
    assert sparse.projection_weights(D) == 0.75 * attention.projection_weights(D)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("gpt2", "cats", r"model.ffn.kind=plain: has the maps up, down; neurons,shared_neurons can't be sparsified"),
        ("delta", "teal", r"model.ffn.kind=delta: has no maps whose channels could be left out; gate,up,down,shared"),
        ("mohd", "teal", r"model.residual.kind=mohd: has a residual stream whose width is routed"),
        ("altup", "cats", r"model.altup.streams=3: must be 1: layers are worked on one after another"),
    ],
)
def test_what_can_not_be_treated_is_named(name, method, message):
    with pytest.raises(ConfigError, match=message):
        sparsified_config(CONFIGS[name], METHODS[method].sparsity(0.5))


def test_what_is_sparsified_is_not_again():
    once = sparsified_config(CONFIGS["llama"], METHODS["cats"].sparsity(0.5))
    with pytest.raises(UserError, match="is sparsified already"):
        sparsified_config(once, METHODS["teal"].sparsity(0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"maps": ("q", "x")}, r"sparsity.maps=x: must be one of q, q_up, k, v"),
        ({"maps": ("q", "q")}, r"sparsity.maps=q,q: must name each map once"),
        ({"maps": ("neurons", "down")}, r"can't have neurons beside up or down"),
        ({"maps": ("q",), "weighted": ("k",)}, r"sparsity.weighted=k: must be among the maps"),
        ({"maps": ("q",), "target": 1.0}, r"sparsity.target=1.0: must be in \[0, 1\)"),
        ({"maps": ("q",), "dense_tokens": -1}, r"sparsity.dense_tokens=-1: must be at least 0"),
    ],
)
def test_configurations_that_say_nothing_sensible(fields, message):
    with pytest.raises(ConfigError, match=message):
        ActivationSparsity(**{"target": 0.5, **fields})
