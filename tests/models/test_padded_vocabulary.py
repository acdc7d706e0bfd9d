"""A vocabulary that is padded so that a mesh can split it: the same numbers, and nothing of the padding gets out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.configs import preset
from sparsezoo_jax.evaluation.cross_entropy import model_loss
from sparsezoo_jax.inference.packing import packed
from sparsezoo_jax.models import Decoder, count_parameters
from sparsezoo_jax.run_dir import CHECKPOINTS, write_config
from sparsezoo_jax.training.parameters import save_params
from sparsezoo_jax.training.state import ModelTemplate, flatten
from sparsezoo_jax.training.warm_start import open_warm_start
from tests.test_convert import CONFIGS, assert_same, load_file_any, tensors_of, write

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 99, (2, 8)))


def decoder(multiple, *, tied):
    model = preset("dense", "tiny").model
    attention = dataclasses.replace(model.attention, heads=2, kv_heads=1, head_dim=8, window=4)
    ffn = dataclasses.replace(model.ffn, d_ff=32)
    config = dataclasses.replace(
        model, vocab_size=99, vocab_multiple=multiple, d_model=16, layers=1, layer_pattern=("global",),
        attention=attention, ffn=ffn, tie_embeddings=tied,
    )  # fmt: skip
    return config, Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("tied", [True, False])
def test_padding_changes_no_number_and_gets_no_gradient(tied):
    batch = {
        "tokens": TOKENS, "targets": (TOKENS + 1) % 99, "mask": TOKENS >= 0, "segment_ids": jnp.ones_like(TOKENS),
        "positions": jnp.broadcast_to(jnp.arange(8), TOKENS.shape),
    }  # fmt: skip

    @nnx.jit
    @nnx.value_and_grad
    def loss(model):
        return model_loss(model, batch, chunk=4)[0]

    (config, plain), (padded_config, padded) = decoder(1, tied=tied), decoder(16, tied=tied)
    assert padded.embedding_VD.shape == (112, 16)
    assert count_parameters(padded_config) == count_parameters(config)
    np.testing.assert_array_equal(padded(TOKENS).logits, plain(TOKENS).logits)
    np.testing.assert_array_equal(packed(padded)(TOKENS).logits, packed(plain)(TOKENS).logits)
    (value, gradients), (expected, expected_gradients) = loss(padded), loss(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        rest = np.array(a)
        rest[tuple(slice(size) for size in b.shape)] -= b
        # Sums over words of rows of 112 are taken in another order than of 99.
        np.testing.assert_allclose(rest, 0, atol=1e-5)


@pytest.mark.slow
def test_padding_is_not_exported(tmp_path):
    """What a run with a padded vocabulary, started from another's parameters, exports is what that one imported."""
    tensors = tensors_of(CONFIGS["gemma2"])
    source, run = write(tmp_path / "source", CONFIGS["gemma2"], tensors), tmp_path / "run"
    huggingface.from_hf(source, run)
    _, config, _ = sparsezoo_jax.load(run)
    wanted = dataclasses.replace(config.model, vocab_multiple=64)
    assert wanted.vocab_rows > wanted.vocab_size
    template = ModelTemplate(lambda rngs: Decoder(wanted, rngs=rngs))
    start = open_warm_start(run / CHECKPOINTS, config.model, wanted)
    params = template.split(Decoder(wanted, rngs=nnx.Rngs(0)))[0]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    filled, _ = start((params, {}), (jax.tree.map(lambda _: one, params), {}), lambda axes, shape: one)
    other = tmp_path / "padded"
    save_params(other / CHECKPOINTS, flatten(filled))
    write_config(other, dataclasses.replace(config, model=wanted))
    huggingface.to_hf(other, tmp_path / "back")
    assert_same(load_file_any(tmp_path / "back"), tensors)
