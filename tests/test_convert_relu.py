"""Released models with ReLUs (MiniCPM-S, ProSparse's Llamas, Bamboo) and dense MiniCPM, on tiny random checkpoints in
their layouts; logits against the formulas in NumPy.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.config import read_config
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.layouts import read_model, write_model
from sparsezoo_jax.inference.packing import packed
from sparsezoo_jax.models.ffn import GatedFFNConfig
from tests.test_convert import assert_same, tensors_of, write

# Keys and values as the released files have them, but for the sizes.
COMMON = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
MINICPM = {
    **COMMON,
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_scaling": None,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "minicpm": MINICPM,
    "minicpm-s": {**MINICPM, "hidden_act": "fatrelu", "hidden_act_param": 0.3},
    "prosparse": {
        **COMMON,
        "architectures": ["SparseLlamaForCausalLM"],
        "model_type": "sparsellama",
        "attention_bias": False,
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.25,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
    },
    "bamboo": {
        **COMMON,
        "architectures": ["BambooForCausalLM"],
        "model_type": "bamboo",
        "hidden_act": "relu",
        "rope_theta": 5000.0,
        "sliding_window": 5,
        "tie_word_embeddings": False,
    },
}
TOKENS = np.arange(12)


def stored(config, dtype: type = np.float32, scale=1.0):
    tensors = tensors_of({"head_dim": config["hidden_size"] // config["num_attention_heads"], **config})
    return {name: (np.float32(scale) * x).astype(dtype) for name, x in tensors.items()}


def rotated(x, base):
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = (np.tile(part(angles), 2)[:, None] for part in (np.cos, np.sin))
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


def normalised(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def gate_of(config):
    """The non-linearities of the gate and of what it multiplies."""
    name, threshold = config["hidden_act"], config.get("hidden_act_param", 0)
    gate = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "fatrelu": lambda x: np.where(x >= threshold, x, 0),
        "relu": lambda x: np.maximum(x, 0),
    }[name]
    return gate, gate if config["model_type"] == "bamboo" else lambda x: x


def logits_of(config, tensors):
    """In float64, [T, V]."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}
    layers, d, eps = config["num_hidden_layers"], config["hidden_size"], config["rms_norm_eps"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    gate, up = gate_of(config)
    depth = config["scale_depth"] / math.sqrt(layers) if "scale_depth" in config else 1
    x = config.get("scale_emb", 1) * t["model.embed_tokens.weight"][TOKENS]
    ahead = TOKENS[:, None] - TOKENS
    visible = (ahead >= 0) & (ahead < config.get("sliding_window", len(TOKENS)))
    for i in range(layers):
        p = f"model.layers.{i}."
        h = normalised(x, t[f"{p}input_layernorm.weight"], eps)
        q, k, v = (
            (h @ t[f"{p}self_attn.{name}_proj.weight"].T).reshape(len(h), n, -1)
            for name, n in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = (rotated(y, config.get("rope_theta", 10_000.0)) for y in (q, k))
        k, v = (np.repeat(y, heads // kv, axis=1) for y in (k, v))
        scores = np.where(visible, np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1]), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), v)
        x = x + depth * mixed.reshape(len(h), -1) @ t[f"{p}self_attn.o_proj.weight"].T
        h = normalised(x, t[f"{p}post_attention_layernorm.weight"], eps)
        a, b = (h @ t[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + depth * (gate(a) * up(b)) @ t[f"{p}mlp.down_proj.weight"].T
    x = normalised(x, t["model.norm.weight"], eps) / (d / config.get("dim_model_base", d))
    return x @ t["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_the_way_back(name, tmp_path):
    config, tensors = CONFIGS[name], stored(CONFIGS[name], scale=0.4)
    made = huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    assert made.notes == ()
    model, run, _ = sparsezoo_jax.load(tmp_path / "run")
    sparse, ffn = config["hidden_act"] != "silu", run.model.ffn
    assert run.arch == ("prosparse" if sparse else "dense")
    assert isinstance(ffn, GatedFFNConfig)
    assert (ffn.l1, ffn.threshold) == (sparse, config.get("hidden_act_param", 0))
    golden = logits_of(config, tensors)
    tokens = jnp.asarray(TOKENS)[None]
    out = model(tokens)
    # Float32 sums in another order; logits are of the order of 1.
    np.testing.assert_allclose(out.logits[0], golden, atol=2e-5)
    assert np.all((out.stats["ffn_density"] < 0.6) if sparse else (out.stats["ffn_density"] == 1))

    # Decoding from the cache of the packed model, token by token.
    fast = packed(model)
    cache = fast.init_cache(1, len(TOKENS))
    step = jax.jit(lambda token, cache: fast(token, cache=cache)[:5:4])
    for i in range(len(TOKENS)):
        logits, cache = step(tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(logits[0, 0], golden[i], atol=5e-5)

    huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True)
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    shared = config.keys() - {"torch_dtype", "bos_token_id", "eos_token_id", "rope_scaling"}
    assert {key: written[key] for key in shared} == {key: config[key] for key in shared}
    assert written["auto_map"]["AutoModelForCausalLM"].endswith(config["architectures"][0])


def test_bfloat16_and_the_threshold_of_a_llama(tmp_path):
    """MiniCPM-S comes in Llama's layout, too; the ReLU's threshold stays the same number."""
    config = {**CONFIGS["prosparse"], "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    tensors = stored(config, ml_dtypes.bfloat16)
    huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    run = read_config(tmp_path / "run" / "config.json")
    assert (run.arch, run.size) == ("prosparse", "sparsellama_hf")
    assert isinstance(run.model.ffn, GatedFFNConfig)
    assert run.model.ffn.threshold == 0.25
    huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True)
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_predictors_are_left_out_with_a_note(tmp_path):
    tensors = stored(CONFIGS["bamboo"])
    predictors = {
        f"model.layers.{i}.mlp.predictor.{name}.weight": np.zeros(shape, np.float32)
        for i in range(2)
        for name, shape in (("fc1", (6, 24)), ("fc2", (20, 6)))
    }
    made = huggingface.from_hf(write(tmp_path / "source", CONFIGS["bamboo"], tensors | predictors), tmp_path / "run")
    assert made.notes == (
        "predictors of active neurons (mlp.predictor) are left out: what they drop of the neurons that are not 0 stays",
    )
    assert made.parameters == sum(x.size for x in tensors.values())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("minicpm-s", {"hidden_act": "shiftrelu"}, "hidden_act=shiftrelu: must be one of .*relu2, fatrelu$"),
        ("minicpm-s", {"hidden_act_param": -0.1}, "hidden_act_param=-0.1: must be a number from 0 on$"),
        ("prosparse", {"hidden_act_param": "0.01"}, "hidden_act_param=0.01: must be a number from 0 on$"),
        ("prosparse", {"hidden_act_param": None}, "hidden_act_param: is missing$"),
        ("minicpm", {"scale_emb": "12"}, "scale_emb=12: must be a positive number$"),
        ("minicpm", {"scale_depth": [1.4]}, r"scale_depth=\[1.4\]: must be a positive number$"),
        ("minicpm", {"dim_model_base": 0}, "dim_model_base=0: must be a positive number$"),
        ("minicpm", {"num_experts": 8}, "num_experts=8: only 0 is supported$"),
        ("minicpm", {"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type=longrope: must be one of default"),
        ("bamboo", {"sliding_window": 0}, "sliding_window=0: must be an integer from 1"),
        ("bamboo", {"mlp_bias": True}, "mlp_bias=True: only False is supported$"),
    ],
)
def test_configurations_that_are_not_supported(name, change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model({**CONFIGS[name], **change}, "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "model_type"), [("tiny", "sparsellama"), ("1b", "minicpm"), ("13b", "sparsellama")])
def test_presets_go_into_the_released_layouts(size, model_type):
    model = preset("prosparse", size).model
    if size == "tiny":  # Llama's layout has no place for it
        model = dataclasses.replace(model, embedding_scale=1.0)
    assert isinstance(model.ffn, GatedFFNConfig)
    _, values = write_model(model, "run")
    assert (values["model_type"], values["hidden_act"]) == (model_type, "fatrelu")
    assert values["hidden_act_param"] == model.ffn.threshold
    if model_type == "minicpm":
        assert [values[name] for name in ("scale_emb", "scale_depth", "dim_model_base")] == [12, 1.4, 256]
