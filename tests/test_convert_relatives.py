"""Gemma 3, Mistral, Qwen 2, Qwen 3 and OLMo 2 there and back, on tiny random checkpoints.

Logits are those of transformers.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.layouts import read_model, write_model
from sparsezoo_jax.inference.packing import packed
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.rope import RopeConfig
from tests.test_convert import assert_same, write

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CONFIGS = {
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2",
        **SIZES,
        "head_dim": 6,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        **SIZES,
        "attention_bias": False,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": {"model_type": "olmo2", **SIZES, "head_dim": 6, "attention_bias": False},
    "gemma3_text": {
        "model_type": "gemma3_text",
        **{name: value for name, value in SIZES.items() if name != "rope_theta"},
        "num_hidden_layers": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 20.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}
#: The rotations of Gemma 3 above, as configurations were written before.
FORMERLY = {
    "rope_parameters": None,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
NORMS = {
    "mistral": {"input_layernorm": 24, "post_attention_layernorm": 24},
    "qwen2": {"input_layernorm": 24, "post_attention_layernorm": 24},
    "qwen3": {
        "input_layernorm": 24,
        "post_attention_layernorm": 24,
        "self_attn.q_norm": 8,
        "self_attn.k_norm": 8,
    },
    "olmo2": {
        "post_attention_layernorm": 24,
        "post_feedforward_layernorm": 24,
        "self_attn.q_norm": 24,
        "self_attn.k_norm": 12,
    },
    "gemma3_text": {
        "input_layernorm": 24,
        "post_attention_layernorm": 24,
        "pre_feedforward_layernorm": 24,
        "post_feedforward_layernorm": 24,
        "self_attn.q_norm": 8,
        "self_attn.k_norm": 8,
    },
}
#: First six logits after tokens 0..11 of the checkpoints below, as transformers 5.24 computes them in float32 with
#: eager attention.
GOLDEN = {
    "mistral": [-0.35385, -0.56453, 0.0324, -0.27096, -0.25815, -0.3274],
    "qwen2": [-0.18891, -0.50609, 0.39605, -0.50916, -0.37849, 0.56922],
    "qwen3": [0.00492, 0.95133, 1.04562, 0.78483, 0.3292, 0.86517],
    "olmo2": [0.45596, 0.416, 0.32204, 0.58809, 0.35325, 0.25683],
    "gemma3_text": [-0.01907, -0.16923, -0.67415, -1.85443, 0.95911, -1.96414],
}


def tensors_of(config):
    """Names and shapes as transformers has them, drawn in the order of their names."""
    name, d, f, v = config["model_type"], 24, 20, 40
    q, kv = (config[f"num_{heads}_heads"] * config["head_dim"] for heads in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (width,) for norm, width in NORMS[name].items()}
        maps = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        shapes |= {f"{layer}self_attn.{each}_proj.weight": shape for each, shape in maps.items()}
        if name == "qwen2":
            shapes |= {f"{layer}self_attn.{each}_proj.bias": maps[each][:1] for each in "qkv"}
        mlp = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        shapes |= {f"{layer}mlp.{each}_proj.weight": shape for each, shape in mlp.items()}
    draw = np.random.default_rng(0)
    return {key: (0.3 * draw.standard_normal(shapes[key])).astype(np.float32) for key in sorted(shapes)}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    config, tensors = CONFIGS[name], tensors_of(CONFIGS[name])
    huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    model, run, _ = sparsezoo_jax.load(tmp_path / "run")
    tokens = jnp.arange(12)[None]
    logits = model(tokens).logits
    # The numbers are rounded to five places; the rest is float32 summed in another order.
    np.testing.assert_allclose(logits[0, -1, :6], GOLDEN[name], atol=3e-5)

    # Decoding from the cache of the packed model: a prompt, then token by token.
    fast = packed(model)
    out = fast(tokens[:, :8], cache=fast.init_cache(1, 12))
    np.testing.assert_allclose(out.logits, logits[:, :8], atol=1e-4)
    step, cache = jax.jit(lambda token, cache: fast(token, cache=cache)[:5:4]), out.cache
    for i in range(8, 12):
        made, cache = step(tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(made[:, 0], logits[:, i], atol=1e-4)

    huggingface.to_hf(tmp_path / "run", tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert read_model(written, "config.json")[1].layer_specs() == run.model.layer_specs()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"sliding_window": "all"}, "sliding_window=all: must be an integer from 1"),
        ("mistral", {"attention_bias": True}, "attention_bias=True: only False is supported$"),
        ("mistral", {"hidden_act": "fatrelu"}, "hidden_act=fatrelu: must be one of .*relu2$"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window=1: must be true or false$"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers=-1: must be an integer from 0"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "layer_types=<2 values>: must have one for each"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types=.*: must list at most"),
        ("qwen3", {"use_sliding_window": False}, "layer_types: lists sliding_attention, but use_sliding_window or"),
        ("olmo2", {"rms_norm_eps": 0}, "rms_norm_eps=0: must be a positive number$"),
        ("olmo2", {"num_key_value_heads": 3}, "model.attention.kv_heads=3: must divide"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": 3}},
            "rope_parameters.full_attention=3: must be an object",
        ),
        (
            "gemma3_text",
            {**FORMERLY, "rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type=dynamic: must be one",
        ),
        ("gemma3_text", {**FORMERLY, "rope_local_base_freq": 0}, "rope_local_base_freq=0: must be a positive number$"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: only False"),
    ],
)
def test_configurations_that_are_not_supported(name, change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model({**CONFIGS[name], **change}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "types"),
    [
        ("mistral", {"sliding_window": None}, "ggg"),
        ("mistral", {}, "lll"),
        ("qwen2", {}, "gll"),
        ("qwen2", {"max_window_layers": 5}, "ggg"),
        ("qwen2", {"use_sliding_window": False}, "ggg"),
        ("qwen3", {"layer_types": None, "max_window_layers": 2}, "ggl"),
        ("qwen3", {}, "lgl"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}, "llgl"),
        ("gemma3_text", {"layer_types": None}, "llll"),
    ],
)
def test_layers_that_have_windows(name, change, types):
    _, model = read_model({**CONFIGS[name], **change}, "config.json")
    assert "".join(spec.layer_type[0] for spec in model.layer_specs()) == types


def test_rotations_of_gemma_3_in_both_forms():
    _, model = read_model({**CONFIGS["gemma3_text"], **FORMERLY}, "config.json")
    assert model == read_model(CONFIGS["gemma3_text"], "config.json")[1]
    rope = model.attention.rope
    assert (rope.of("local"), rope.of("global")[0]) == ((100.0, 1.0, None), 5000.0)
    _, plain = read_model({**CONFIGS["gemma3_text"], "rope_parameters": None}, "config.json")
    assert (plain.attention.rope.base, plain.attention.rope.local_base, plain.attention.rope.scaling) == (
        1e6,
        1e4,
        None,
    )


def decoder(**changes):
    attention = GQAConfig(heads=2, kv_heads=1, head_dim=8, **changes.pop("attention", {}))
    ffn = GatedFFNConfig(d_ff=24, **{"activation": "silu", **changes.pop("ffn", {})})
    return DecoderConfig(vocab_size=32, d_model=16, layers=2, max_seq_len=16, attention=attention, ffn=ffn, **changes)


OLMO = {"qk_norm": True, "qk_norm_over": "heads"}
POST = PreNormConfig(input_norm=False, post_norm=True)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (decoder(), "llama"),
        (decoder(attention={"bias": True}), "llama"),
        (decoder(attention={"bias": True, "output_bias": False}), "qwen2"),
        (decoder(attention={"qk_norm": True}), "qwen3"),
        (
            decoder(
                attention={
                    "qk_norm": True,
                    "qk_norm_zero_centered": True,
                    "rope": RopeConfig(base=1e6, local_base=1e4),
                },
                ffn={"activation": "gelu_tanh"},
                residual=PreNormConfig(post_norm=True),
                norm=NormConfig(zero_centered=True),
                embedding_scale="sqrt_d_model",
            ),
            "gemma3_text",
        ),
        (decoder(attention={"window": 4}, layer_pattern=("local",)), "mistral"),
        (decoder(attention=OLMO, residual=POST), "olmo2"),
        (decoder(residual=POST), "model.attention.qk_norm=False: only True"),
        (decoder(attention=OLMO), "a LlamaForCausalLM checkpoint can't hold .*qk_norm=True: only False"),
        (decoder(attention={"qk_norm": True, "qk_norm_eps": 1e-3}), "qk_norm_eps=0.001: only 1e-06"),
        (
            decoder(attention={"qk_norm": True}, ffn={"activation": "relu", "threshold": 0.1}),
            "a SparseLlamaForCausalLM checkpoint can't hold model.attention.qk_norm=True: only False",
        ),
    ],
)
def test_the_layout_that_holds_a_decoder(model, found):
    if " " not in found:
        assert write_model(model, "run")[1]["model_type"] == found
        return
    with pytest.raises(UserError, match=found):
        write_model(model, "run")
