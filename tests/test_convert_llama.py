"""Llama checkpoints as they come: scaled rotary embeddings, wrapped names, quantized and damaged weights."""

import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.errors import UserError
from tests.test_convert import CONFIGS, assert_same, tensors_of, write

#: Blocks of scaled rotary embeddings over `llama` above, with the same first logits by transformers 5.
SCALED = {
    "linear": ({"factor": 2.5}, [-0.92133, -0.16359, 0.05241, 0.19194, 0.82232, -0.39903]),
    "dynamic": ({"factor": 2.0}, [-0.92944, -0.17692, 0.03828, 0.18567, 0.82904, -0.40823]),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        [-0.92964, -0.17142, 0.04213, 0.19195, 0.83322, -0.40976],
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5},
        [-0.92865, -0.17329, 0.02506, 0.19617, 0.83755, -0.42159],
    ),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_embeddings(kind, tmp_path):
    block, golden = SCALED[kind]
    config = {**CONFIGS["llama"], "rope_scaling": {"rope_type": kind, **block}}
    if kind == "dynamic":
        config["max_position_embeddings"] = 8  # so that the twelve tokens are more
    tensors = {key: np.float32(0.3) * value for key, value in tensors_of(CONFIGS["llama"]).items()}
    huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    logits = sparsezoo_jax.load(tmp_path / "run").model(jnp.arange(12)[None]).logits
    np.testing.assert_allclose(logits[0, -1, :6], golden, atol=3e-5)
    huggingface.to_hf(tmp_path / "run", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_scaling"].items() >= config["rope_scaling"].items()
    assert written["max_position_embeddings"] == config["max_position_embeddings"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"rope_type": "longrope"},
            "rope_scaling.rope_type=longrope: must be one of default, linear, dynamic, yarn, llama3",
        ),
        ({"rope_type": "linear"}, "rope_scaling.factor: is missing"),
        ({"type": "linear", "factor": 0.5}, "model.attention.rope.scaling.factor=0.5: must be at least 1"),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1},
            "high_freq_factor=1.0: must",
        ),
    ],
)
def test_rotary_embeddings_that_are_not_known(block, message, tmp_path):
    source = write(tmp_path / "source", {**CONFIGS["llama"], "rope_scaling": block}, tensors_of(CONFIGS["llama"]))
    with pytest.raises(UserError, match=re.escape(message)):
        huggingface.from_hf(source, tmp_path / "run")


def test_names_of_wrapped_models(tmp_path):
    tensors = tensors_of(CONFIGS["llama"])
    wrapped = {f"module._orig_mod.{name}": x for name, x in tensors.items()}
    huggingface.from_hf(write(tmp_path / "source", CONFIGS["llama"], wrapped), tmp_path / "run")
    huggingface.to_hf(tmp_path / "run", tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_quantized_checkpoints_are_named(tmp_path):
    config = {**CONFIGS["llama"], "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UserError, match=r"is quantized by gptq, which is not read; take it in bfloat16 or float32$"):
        huggingface.from_hf(write(tmp_path / "source", config, tensors_of(CONFIGS["llama"])), tmp_path / "run")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(dtype, tmp_path):
    tensors = {name: x.astype(dtype) for name, x in tensors_of(CONFIGS["llama"]).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 1] = np.nan
    source = write(tmp_path / "source", CONFIGS["llama"], tensors)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        huggingface.from_hf(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    huggingface.from_hf(source, tmp_path / "run", not_finite=True)
