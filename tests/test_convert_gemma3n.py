"""Gemma 3n's language models: logits of transformers, decoding, and the way back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.errors import SparsezooWarning, UserError
from sparsezoo_jax.huggingface.layouts import read_model, write_model, written_for_transformers
from sparsezoo_jax.inference import packed
from sparsezoo_jax.models.altup import AltUpConfig
from tests.models.conftest import CONFIGS
from tests.test_convert import assert_same, write

CONFIG = {
    "model_type": "gemma3n_text",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "final_logit_softcapping": 20.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "vocab_size_per_layer_input": 36,
    "hidden_size_per_layer_input": 6,
    "altup_num_inputs": 3,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "num_kv_shared_layers": 2,
    "laurel_rank": 5,
    "activation_sparsity_pattern": [0.8] * 2 + [0.0] * 6,
}
#: Of the checkpoint below after the tokens below, the last one's first six logits and the sixth one's first three, as
#: transformers 5.24 computes them in float32 with eager attention.
LAST = [-0.00335, 0.07877, 0.18589, 0.52118, 0.34528, 0.39157]
SIXTH = [-0.23035, 0.39167, 0.64403]
#: Four of them have no vectors of their own.
TOKENS = jnp.arange(12)[None] * 7 % 40


def tensors_of():
    """Names and shapes as transformers has them, drawn in the order of their names."""
    d, f, v, p, layers, streams, rank = 24, 20, 40, 6, 8, 3, 5
    shapes = {
        "embed_tokens.weight": (v, d),
        "embed_tokens_per_layer.weight": (36, layers * p),
        "norm.weight": (d,),
        "per_layer_model_projection.weight": (layers * p, d),
        "per_layer_projection_norm.weight": (p,),
    }
    for i in range(streams - 1):
        shapes |= {f"altup_{name}projections.{i}.weight": (d, d) for name in ("", "unembed_")}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i in range(layers):
        own = {
            "altup.correct_output_scale": (d,),
            "altup.correction_coefs.weight": (streams, streams),
            "altup.prediction_coefs.weight": (streams**2, streams),
            "altup.modality_router.weight": (streams, d),
            "altup.router_norm.weight": (d,),
            "laurel.linear_left.weight": (rank, d),
            "laurel.linear_right.weight": (d, rank),
            "laurel.post_laurel_norm.weight": (d,),
            "per_layer_input_gate.weight": (p, d),
            "per_layer_projection.weight": (d, p),
            "post_per_layer_input_norm.weight": (d,),
            "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
            "self_attn.q_proj.weight": (32, d),
            "self_attn.o_proj.weight": (d, 32),
            "self_attn.q_norm.weight": (8,),
            **{f"{norm}_layernorm.weight": (d,) for norm in norms},
        }
        if i < layers - 2:
            own |= {f"self_attn.{name}_proj.weight": (16, d) for name in "kv"} | {"self_attn.k_norm.weight": (8,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    draw = np.random.default_rng(0)
    return {f"model.{key}": (0.3 * draw.standard_normal(shapes[key])).astype(np.float32) for key in sorted(shapes)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3n")
    huggingface.from_hf(write(folder / "source", CONFIG, tensors_of()), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return sparsezoo_jax.load(run).model


@pytest.fixture(scope="module")
def logits(model):
    return jax.jit(lambda tokens: model(tokens).logits)(TOKENS)


def test_logits_are_those_of_transformers(logits):
    np.testing.assert_allclose(logits[0, -1, :6], LAST, atol=3e-5)
    np.testing.assert_allclose(logits[0, 5, :3], SIXTH, atol=3e-5)


def test_decoding_equals_the_forward_pass(model, logits):
    """Layers that keep or take keys decode as they were trained, the others packed; windows are passed."""
    with pytest.warns(SparsezooWarning, match=r"model\.attention\.kind=gqa: no layout for decoding, 8 layers"):
        fast = packed(model)
    call = jax.jit(lambda tokens, cache: fast(tokens, cache=cache)[:5:4])
    made, cache = call(TOKENS[:, :8], fast.init_cache(1, 12))
    np.testing.assert_allclose(made, logits[:, :8], atol=1e-4)
    for i in range(8, 12):
        made, cache = call(TOKENS[:, i : i + 1], cache)
        np.testing.assert_allclose(made[:, 0], logits[:, i], atol=1e-4)


def test_there_and_back(run, tmp_path):
    huggingface.to_hf(run, tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors_of())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in CONFIG} == CONFIG
    assert written["architectures"] == ["Gemma3nForCausalLM"]


def test_keys_that_nothing_reads_are_left_out(tmp_path):
    """Released checkpoints have them in layers that take those of others."""
    extra = {"model.layers.7.self_attn.k_proj.weight": np.zeros((16, 24), np.float32)}
    huggingface.from_hf(write(tmp_path / "source", CONFIG, {**tensors_of(), **extra}), tmp_path / "run")


def test_fields_that_may_be_absent():
    """As transformers fills them in; the sizes are those of its own defaults."""
    absent = {**CONFIG, "num_hidden_layers": 15, "num_kv_shared_layers": 5, "intermediate_size": [20] * 15}
    for name in ("layer_types", "activation_sparsity_pattern", "laurel_rank", "altup_num_inputs", "rope_parameters"):
        del absent[name]
    _, model = read_model(absent, "config.json")
    assert "".join(spec.layer_type[0] for spec in model.layer_specs()) == "llllg" * 3
    assert [spec.keys for spec in model.layer_specs()] == ["kept"] * 10 + ["reused"] * 5
    assert model.ffn.activation_sparsity_pattern == (0.95,) * 10 + (0.0,) * 5
    assert (model.residual.rank, model.altup.streams, model.attention.rope.base) == (64, 4, 1e6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": [20] * 7 + [24]}, "intermediate_size=<a list>: must have one value, the same for each"),
        ({"intermediate_size": []}, "intermediate_size=<a list>: must have"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern: must have a number from 0 to below 1"),
        ({"activation_sparsity_pattern": [1] * 8}, "activation_sparsity_pattern: must have"),
        ({"altup_active_idx": 1}, "altup_active_idx=1: only 0 is supported"),
        ({"altup_correct_scale": False}, "altup_correct_scale=False: only True"),
        ({"altup_num_inputs": 100}, "altup_num_inputs=100: must be an integer from 1 to 64"),
        ({"num_kv_shared_layers": 7}, r"kv_shared_layers=7: must leave a global layer below"),
        ({"num_kv_shared_layers": 8}, r"kv_shared_layers=8: must be from 0 to 7"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input=0: must be an integer from 1"),
    ],
)
def test_configurations_that_are_not_supported(change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model({**CONFIG, **change}, "config.json")
    assert "\n" not in str(caught.value)


def test_parts_that_only_this_layout_holds():
    model = CONFIGS["altup"]
    assert write_model(model, "run")[1]["vocab_size_per_layer_input"] == 59
    whole = dataclasses.replace(model, per_layer=dataclasses.replace(model.per_layer, vocab_size=None))
    assert write_model(whole, "run")[1]["vocab_size_per_layer_input"] == 61
    with pytest.raises(UserError, match="altup_num_inputs=1: must be an integer from 2"):
        write_model(dataclasses.replace(model, layers=1, kv_shared_layers=0, altup=AltUpConfig()), "run")
    other = dataclasses.replace(CONFIGS["gemma2"], kv_shared_layers=1)
    for written in (write_model, written_for_transformers):
        with pytest.raises(UserError, match=r"model\.kv_shared_layers=1: only 0"):
            written(other, "run")
