"""Conversion of Ling and PLM checkpoints as released, on tiny random ones; their logits against NumPy's."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.config import read_config
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.conversion import places
from sparsezoo_jax.huggingface.layouts import read_model, write_model
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.run_dir import write_config
from sparsezoo_jax.training.parameters import restore_params, save_params
from sparsezoo_jax.training.state import ModelTemplate, flatten
from tests.test_convert_blockffn import assert_same, attended, rms, rotated, write

# Keys as the authors' converter writes them; it gives no number of layers that predict ahead.
LING = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rope_theta": 10000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "num_experts": 8,
    "num_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 5,
    "first_k_dense_replace": 1,
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
PLM = {
    "architectures": ["PLMForCausalLM"],
    "model_type": "plm",
    "vocab_size": 40,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "hidden_act": "relu2",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
}
CONFIGS = {"ling": LING, "plm": PLM}


def swiglu_shapes(name, width):
    return {f"{name}gate_proj": (width, 12), f"{name}up_proj": (width, 12), f"{name}down_proj": (12, width)}


def ling_shapes():
    """As the released class names them: three layers and one that predicts ahead."""
    found = {"model.word_embeddings.weight": (40, 12), "lm_head.weight": (40, 12), "model.norm.weight": (12,)}
    for i in range(4):
        layer = {
            "input_layernorm": (12,),
            "post_attention_layernorm": (12,),
            "attention.query_key_value": ((4 + 2 + 2) * 8, 12),
            "attention.query_layernorm": (8,),
            "attention.key_layernorm": (8,),
            "attention.dense": (12, 4 * 8),
        }
        if i == 0:
            layer |= swiglu_shapes("mlp.", 20)
        else:
            layer |= {"mlp.gate": (8, 12), **swiglu_shapes("mlp.shared_experts.", 5)}
            for expert in range(8):
                layer |= swiglu_shapes(f"mlp.experts.{expert}.", 5)
            found[f"model.layers.{i}.mlp.gate.expert_bias"] = (8,)
        if i == 3:
            layer |= {"enorm": (12,), "hnorm": (12,), "eh_proj": (12, 24), "final_layernorm": (12,)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def plm_shapes():
    found = {"model.embed_tokens.weight": (40, 12), "model.norm.weight": (12,)}
    layer = {
        "input_layernorm": (12,),
        "post_attention_layernorm": (12,),
        "self_attn.q_proj": (2 * (5 + 8), 12),
        "self_attn.kv_a_proj_with_mqa": (7 + 8, 12),
        "self_attn.kv_a_layernorm": (7,),
        "self_attn.kv_b_proj": (2 * (5 + 6), 7),
        "self_attn.o_proj": (12, 2 * 6),
        "mlp.up_proj": (20, 12),
        "mlp.down_proj": (12, 20),
    }
    return found | {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}


SHAPES = {"ling": ling_shapes(), "plm": plm_shapes()}


def tensors_of(arch, dtype=np.float32):
    """Routers' biases, which are no parameters, stay float32."""
    draw = np.random.default_rng(0)
    return {
        name: (0.4 * draw.standard_normal(shape)).astype(np.float32 if name.endswith("bias") else dtype)
        for name, shape in SHAPES[arch].items()
    }


@pytest.mark.parametrize("arch", CONFIGS)
def test_round_trip_is_bit_exact(arch, tmp_path):
    tensors = tensors_of(arch, ml_dtypes.bfloat16)
    made = huggingface.from_hf(write(tmp_path / "source", CONFIGS[arch], tensors), tmp_path / "run")
    biases = [name for name in tensors if name.endswith("expert_bias")]
    assert (made.dtype, made.notes) == ("bfloat16", ())
    assert made.parameters == sum(x.size for x in tensors.values()) - 8 * len(biases)
    assert huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True).parameters == made.parameters
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    huggingface.from_hf(tmp_path / "back", tmp_path / "again")
    first, second = (read_config(tmp_path / name / "config.json") for name in ("run", "again"))
    assert first.model == second.model
    assert (first.arch, second.arch) == (arch, arch)


def test_a_run_that_ends_as_an_average_is_loaded_and_written_as_one(tmp_path):
    tensors, run = tensors_of("plm"), tmp_path / "run"
    huggingface.from_hf(write(tmp_path / "source", PLM, tensors), run)
    parameters = flatten(restore_params(run / "checkpoints")[0])
    for step in (1, 2):
        save_params(run / "checkpoints", {path: step * x for path, x in parameters.items()}, step=step)
    ends = {"train.steps": 2, "train.checkpoint_every": 1, "train.merge_last": 2, "train.merge_decay": "linear"}
    write_config(run, with_values(read_config(run / "config.json"), ends))
    huggingface.to_hf(run, tmp_path / "back", released=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], np.float32(1.5) * x)
    for arguments, factor in (({}, 1.5), ({"step": 1}, 1), ({"merge_last": 1}, 2)):
        model = sparsezoo_jax.load(run, **arguments).model
        np.testing.assert_array_equal(model.final_norm.scale[...], np.float32(factor) * tensors["model.norm.weight"])
    # What has not reached its last step ends as nothing yet.
    write_config(run, with_values(read_config(run / "config.json"), {"train.steps": 3}))
    model = sparsezoo_jax.load(run).model
    np.testing.assert_array_equal(model.final_norm.scale[...], 2 * tensors["model.norm.weight"])


# -------------------------------------------------------------------------------------------------------- The formulas


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, w, name):
    return (silu(x @ w[f"{name}gate_proj"].T) * (x @ w[f"{name}up_proj"].T)) @ w[f"{name}down_proj"].T


def experts(x_TD, w):
    """Token by token: the two best of four groups of two by their sum, and of these the three best experts."""
    y_TD = swiglu(x_TD, w, "mlp.shared_experts.")
    for t, x in enumerate(x_TD):
        score = 1 / (1 + np.exp(-w["mlp.gate"] @ x))
        ranked = score + w["mlp.gate.expert_bias"]
        kept = np.argsort(-ranked.reshape(4, 2).sum(axis=1))[:2]
        allowed = [e for e in range(8) if e // 2 in kept]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[:3]
        for e in chosen:
            y_TD[t] += 2.5 * score[e] / score[chosen].sum() * swiglu(x, w, f"mlp.experts.{e}.")
    return y_TD


def half_rotated(x_TH):
    return np.concatenate([rotated(x_TH[:, :4]), x_TH[:, 4:]], axis=1)


def ling_layer(x_TD, w, dense):
    h = rms(x_TD, w["input_layernorm"], 1e-6)
    qkv = np.split(h @ w["attention.query_key_value"].T, 8, axis=1)
    q = [half_rotated(rms(x, w["attention.query_layernorm"], 1e-6)) for x in qkv[:4]]
    k = [half_rotated(rms(x, w["attention.key_layernorm"], 1e-6)) for x in qkv[4:6]]
    mixed = [attended(q[n], k[n // 2], qkv[6 + n // 2]) for n in range(4)]
    x_TD = x_TD + np.concatenate(mixed, axis=1) @ w["attention.dense"].T
    h = rms(x_TD, w["post_attention_layernorm"], 1e-6)
    return x_TD + (swiglu(h, w, "mlp.") if dense else experts(h, w))


def neighbours_rotated(x_TP):
    """Pairs (2 i, 2 i + 1) as complex numbers."""
    pairs = x_TP[:, ::2] + 1j * x_TP[:, 1::2]
    angle = np.arange(len(x_TP))[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x_TP.shape)


def plm_layer(x_TD, w, dense):
    h = rms(x_TD, w["input_layernorm"], 1e-6)
    joint = h @ w["self_attn.kv_a_proj_with_mqa"].T
    kv = rms(joint[:, :7], w["self_attn.kv_a_layernorm"], 1e-6) @ w["self_attn.kv_b_proj"].T
    key = neighbours_rotated(joint[:, 7:])
    mixed = []
    heads = zip(np.split(h @ w["self_attn.q_proj"].T, 2, axis=1), np.split(kv, 2, axis=1), strict=True)
    for q, own in heads:
        q = np.concatenate([q[:, :5], neighbours_rotated(q[:, 5:])], axis=1)
        mixed.append(attended(q, np.concatenate([own[:, :5], key], axis=1), own[:, 5:]))
    x_TD = x_TD + np.concatenate(mixed, axis=1) @ w["self_attn.o_proj"].T
    h = rms(x_TD, w["post_attention_layernorm"], 1e-6)
    return x_TD + np.maximum(h @ w["mlp.up_proj"].T, 0) ** 2 @ w["mlp.down_proj"].T


def weights(tensors, prefix=""):
    named = {name.removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items()}
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}


def expected_logits(arch, tokens, tensors):
    """Of each token, and for Ling of the module that predicts ahead, whose last row is left out."""
    whole, layer = weights(tensors), {"ling": ling_layer, "plm": plm_layer}[arch]
    embedding = whole["model.word_embeddings" if arch == "ling" else "model.embed_tokens"]
    head = whole.get("lm_head", embedding)
    x = embedding[tokens]
    for i in range(CONFIGS[arch]["num_hidden_layers"]):
        x = layer(x, weights(tensors, f"model.layers.{i}."), dense=i == 0)
    hidden = rms(x, whole["model.norm"], 1e-6)
    if arch == "plm":
        return hidden @ head.T, None
    w = weights(tensors, "model.layers.3.")
    joined = [rms(embedding[tokens[1:]], w["enorm"], 1e-6), rms(hidden[:-1], w["hnorm"], 1e-6)]
    x = layer(np.concatenate(joined, axis=1) @ w["eh_proj"].T, w, dense=False)
    return hidden @ head.T, rms(x, w["final_layernorm"], 1e-6) @ head.T


@pytest.mark.parametrize("arch", CONFIGS)
def test_logits_are_those_of_the_formulas(arch, tmp_path):
    huggingface.from_hf(write(tmp_path / "source", CONFIGS[arch], tensors_of(arch)), tmp_path / "run")
    tokens = np.random.default_rng(1).integers(0, 40, 20)
    model = sparsezoo_jax.load(tmp_path / "run").model
    model.train()  # which is when modules of multi-token prediction run
    logits, ahead = nnx.jit(forward)(model, tokens[None])
    expected, expected_ahead = expected_logits(arch, tokens, tensors_of(arch))
    # float32 against float64 over three layers.
    np.testing.assert_allclose(logits[0], expected, atol=3e-5 * np.abs(expected).max())
    if arch == "ling":
        np.testing.assert_allclose(ahead[0][0, :-1], expected_ahead, atol=3e-5 * np.abs(expected_ahead).max())


def forward(model, tokens_BT):
    out = model(tokens_BT)
    return out.logits, [model.logits_of(one.hidden) for one in out.ahead]


# ---------------------------------------------------------------------------------------------------------- Refusals


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("ling", {"use_qk_norm": False}, "use_qk_norm=False: only True is supported"),
        ("ling", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05: only 1e-06 is supported"),
        ("ling", {"score_function": "softmax"}, "score_function=softmax: only sigmoid is supported"),
        ("ling", {"n_group": 3}, "must divide the 8 routed experts into groups"),
        ("ling", {"n_group": 0}, "n_group=0: must be an integer from 1"),
        ("ling", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1: must be an integer from 0 to 4096"),
        ("ling", {"first_k_dense_replace": 3}, "must be from 0 to 2"),
        ("ling", {"num_experts": 50_000}, "would be 450000 tensors of experts; at most 100000 are read"),
        ("ling", {"rope_scaling": {"type": "yarn"}}, "rope_type=yarn: scaled rotary embeddings are not supported"),
        ("ling", {"partial_rotary_factor": 0.4}, "must rotate an even number of dimensions, not 3.2 of 8"),
        ("plm", {"hidden_act": "gone"}, "hidden_act=gone: must be one of"),
        ("plm", {"q_lora_rank": 5}, "q_lora_rank=5: only None is supported"),
        ("plm", {"num_key_value_heads": 1}, "num_key_value_heads=1: only 2 is supported"),
        ("plm", {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7: must be even"),
        ("plm", {"attention_bias": True}, "attention_bias=True: only False is supported"),
    ],
)
def test_configurations_that_are_not_supported(arch, change, message):
    with pytest.raises(UserError, match=message):
        read_model({**CONFIGS[arch], **change}, "config.json")


def test_faults_of_the_tensors(tmp_path):
    tensors = tensors_of("ling")
    del tensors["model.layers.2.mlp.gate.expert_bias"], tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    tensors["model.layers.0.mlp.gate.expert_bias"] = np.zeros(8, np.float32)
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = np.zeros((5, 12), np.float32)
    tensors["model.layers.1.mlp.gate.expert_bias"] = np.zeros(7, np.float32)
    with pytest.raises(UserError) as caught:
        huggingface.from_hf(write(tmp_path / "source", LING, tensors), tmp_path / "run")
    for text in (
        "missing: model.layers.2.mlp.gate.expert_bias, model.layers.1.mlp.experts.7.up_proj.weight",
        "unexpected: model.layers.0.mlp.gate.expert_bias, model.layers.1.mlp.experts.8.up_proj.weight",
        "model.layers.1.mlp.gate.expert_bias is [7], must be [8]",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_field_against_the_tensors_is_not_overruled(tmp_path):
    for name, config, message in (
        ("none", {**LING, "num_nextn_predict_layers": 0}, "unexpected: .*model.layers.3.eh_proj.weight"),
        ("two", {**LING, "num_nextn_predict_layers": 2}, "missing: .*model.layers.4.attention.dense.weight"),
    ):
        with pytest.raises(UserError, match=message):
            huggingface.from_hf(write(tmp_path / name, config, tensors_of("ling")), tmp_path / "run")
    source = write(tmp_path / "plm", {**PLM, "tie_word_embeddings": False}, tensors_of("plm"))
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        huggingface.from_hf(source, tmp_path / "run")


@pytest.mark.parametrize(("arch", "size"), [("ling", "tiny"), ("ling", "mini"), ("plm", "tiny"), ("plm", "1_8b")])
def test_presets_can_be_written(arch, size):
    model = dataclasses.replace(preset(arch, size).model, embedding_scale=1.0)  # for which there is no place
    layout, _ = write_model(model, "run")
    template = ModelTemplate(lambda rngs: Decoder(model, rngs=rngs))
    held = {path: variable.shape for path, variable in (template.parameters | template.variables).items()}
    assert {path for place in places(layout, model, held) for path in place.paths} == set(held)
    assert max(entry.rotated for entry in layout.entries) == (model.attention.qk_rope_head_dim if arch == "plm" else 0)
