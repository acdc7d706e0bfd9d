"""Bottleneck adapters: what they compute and where, packed and counted."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.inference.packing import packed
from sparsezoo_jax.models import Decoder, DecoderConfig, bytes_per_token, flops_per_token
from sparsezoo_jax.models.adapter import AdapterConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.state import ModelTemplate

PLAIN = DecoderConfig(
    vocab_size=32,
    d_model=16,
    layers=2,
    max_seq_len=16,
    attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
    ffn=GatedFFNConfig(d_ff=24, activation="relu"),
)
ADAPTED = dataclasses.replace(PLAIN, adapter=AdapterConfig(width=3, activation="relu"))
TOKENS = jnp.arange(7)[None]


@pytest.fixture(scope="module")
def model():
    """All of the adapters' parameters drawn."""
    model = Decoder(ADAPTED, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    drawn = {
        path: x.replace(jax.random.normal(jax.random.key(i), x.shape)) if "_adapter" in "/".join(map(str, path)) else x
        for i, (path, x) in enumerate(nnx.to_flat_state(state))
    }
    return nnx.merge(graphdef, nnx.from_flat_state(drawn))


def test_new_adapters_change_nothing():
    plain, adapted = (Decoder(config, rngs=nnx.Rngs(0)) for config in (PLAIN, ADAPTED))
    shared = dict(nnx.to_flat_state(nnx.state(adapted)))
    given = {path: shared[path] for path, _ in nnx.to_flat_state(nnx.state(plain))}
    nnx.update(plain, nnx.from_flat_state(given))
    np.testing.assert_array_equal(adapted(TOKENS).logits, plain(TOKENS).logits)


def test_they_add_to_what_their_sublayer_returns(model):
    """With sublayers that return 0, what joins the stream is `W_up relu(b_down) + b_up` of each adapter."""
    graphdef, state = nnx.split(model)
    silent = {
        path: x.replace(jnp.zeros(x.shape)) if path[-1] in ("o_NHD", "down_FD") else x
        for path, x in nnx.to_flat_state(state)
    }
    silenced = nnx.merge(graphdef, nnx.from_flat_state(silent))
    stream = np.asarray(silenced.embedding_VD[...])[np.asarray(TOKENS[0])]
    block = silenced.segments[0].blocks[0]
    for layer in range(2):
        for adapter in (block.attention_adapter, block.ffn_adapter):
            inner = np.maximum(adapter.down_bias[layer], 0)
            stream = stream + inner @ adapter.up_RD[layer] + adapter.up_bias[layer]
    expected = stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(silenced(TOKENS).hidden[0], expected, rtol=1e-4, atol=1e-5)


def test_packed_as_trained(model):
    fast = packed(model)
    out = fast(TOKENS[:, :5], cache=fast.init_cache(1, 7))
    last = fast(TOKENS[:, 5:], cache=out.cache)
    whole = model(TOKENS).logits
    np.testing.assert_allclose(out.logits, whole[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last.logits, whole[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("after", [("attention", "ffn"), ("ffn",)])
def test_counts(after):
    config = dataclasses.replace(PLAIN, adapter=AdapterConfig(width=3, after=after))
    parameters = ModelTemplate(lambda rngs: Decoder(config, rngs=rngs)).parameters
    added = {path: x.shape for path, x in parameters.items() if "_adapter/" in path}
    assert {path.split("/")[-2] for path in added} == {f"{name}_adapter" for name in after}
    more = bytes_per_token(config, 8) - bytes_per_token(PLAIN, 8)
    assert more == 4 * sum(math.prod(shape) for shape in added.values())
    matrices = sum(math.prod(shape) for path, shape in added.items() if not path.endswith("bias"))
    assert flops_per_token(config, 8) - flops_per_token(PLAIN, 8) == 2 * matrices


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(width=0), "model.adapter.width=0: must be above 0 or None"),
        (lambda: AdapterConfig(width=2, after=("ffn", "ffn")), "must name each sublayer once"),
        (
            lambda: dataclasses.replace(preset("mohd", "tiny").model, adapter=AdapterConfig(width=4)),
            "model.adapter.width=4: must be none with model.residual.kind=mohd: adapters are for pre_norm",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_before_the_norm_of_the_output():
    """Post-norms see the sublayer and its adapter together: of silent sublayers they normalise the adapter's part."""
    config = dataclasses.replace(ADAPTED, layers=1, residual=PreNormConfig(input_norm=False, post_norm=True))
    model = Decoder(config, rngs=nnx.Rngs(0))
    block: Any = model.segments[0].blocks[0]
    block.attention.projections.o_NHD[...] *= 0
    block.ffn.down_FD[...] *= 0
    block.attention_adapter.up_bias[...] += jnp.arange(16.0)
    block.ffn_adapter.up_bias[...] += 5 * jnp.arange(16.0)
    stream = np.asarray(model.embedding_VD[...])[np.asarray(TOKENS[0])]
    stream = stream + 2 * np.arange(16) / np.sqrt(np.mean(np.arange(16.0) ** 2))
    expected = stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(model(TOKENS).hidden[0], expected, rtol=1e-4, atol=1e-5)
