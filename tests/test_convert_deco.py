"""Conversion of DECO checkpoints on tiny random ones; their logits against the formulas in NumPy."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.layouts import layout_of, read_model, write_model
from tests.test_convert_blockffn import assert_same, attended, rms, rotated, write

# As the released converter writes it, Megatron's spelling.
CONFIG = {
    "model_type": "minicpm",
    "vocab_size": 40,
    "hidden_size": 12,
    "num_layers": 3,
    "ffn_hidden_size": 20,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "norm_epsilon": 1e-5,
    "use_blockffn": True,
    "num_experts": 5,
    "moe_ffn_hidden_size": 4,
    "moe_shared_expert_intermediate_size": 8,
    "moe_layer_freq": [0, 1, 1],
    "router_act_func": "relu",
    "router_norm_type": "simple",
    "router_norm_scalar": False,
    "router_norm_fixed": False,
    "expert_act_func": "norm_silu",
    "expert_not_gated": True,
    "use_mup": False,
}
# As the inference engine reads it, and without what only tensors tell.
ENGINE = {
    "model_type": "unheard-of",
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 20,
    "use_blockffn": True,
}


def shapes():
    """Names and shapes as the converter writes them, independently of the table under test."""
    d, f = 12, 20
    found = {"model.embed_tokens.weight": (40, d), "lm_head.weight": (40, d), "model.norm.weight": (d,)}
    for i in range(3):
        layer = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        if i == 0:
            layer |= {"mlp.gate_proj": (20, d), "mlp.up_proj": (20, d), "mlp.down_proj": (d, 20)}
        else:
            layer |= {
                "mlp.moe_router": (5, d),
                "mlp.router_norm": (5,),
                "mlp.expert_up_proj": (f, d),
                "mlp.expert_down_proj": (d, f),
                "mlp.expert_act.rms_norm": (4,),
                "mlp.shared_experts.gate_proj": (8, d),
                "mlp.shared_experts.up_proj": (8, d),
                "mlp.shared_experts.down_proj": (d, 8),
            }
            assert len(layer) == 14
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def tensors_of(dtype=np.float32):
    draw = np.random.default_rng(0)
    return {name: (0.4 * draw.standard_normal(shape)).astype(dtype) for name, shape in shapes().items()}


@pytest.mark.parametrize("config", [CONFIG, ENGINE], ids=["converter", "engine"])
def test_round_trip_is_bit_exact(config, tmp_path):
    tensors = tensors_of(ml_dtypes.bfloat16)
    huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True)
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    huggingface.from_hf(tmp_path / "back", tmp_path / "again")
    first, second = (sparsezoo_jax.load(tmp_path / name).config for name in ("run", "again"))
    assert first.model == second.model
    assert (first.arch, second.arch) == ("deco", "deco")


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, w, name):
    return (silu(x @ w[f"{name}.gate_proj"].T) * (x @ w[f"{name}.up_proj"].T)) @ w[f"{name}.down_proj"].T


def experts(x, w):
    """Each by itself, all units' mean removed."""
    score = np.maximum(x @ w["mlp.moe_router"].T, 0) * w["mlp.router_norm"]
    units, y = x @ w["mlp.expert_up_proj"].T, swiglu(x, w, "mlp.shared_experts")
    for e in range(5):
        part = slice(4 * e, 4 * e + 4)
        hidden = silu(rms(units[:, part] - units.mean(axis=1, keepdims=True), w["mlp.expert_act.rms_norm"], 1e-5))
        y = y + score[:, e : e + 1] * (hidden @ w["mlp.expert_down_proj"][:, part].T)
    return y


def logits_of(tokens, tensors):
    tensors = {name.removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items()}
    x = tensors["model.embed_tokens"][tokens]
    for i in range(3):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}
        h = rms(x, w["input_layernorm"], 1e-5)
        q, k, v = (np.split(h @ w[f"self_attn.{name}_proj"].T, 2, axis=1) for name in "qkv")
        mixed = [attended(rotated(q), rotated(k), v) for q, k, v in zip(q, k, v, strict=True)]
        x = x + np.concatenate(mixed, axis=1) @ w["self_attn.o_proj"].T
        h = rms(x, w["post_attention_layernorm"], 1e-5)
        x = x + (experts(h, w) if i else swiglu(h, w, "mlp"))
    return rms(x, tensors["model.norm"], 1e-5) @ tensors["lm_head"].T


def test_logits_are_those_of_the_formulas(tmp_path):
    huggingface.from_hf(write(tmp_path / "source", CONFIG, tensors_of()), tmp_path / "run")
    tokens = np.random.default_rng(1).integers(0, 40, 20)
    model = sparsezoo_jax.load(tmp_path / "run").model
    logits = nnx.jit(lambda model, tokens: model(tokens).logits)(model, tokens[None])[0]
    expected = logits_of(tokens, tensors_of())
    # float32 against float64 over three layers.
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_mup": True}, "use_mup=True: only False is supported"),
        ({"router_norm_type": "rms"}, "router_norm_type=rms: only simple is supported"),
        ({"router_norm_scalar": True}, "router_norm_scalar=True: only False"),
        ({"expert_not_gated": False}, "expert_not_gated=False: only True is supported"),
        ({"expert_act_func": "relu"}, "expert_act_func=relu: must be norm_silu or"),
        ({"moe_layer_freq": [1, 0, 1]}, "must be a list of 3, zeros and then ones"),
        ({"moe_layer_freq": [0, 0, 0]}, "must be a list of 3, zeros and then ones"),
        ({"moe_layer_freq": "all"}, "must be a list of 3, zeros and then ones"),
        ({"moe_layer_freq": [0] * 99}, "moe_layer_freq=<99 values>: must be a list of 3"),
        ({"num_experts": 0}, "num_experts=0: must be an integer from 1"),
        ({"num_attention_heads": 5}, "num_attention_heads=5: must divide hidden_size=12"),
    ],
)
def test_configurations_that_are_not_supported(change, message):
    with pytest.raises(UserError, match=message):
        read_model({**CONFIG, **change}, "config.json")


@pytest.mark.parametrize("value", [False, None])
def test_what_says_that_it_is_something_else_is_not_taken_for_deco(value):
    values = {"model_type": "llama", "use_blockffn": value, "router_norm_type": None}
    assert layout_of(values, "config.json").model_type == "llama"


def test_faults_of_the_tensors(tmp_path):
    tensors = tensors_of()
    del tensors["model.layers.2.mlp.router_norm.weight"]
    tensors["model.layers.1.mlp.expert_gate_proj.weight"] = np.zeros((20, 12), np.float32)
    with pytest.raises(UserError) as caught:
        huggingface.from_hf(write(tmp_path / "source", {**CONFIG, "num_experts": 6}, tensors), tmp_path / "run")
    for text in (
        "missing: model.layers.2.mlp.router_norm.weight",
        "unexpected: model.layers.1.mlp.expert_gate_proj.weight",
        "model.layers.1.mlp.moe_router.weight is [5, 12], must be [6, 12]",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["tiny", "0_1b"])
def test_presets_can_be_written(size):
    model = preset("deco", size).model
    layout, values = write_model(model, "run")
    assert (layout.model_type, values["use_blockffn"]) == ("deco", True)
