"""Attention kinds beside grouped-query attention whose maps leave out channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.masks import ActivationSparsity
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.sparsified import SparsifiedAttentionConfig
from sparsezoo_jax.sparsification.conversion import sparsified_config, with_cuts, wrapped
from sparsezoo_jax.sparsification.methods import LINEAR_MAPS
from sparsezoo_jax.sparsification.rotation import rotate
from tests.models.conftest import CONFIGS, build, forward
from tests.sparsification.test_formulas import build as build_layer

#: Maps of attention by configuration.
MAPS = {"spark": ("q", "k", "v", "o"), "blockffn": ("q", "q_up", "k", "o")}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 20)), jnp.int32)


@pytest.fixture(scope="module", params=MAPS)
def pair(request):
    """A dense model, and the same whose attention leaves out channels."""
    model, maps = build(CONFIGS[request.param]), MAPS[request.param]
    sparsity = ActivationSparsity(maps=maps, target=0.5, gate="top_k", weighted=maps[:1], rotate=True)
    sparse = wrapped(model, sparsified_config(model.config, sparsity, exact=True))
    return model, sparse, maps


def test_with_nothing_left_out_it_is_the_dense_one(pair):
    model, sparse, _ = pair
    expected = forward(model)(TOKENS).logits
    np.testing.assert_allclose(forward(sparse)(TOKENS).logits, expected, atol=2e-5)
    rotated = wrapped(model, sparse.config)
    rotate(rotated)
    np.testing.assert_allclose(forward(rotated)(TOKENS).logits, expected, atol=2e-3)


def test_decoding_leaves_out_what_training_does(pair):
    model, sparse, maps = pair
    cut = wrapped(model, sparse.config)
    with_cuts(cut, {name: np.full(2, 0.5) for name in maps})
    run = forward(cut)
    whole = run(TOKENS)
    for name in maps:
        np.testing.assert_allclose(whole.stats[f"density_{name}"], 0.5, atol=0.1)
    assert np.abs(whole.logits - forward(model)(TOKENS).logits).max() > 1e-3
    first = run(TOKENS[:, :19], cache=cut.init_cache(2, 20))
    last = run(TOKENS[:, 19:], cache=first.cache)
    np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, 19], atol=5e-5)


@pytest.mark.parametrize("latent", [None, 6])
def test_maps_of_latent_attention(latent):
    """Each map reads what its threshold leaves: the same as its matrix on inputs that are 0 elsewhere."""
    form = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    of = MLAConfig(heads=2, q_lora_rank=latent, **form)
    maps = ("q", "k", "o") if latent is None else ("q", "q_up", "k", "o")
    assert tuple(of.linear_maps(12)) == maps
    layer = build_layer(SparsifiedAttentionConfig(of=of, sparsity=ActivationSparsity(maps=maps, target=0.5)))
    layer.masks.cut_P[...] = jnp.linspace(0.2, 0.5, len(maps))
    x = np.random.default_rng(1).normal(size=(1, 3, 12)).astype(np.float32)
    inner, cuts = layer.inner, dict(zip(layer.masks.names, np.asarray(layer.masks.cut_P[...]), strict=True))

    def kept(name, value):
        return jnp.where(jnp.abs(value) > cuts[name], value, 0)

    class Stream:
        def channels(self, name, value, weight=None):
            return kept(name, value)

        def added(self, name, y):
            return y

    q, joint = inner.down_projected(jnp.asarray(x), Stream())
    np.testing.assert_allclose(joint, kept("k", x) @ inner.kv_a_DC[...], atol=1e-6)
    if latent is None:
        expected = jnp.einsum("btd,dnh->btnh", kept("q", x), inner.q_DNH[...])
    else:
        latents = inner.q_a_norm(kept("q", x) @ inner.q_a_DR[...])
        expected = jnp.einsum("btr,rnh->btnh", kept("q_up", latents), inner.q_b_RNH[...])
    np.testing.assert_allclose(q, expected, atol=1e-6)
    weights = {name: size.channels * size.weights for name, size in of.linear_maps(12).items()}
    expanded = 8 * 2 * (4 + 3)  # from the latent to keys and values, which is no such map
    assert sum(weights.values()) + expanded == of.projection_weights(12)
    for name in maps:
        assert getattr(inner, inner.matrices[name])[...].size == weights[name]


def test_kinds_without_such_maps_are_named():
    teal = ActivationSparsity(maps=LINEAR_MAPS, target=0.5)
    with pytest.raises(ConfigError, match=r"model.ffn.kind=delta: has no maps whose channels could be left out"):
        sparsified_config(CONFIGS["delta"], teal)
    with pytest.raises(ConfigError, match=r"model.attention.kind=mla: has the maps q, q_up, k, o; q,v can't"):
        sparsified_config(CONFIGS["blockffn"], dataclasses.replace(teal, maps=("q", "v")), exact=True)
