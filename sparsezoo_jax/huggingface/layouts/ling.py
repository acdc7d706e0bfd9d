"""Ling 2.0 (arXiv 2510.22115): experts in matrices of their own, the routers' biases, layers that predict ahead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.configs.ling import OPTIMIZER, objectives
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.llama import read_sizes
from sparsezoo_jax.huggingface.layouts.rows import FFN_NORM, HEAD, INV_FREQ, Entry, Layout, vector
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Constant
from sparsezoo_jax.untrusted import MAX_LAYERS, MAX_TENSORS

_LAYER, _MODULE = "model.layers.{layer}", "model.layers.{module}"
_QKV = tuple(f"attention/projections/{name}" for name in ("q_DNH", "k_DKH", "v_DKH"))


def _gated(name: str, path: str, columns: str, rows: str) -> tuple[Entry, ...]:
    """The three maps of a SwiGLU; `path` is ours up to their names, `columns` and `rows` their axes."""
    return tuple(
        Entry(f"{_LAYER}.mlp.{name}{part}_proj.weight", (f"ffn/{path}{part}_{axes}",), 1, True)
        for part, axes in (("gate", columns), ("up", columns), ("down", rows))
    )


_ENTRIES = (
    Entry("model.word_embeddings.weight", ("embedding_VD",), 1),
    vector("model.norm.weight", "final_norm/scale"),
    HEAD,
    vector(f"{_LAYER}.input_layernorm.weight", "attention_residual/pre/scale"),
    Entry(f"{_LAYER}.attention.query_key_value.weight", _QKV, 1, True),
    vector(f"{_LAYER}.attention.query_layernorm.weight", "attention/projections/q_norm/scale"),
    vector(f"{_LAYER}.attention.key_layernorm.weight", "attention/projections/k_norm/scale"),
    Entry(f"{_LAYER}.attention.dense.weight", ("attention/projections/o_NHD",), 2, True),
    Entry(f"{_LAYER}.post_attention_layernorm.weight", FFN_NORM),
    *_gated("", "", "DF", "FD"),
    Entry(f"{_LAYER}.mlp.gate.weight", ("ffn/router_DE",), 1, True),
    vector(f"{_LAYER}.mlp.gate.expert_bias", "ffn/bias_E"),
    *_gated("experts.{expert}.", "", "EDW", "EWD"),
    *_gated("shared_experts.", "shared_", "DF", "FD"),
    vector(f"{_MODULE}.enorm.weight", "embedding_norm/scale"),
    vector(f"{_MODULE}.hnorm.weight", "hidden_norm/scale"),
    Entry(f"{_MODULE}.eh_proj.weight", ("joint_ED",), 1, True),
    vector(f"{_MODULE}.final_layernorm.weight", "final_norm/scale"),
)
_REQUIRED = {
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "rms_norm_eps": 1e-6,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
}


def _completed(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Without the field, which the authors' converter leaves out, tensors tell how many layers predict ahead."""
    if values.get("num_nextn_predict_layers") is not None:
        return dict(values)
    return {
        **values,
        "num_nextn_predict_layers": sum(re.search(r"\.eh_proj\.weight$", name) is not None for name in shapes),
    }


def _read(f: Fields) -> dict[str, Any]:
    heads = f.integer("num_attention_heads", 16)
    experts, shared = f.integer("num_experts", 256, MAX_TENSORS), f.count("num_shared_experts", 1)
    dense = f.count("first_k_dense_replace", 1, MAX_LAYERS)
    fraction = f.number("partial_rotary_factor", 1.0)
    for name, value in _REQUIRED.items():
        f.require(name, value)
    sizes = read_sizes(f, 32_768, tied=False)
    ahead = f.count("num_nextn_predict_layers", 0, MAX_LAYERS)
    stored = 3 * experts * (sizes["layers"] + ahead)
    if stored > MAX_TENSORS:
        f.problems.append(
            f"num_experts={experts}: would be {stored} tensors of experts; at most {MAX_TENSORS} are read"
        )
    first = GatedFFNConfig(d_ff=f.integer("intermediate_size", 5120), activation="silu") if dense else None
    return {
        **sizes,
        "attention": {
            "kind": "gqa",
            "heads": heads,
            "kv_heads": f.integer("num_key_value_heads", 4),
            "head_dim": f.integer("head_dim", max(sizes["d_model"] // heads, 1)),
            "qk_norm": True,
            "rope": f.rope(600_000.0, fraction),
        },
        "first_layers": dense,
        "first_ffn": first,
        "ffn": {
            "router": "ling",
            "experts": experts + shared,
            "shared_experts": shared,
            "expert_width": f.integer("moe_intermediate_size", 512),
            "k": f.integer("num_experts_per_tok", 8) + shared,
            "groups": f.integer("n_group", 8),
            "kept_groups": f.integer("topk_group", 4),
            "routed_scale": f.number("routed_scaling_factor", 1.0),
            "gated": True,
        },
        "mtp_layers": ahead,
    }


def _write(model: Any) -> dict[str, Any]:
    attention, ffn = model.attention, model.ffn
    rope = RopeConfig() if attention.rope is None else attention.rope
    return {
        # transformers needs the two modules that come with the released checkpoints.
        "auto_map": {
            "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
            "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
            "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.first_ffn.d_ff if model.first_layers else ffn.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "rope_theta": rope.base,
        "rope_scaling": None,
        "partial_rotary_factor": rope.fraction,
        "tie_word_embeddings": model.tie_embeddings,
        "num_experts": ffn.routed,
        "num_shared_experts": ffn.shared,
        "num_experts_per_tok": ffn.k - ffn.shared,
        "n_group": ffn.groups,
        "topk_group": ffn.kept_groups,
        "moe_intermediate_size": ffn.expert_width,
        "moe_shared_expert_intermediate_size": ffn.shared * ffn.expert_width,
        "first_k_dense_replace": model.first_layers,
        "routed_scaling_factor": ffn.routed_scale,
        "router_dtype": "fp32",
        "num_nextn_predict_layers": model.mtp_layers,
        "mtp_loss_scaling_factor": 0.1 if model.mtp_layers else 0,
        **_REQUIRED,
    }


def _train(model: DecoderConfig) -> TrainConfig:
    """The recipe of pre-training, for an unknown number of steps."""
    routing = model.layers - model.first_layers + model.mtp_layers
    weighed = tuple(one for one in objectives(routing) if one.loss != "mtp" or model.mtp_layers)
    return TrainConfig(schedule=Constant(learning_rate=3.36e-4), optimizer=OPTIMIZER, objectives=weighed)


LING = Layout(
    "bailing_moe",
    "BailingMoeV2ForCausalLM",
    "model.",
    _ENTRIES,
    INV_FREQ,
    _read,
    _write,
    ("gqa",),
    "moe",
    lambda model: isinstance(model.ffn, MoEFFNConfig) and model.ffn.router == "ling",
    not_stored=tuple(
        f"ffn.{name}"
        for name in ("bias_rate", "router_std", "expert_std", "top_p", "competition", "implementation", "moved")
    ),
    arch="ling",
    train=_train,
    recognises=lambda values: (
        values.get("model_type") == "bailing_moe_v2" or values.get("architectures") == ["BailingMoeV2ForCausalLM"]
    ),
    completed=_completed,
    needs_code=True,
)
