"""Latent attention against the formula written out in float64, and what its parts must and must not depend on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from tests.models.conftest import CONFIGS, build

CONFIG = MLAConfig(heads=3, q_lora_rank=10, kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
D, T = 12, 9
X = np.random.default_rng(0).normal(size=(1, T, D)).astype(np.float32)


def context() -> CallContext:
    positions = jnp.arange(T)[None]
    ctx = CallContext(positions, jnp.ones((1, T), jnp.int32))
    ctx.visible = {"global": Visibility.of_tokens(ctx.segments_BT)}
    ctx.keys_seen = {"global": jnp.mean(ctx.visible["global"].keys_seen)}
    return ctx


def layer(config=CONFIG):
    f32 = jnp.dtype("float32")
    return config.build(BuildContext(D, 2, InitConfig(), f32, f32), nnx.Rngs(0))


def written_out(made, x, eps=1e-6):
    weights = nnx.to_pure_dict(nnx.state(made))
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)

    def rms(z, scale):
        return z / np.sqrt(np.mean(z**2, -1, keepdims=True) + eps) * scale

    def rotate(z):  # z [T, 4]: pairs (0, 2) and (1, 3)
        angle = np.arange(T)[:, None] * np.array([1.0, 10_000**-0.5])
        a, b = z[:, :2], z[:, 2:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = x[0].astype(np.float64)
    compressed = "q_a_DR" in w
    q_latent = rms(x @ w["q_a_DR"], w["q_a_norm"]["scale"]) if compressed else x
    joint = x @ w["kv_a_DC"]
    latent, k_rope = rms(joint[:, :7], w["kv_a_norm"]["scale"]), rotate(joint[:, 7:])
    y = np.zeros((T, D))
    for head in range(3):
        q, kv = q_latent @ w["q_b_RNH" if compressed else "q_DNH"][:, head], latent @ w["kv_b_CNH"][:, head]
        q = np.concatenate([q[:, :6], rotate(q[:, 6:])], -1)
        k = np.concatenate([kv[:, :6], k_rope], -1)
        scores = np.where(np.tril(np.ones((T, T), bool)), q @ k.T / np.sqrt(10), -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        y += weight @ kv[:, 6:] @ w["o_NHD"][head]
    return y


@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_the_formula(q_lora_rank):
    made = layer(dataclasses.replace(CONFIG, q_lora_rank=q_lora_rank))
    y, aux, _ = jax.jit(lambda x: made(x, context()))(X)
    np.testing.assert_allclose(y[0], written_out(made, X), atol=1e-5)
    np.testing.assert_allclose(aux.stats["attended_keys"], 5)


def test_eps_of_the_latent_norms():
    made, tiny = layer(), 1e-3 * X
    y, _, _ = jax.jit(lambda x: made(x, context()))(tiny)
    np.testing.assert_allclose(y[0], written_out(made, tiny), atol=1e-5)
    assert np.abs(y[0] - written_out(made, tiny, eps=1e-5)).max() > 1e-2


def test_cache_holds_the_latent_only():
    model = build(CONFIGS["blockffn"])
    cache = model.init_cache(2, 20)
    attention = model.config.attention
    assert cache.layers[0].k_BSKH.shape == (2, 20, 1, attention.kv_lora_rank)
    assert cache.layers[0].v_BSKH.shape == (2, 20, 1, attention.qk_rope_head_dim)


def test_thirteen_arrays_a_layer():
    state = nnx.state(build(CONFIGS["blockffn"]), nnx.Param)
    assert len(jax.tree.leaves(state["segments"])) == 13
    assert len(jax.tree.leaves(state)) == 16


def test_initial_stds():
    config = dataclasses.replace(CONFIG, kv_lora_rank=64, q_lora_rank=64, kv_up_init_std=0.02, v_head_dim=32)
    f32 = jnp.dtype("float32")
    init = InitConfig(kind="fixed", scale=0.1, width_base=256)
    made = config.build(BuildContext(64, 2, init, f32, f32), nnx.Rngs(0))
    for matrix, std in ((made.q_a_DR, 0.2), (made.kv_a_DC, 0.2), (made.o_NHD, 0.2), (made.kv_b_CNH, 0.02)):
        assert float(jnp.std(matrix[...])) == pytest.approx(std, rel=0.05)


def test_accounting():
    small = MLAConfig(heads=6)
    assert small.projection_weights(768) + 768 + 256 == 2_704_384, "with the latent norms' scales"
    assert small.projection_flops(768) == 2 * small.projection_weights(768)
    plm = MLAConfig(heads=16, q_lora_rank=None, kv_lora_rank=512)
    assert plm.projection_weights(2048) == 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048
    assert small.mixing_flops(10) == 2 * 6 * (192 + 128) * 10
    assert small.cache_reads(10) == 320 * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_rope_head_dim": 3}, "model.attention.qk_rope_head_dim=3: must be even to rotate"),
        ({"kv_lora_rank": 0}, "model.attention.kv_lora_rank=0: must be above 0"),
        ({"window": 0}, "model.attention.window=0: must be above 0 or None"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(CONFIG, **change)
