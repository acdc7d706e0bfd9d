"""Conversion of BlockFFN checkpoints as released, on tiny random ones; their logits against the formulas in NumPy."""

import dataclasses
import json
import math
import os
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.huggingface.conversion import places
from sparsezoo_jax.huggingface.layouts import read_model, write_model
from sparsezoo_jax.inference import generate_tokens
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.training.optimizer import build_optimizer, check_groups
from sparsezoo_jax.training.state import ModelTemplate, initial_state
from sparsezoo_jax.training.step import build_train_step

# Keys and values as the released files have them, but for the sizes.
COMMON = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 5760,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 8,
    "ffn_type": "block_linear",
    "ffn_gated": True,
    "hidden_act": "silu",
    "router_act": "relu",
    "num_experts": 4,
    "expert_size": 5,
    "norm_after_router": "rms",
    "norm_scale": 1.0,
    "block_implementation": "torch",
}
LATENT = {
    "q_lora_rank": 10,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
CONFIGS = {
    "mla": {**COMMON, **LATENT, "attention_type": "mla", "num_key_value_heads": 32, "tie_word_embeddings": False},
    "gqa": {**COMMON, "attention_type": "vanilla", "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def shapes_of(config):
    """Names and shapes as the released files have them, written out independently of the tables under test."""
    d, v, heads = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    experts, width = config["num_experts"], config["expert_size"]
    head = d // heads
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    if config["attention_type"] == "mla":
        q, c, nope, rope = (config[n] for n in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
        attention = {
            "q_a_proj.weight": (q, d),
            "q_a_layernorm.weight": (q,),
            "q_b_proj.weight": (heads * (nope + rope), q),
            "kv_a_proj_with_mqa.weight": (c + rope, d),
            "kv_a_layernorm.weight": (c,),
            "kv_b_proj.weight": (heads * (nope + head), c),
            "o_proj.weight": (d, heads * head),
        }
    else:
        kv = config["num_key_value_heads"] * head
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
        attention = {f"{name}.weight": shape for name, shape in attention.items()}
    block = config["ffn_type"] == "block"
    layer = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        "mlp.router_proj.weight": (experts, d),
        "mlp.router_norm.weight": (experts,),
        "mlp.up_proj": (experts, width, d) if block else (experts * width, d),
        "mlp.down_proj": (experts, d, width) if block else (d, experts * width),
    }
    if config["norm_after_router"] != "rms":
        del layer["mlp.router_norm.weight"]
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def tensors_of(config, dtype=np.float32, scale=1.0):
    draw = np.random.default_rng(0)
    return {name: (scale * draw.standard_normal(shape)).astype(dtype) for name, shape in shapes_of(config).items()}


def write(folder, config, tensors=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_bin(folder, config, *shards):
    """`pytorch_model.bin`, or shards and their index."""
    torch = pytest.importorskip("torch")

    def as_torch(x):
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    write(folder, config)
    names = ["pytorch_model.bin"]
    if len(shards) > 1:
        names = [f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, shard in zip(names, shards, strict=True):
        torch.save({key: as_torch(value) for key, value in shard.items()}, folder / name)
    return folder


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


# ------------------------------------------------------------------------------------------------------ There and back


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(name, dtype, tmp_path):
    config = CONFIGS[name]
    tensors = tensors_of(config, dtype)
    assert len(tensors) == (3 * 13 + 3 if name == "mla" else 3 * 10 + 2)
    run, back = tmp_path / "run", tmp_path / "back"
    made = huggingface.from_hf(write(tmp_path / "source", config, tensors), run)
    assert made.parameters == sum(x.size for x in tensors.values())
    assert made.dtype == np.dtype(dtype).name
    huggingface.to_hf(run, back, released=True)
    assert_same(load_file(back / "model.safetensors"), tensors)
    written = json.loads((back / "config.json").read_text())
    unused = {"intermediate_size", "torch_dtype", "bos_token_id", "eos_token_id"}
    unused |= {"num_key_value_heads"} if name == "mla" else set()
    assert {key: written[key] for key in config.keys() - unused} == {key: config[key] for key in config.keys() - unused}
    assert config.keys() <= written.keys()
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_minicpm.MiniCPMForCausalLM"


def test_run_configuration(tmp_path):
    huggingface.from_hf(write(tmp_path / "source", CONFIGS["mla"], tensors_of(CONFIGS["mla"])), tmp_path / "run")
    config = sparsezoo_jax.load(tmp_path / "run").config
    model = config.model
    assert (config.arch, config.size) == ("blockffn", "minicpm_hf")
    assert (model.attention.kind, model.ffn.kind, model.tie_embeddings) == ("mla", "blockffn", False)
    assert (model.embedding_scale, model.logit_divisor) == (12, 3)
    assert model.residual.scale == 1.4 / math.sqrt(3)
    assert (model.norm.eps, model.ffn.norm_eps, model.attention.latent_norm_eps) == (1e-5, 1e-5, 1e-6)
    assert (model.attention.v_head_dim, model.ffn.experts, model.ffn.expert_width) == (8, 4, 5)
    assert {objective.loss for objective in config.train.objectives} == {
        "activation_locality",
        "chunk_sparsification",
    }
    assert config.train.groups[0].lr_multiplier == pytest.approx(1 / 3)


@pytest.mark.parametrize("size", ["small", "medium", "large", "xlarge", "2_8b"])
def test_presets_are_the_released_models(size):
    """Their configurations, as released, describe the presets, and their tensors cover every parameter."""
    d, layers, heads, experts, width = {
        "small": (768, 16, 6, 48, 64),
        "medium": (1280, 27, 10, 40, 128),
        "large": (1536, 32, 12, 48, 128),
        "xlarge": (1792, 35, 14, 56, 128),
        "2_8b": (2048, 36, 16, 128, 128),
    }[size]
    model, latent = preset("blockffn", size).model, size != "2_8b"
    layout, values = write_model(model, "run")
    expected = {
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_experts": experts,
        "expert_size": width,
        "vocab_size": 122753 if latent else 73448,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": not latent,
        "attention_type": "mla" if latent else "vanilla",
        "num_key_value_heads": heads if latent else 4,
    }
    if latent:
        widths = {"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        expected |= {**widths, "v_head_dim": 128}
    assert {name: values[name] for name in expected} == expected
    assert type(values["scale_emb"]) is type(values["dim_model_base"]) is int
    template = ModelTemplate(lambda rngs: Decoder(model, rngs=rngs))
    parameters = {path: variable.shape for path, variable in template.parameters.items()}
    found = list(places(layout, model, parameters))
    assert {path for place in found for path in place.paths} == set(parameters)
    assert len(found) == (13 * layers + 3 if latent else 10 * layers + 2)


@pytest.mark.parametrize("norm", ["rms", "sum", "none"])
def test_experts_as_stacks(norm, tmp_path):
    """ffn_type "block" has 3-D weights: the same model, written as block_linear."""
    linear = {**CONFIGS["mla"], "norm_after_router": norm, "norm_scale": 2.0}
    block = {**linear, "ffn_type": "block"}
    tensors = tensors_of(block)
    huggingface.from_hf(write(tmp_path / "source", block, tensors), tmp_path / "run")
    huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True)
    flat = dict(tensors)
    for i in range(3):
        flat[f"model.layers.{i}.mlp.up_proj"] = tensors[f"model.layers.{i}.mlp.up_proj"].reshape(20, 24)
        down = tensors[f"model.layers.{i}.mlp.down_proj"]
        flat[f"model.layers.{i}.mlp.down_proj"] = np.stack([down[f // 5, :, f % 5] for f in range(20)], axis=1)
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), flat)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["ffn_type"], written["norm_after_router"], written["norm_scale"]) == ("block_linear", norm, 2.0)
    with pytest.raises(UserError, match=r"mlp\.up_proj is \[4, 5, 24\], must be \[20, 24\]"):
        huggingface.from_hf(write(tmp_path / "wrong", linear, tensors), tmp_path / "other")


# -------------------------------------------------------------------------------------------------------- The formulas


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotated(x_TP):
    """Pairs (i, i + P/2), frequencies 10000^(-2i/P)."""
    length, width = x_TP.shape
    angle = np.arange(length)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    a, b = x_TP[:, : width // 2], x_TP[:, width // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1)


def attended(q_TH, k_TH, v_TH):
    scores = q_TH @ k_TH.T / math.sqrt(q_TH.shape[1])
    scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v_TH


def attention(x_TD, w, config):
    heads = config["num_attention_heads"]
    if config["attention_type"] == "vanilla":
        head = config["hidden_size"] // heads
        q, k, v = (x_TD @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        parts = [q[:, h * head : (h + 1) * head] for h in range(heads)]
        return np.concatenate([attended(rotated(q), rotated(k), v) for q in parts], axis=1)  # one key head
    nope, rope, latent = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    v_width = config["v_head_dim"]
    q = rms(x_TD @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"], 1e-6)
    q = q @ w["self_attn.q_b_proj.weight"].T
    joint = x_TD @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    k_rope = rotated(joint[:, latent:])
    kv = rms(joint[:, :latent], w["self_attn.kv_a_layernorm.weight"], 1e-6) @ w["self_attn.kv_b_proj.weight"].T
    mixed = []
    for h in range(heads):
        own_q = q[:, h * (nope + rope) : (h + 1) * (nope + rope)]
        own_kv = kv[:, h * (nope + v_width) : (h + 1) * (nope + v_width)]
        queries = np.concatenate([own_q[:, :nope], rotated(own_q[:, nope:])], axis=1)
        keys = np.concatenate([own_kv[:, :nope], k_rope], axis=1)
        mixed.append(attended(queries, keys, own_kv[:, nope:]))
    return np.concatenate(mixed, axis=1)


def ffn(x_TD, w, config):
    """Experts one by one."""
    score = np.maximum(x_TD @ w["mlp.router_proj.weight"].T, 0)
    score = rms(score, w["mlp.router_norm.weight"], config["rms_norm_eps"])
    width, y = config["expert_size"], 0
    for e in range(config["num_experts"]):
        up = x_TD @ w["mlp.up_proj"][e * width : (e + 1) * width].T
        y = y + score[:, e : e + 1] * (up / (1 + np.exp(-up)) @ w["mlp.down_proj"][:, e * width : (e + 1) * width].T)
    return y


def logits_of(tokens, tensors, config):
    tensors, eps = {name: x.astype(np.float64) for name, x in tensors.items()}, config["rms_norm_eps"]
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    x = config["scale_emb"] * tensors["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        mixed = attention(rms(x, w["input_layernorm.weight"], eps), w, config)
        x = x + depth * mixed @ w["self_attn.o_proj.weight"].T
        x = x + depth * ffn(rms(x, w["post_attention_layernorm.weight"], eps), w, config)
    x = rms(x, tensors["model.norm.weight"], eps) / (config["hidden_size"] / config["dim_model_base"])
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ tensors[head].T


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formulas(name, tmp_path):
    config, tensors = CONFIGS[name], tensors_of(CONFIGS[name], scale=0.3)
    # Latents of about the size of their norms' eps tell it from the other norms'.
    for i in range(3):
        for tensor in ("q_a_proj", "kv_a_proj_with_mqa"):
            if name == "mla":
                tensors[f"model.layers.{i}.self_attn.{tensor}.weight"] *= np.float32(3e-3)
    huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    tokens = np.random.default_rng(1).integers(0, 40, 20)
    model = sparsezoo_jax.load(tmp_path / "run").model
    logits = nnx.jit(lambda model, tokens: model(tokens).logits)(model, jnp.asarray(tokens)[None])[0]
    expected = logits_of(tokens, tensors, config)
    # float32 against float64 over three layers.
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
    for key, other in {"scale_depth": 1.5, "scale_emb": 11, "dim_model_base": 9, "rms_norm_eps": 1e-3}.items():
        changed = logits_of(tokens, tensors, {**config, key: other})
        assert np.abs(changed - expected).max() > 2e-4 * np.abs(expected).max(), f"{key} changes nothing"


@pytest.mark.slow
def test_a_converted_model_generates_and_trains_on(tmp_path):
    """By its own recipe: groups and objectives fit the model, and losses of the same batch fall."""
    shallow = {**CONFIGS["mla"], "num_hidden_layers": 1}
    huggingface.from_hf(write(tmp_path / "source", shallow, tensors_of(shallow, scale=0.3)), tmp_path / "run")
    model, config, _ = sparsezoo_jax.load(tmp_path / "run")
    assert len(list(generate_tokens(model, [1, 2, 3], max_new_tokens=5))) == 5
    train = dataclasses.replace(config.train, steps=30)
    template = ModelTemplate(lambda rngs: Decoder(config.model, rngs=rngs))
    check_groups(train, template.parameters)
    optimizer = build_optimizer(train, template.parameters)
    state = initial_state(template, lambda rngs: model, optimizer, train.objectives, jax.random.key(0))
    step = jax.jit(build_train_step(train, template, optimizer))
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, 40)
    whole = jnp.ones((2, 16), jnp.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": whole,
        "positions": jnp.cumsum(whole, axis=1) - 1,
        "mask": whole > 0,
    }
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert {"coefficients/activation_locality", "coefficients/chunk_sparsification"} <= metrics.keys()


# ------------------------------------------------------------------------------------------------------- Files of torch


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("count", [1, 3])
def test_files_of_torch(dtype, count, tmp_path):
    config, tensors = CONFIGS["mla"], tensors_of(CONFIGS["mla"], dtype)
    shards = [dict(list(tensors.items())[i::count]) for i in range(count)]
    made = huggingface.from_hf(write_bin(tmp_path / "source", config, *shards), tmp_path / "run")
    huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True)
    kept = {n: x.astype(np.float32) for n, x in tensors.items()} if dtype == np.float16 else tensors
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), kept)
    assert bool(made.notes) == (dtype == np.float16)
    if count > 1:
        (tmp_path / "source" / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(UserError, match=r"index\.json names are missing: pytorch_model-00002-of-00003\.bin"):
            huggingface.from_hf(tmp_path / "source", tmp_path / "new")


class Harm:
    """Pickled, it would make a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_of_torch_with_more_than_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    source = write(tmp_path / "source", CONFIGS["mla"])
    for content, error, message in (
        ({"x": Harm(tmp_path / "harm")}, StorageError, "more than tensors"),
        ({"model.norm.weight": torch.zeros(3), "epoch": 3}, UserError, "more than tensors: epoch"),
        ([torch.zeros(3)], UserError, "holds a list, not tensors by name"),
    ):
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(error, match=message):
            huggingface.from_hf(source, tmp_path / "run")
    torch.save({"x": torch.zeros(3)}, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(StorageError, match="not to be mapped"):
        huggingface.from_hf(source, tmp_path / "run")
    (source / "pytorch_model.bin").write_bytes(b"PK not a zip file")
    with pytest.raises(StorageError, match="damaged"):
        huggingface.from_hf(source, tmp_path / "run")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "run").exists()


def test_without_torch(tmp_path, monkeypatch):
    source = write(tmp_path / "source", CONFIGS["mla"])
    (source / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # as Python marks what can't be imported
    with pytest.raises(UserError, match=r"torch is not installed.*pip install -e '\.\[hf\]'"):
        huggingface.from_hf(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_type": "moe"}, "ffn_type=moe: must be block_linear or block"),
        ({"ffn_type": None}, "ffn_type=None: must be block_linear or block"),
        ({"expert_gated": True}, "expert_gated=True: only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: only silu is supported"),
        ({"router_act": "sigmoid"}, "router_act=sigmoid: only relu is supported"),
        ({"norm_after_router": "layer"}, "norm_after_router=layer: must be rms or sum or none"),
        ({"block_implementation": "fastmoe"}, "block_implementation=fastmoe: only torch is supported"),
        ({"attention_type": "sparse"}, "attention_type=sparse: must be mla or vanilla"),
        ({"v_head_dim": 16}, "v_head_dim=16: only 8 is supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type=dynamic: scaled rotary embeddings"),
        ({"num_experts": None}, "num_experts: is missing"),
        ({"num_attention_heads": 5}, "num_attention_heads=5: must divide hidden_size=24"),
        ({"qk_rope_head_dim": 3}, "model.attention.qk_rope_head_dim=3: must be even"),
    ],
)
def test_configurations_that_are_not_supported(change, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model({**CONFIGS["mla"], **change}, "config.json")
    assert len(str(caught.value).split("; ")) == 1, "one change, one fault"


def test_all_faults_at_once():
    with pytest.raises(UserError) as caught:
        read_model({**CONFIGS["mla"], "hidden_act": "gelu", "ffn_type": "moe", "kv_lora_rank": 0}, "config.json")
    assert all(text in str(caught.value) for text in ("hidden_act=gelu", "ffn_type=moe", "kv_lora_rank=0"))


def test_all_faults_of_the_tensors_at_once(tmp_path):
    tensors = tensors_of(CONFIGS["mla"])
    del tensors["model.layers.2.mlp.router_norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj")
    tensors["model.layers.0.mlp.down_proj"] = tensors["model.layers.0.mlp.down_proj"].T.copy()
    with pytest.raises(UserError) as caught:
        huggingface.from_hf(write(tmp_path / "source", CONFIGS["mla"], tensors), tmp_path / "run")
    for text in (
        "missing: lm_head.weight, ",
        "model.layers.2.mlp.router_norm.weight",
        "unexpected: model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj is [20, 24], must be [24, 20]",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("ffn", {"gated": True}, "model.ffn.gated=True: only False"),
        ("ffn", {"norm_eps": 1e-3}, "model.ffn.norm_eps=0.001: only 1e-05"),
        ("attention", {"latent_norm_eps": 1e-5}, "model.attention.latent_norm_eps=1e-05: only 1e-06"),
        ("attention", {"v_head_dim": 64}, "v_head_dim=64: only 32 is supported"),
        ("residual", {"post_norm": True}, "model.residual.post_norm=True: only False"),
    ],
)
def test_runs_that_the_released_code_lacks(field, change, message):
    model = preset("blockffn", "tiny").model
    model = dataclasses.replace(model, **{field: dataclasses.replace(getattr(model, field), **change)})
    with pytest.raises(UserError, match=message):
        write_model(model, "run")


def test_training_settings_are_not_in_the_way():
    model = preset("blockffn", "tiny").model
    ffn = dataclasses.replace(model.ffn, router_dtype="bfloat16", chunk_length=8, auxiliary_losses=False)
    layout, values = write_model(dataclasses.replace(model, ffn=ffn), "run")
    assert (layout.model_type, values["scale_depth"]) == ("minicpm", 1.4)
