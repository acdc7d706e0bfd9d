"""BlockFFN as its authors released it: MiniCPM's classes with routed experts, and latent or grouped-query attention."""

from __future__ import annotations

from typing import Any

from sparsezoo_jax.configs.blockffn import INIT, OPTIMIZER, groups, objectives
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.minicpm import read_scales, write_scales
from sparsezoo_jax.huggingface.layouts.rows import (
    EMBEDDING_AND_NORMS,
    FFN_NORM,
    GROUPED_QUERY,
    INV_FREQ,
    LATENT,
    Entry,
    Layout,
    auto_map,
    vector,
)
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import WSD
from sparsezoo_jax.untrusted import MAX_LAYERS

_LATENT = (
    Entry("model.layers.{layer}.self_attn.q_a_proj.weight", ("attention/q_a_DR",), 1, True),
    vector("model.layers.{layer}.self_attn.q_a_layernorm.weight", "attention/q_a_norm/scale"),
    Entry("model.layers.{layer}.self_attn.q_b_proj.weight", ("attention/q_b_RNH",), 1, True),
    Entry("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", ("attention/kv_a_DC",), 1, True),
    *LATENT,
)
_UP, _DOWN = "model.layers.{layer}.mlp.up_proj", "model.layers.{layer}.mlp.down_proj"  # no ".weight": not Linear layers
_EXPERTS = {
    "block_linear": (Entry(_UP, ("ffn/up_DF",), 1, True), Entry(_DOWN, ("ffn/down_FD",), 1, True)),
    "block": (Entry(_UP, ("ffn/up_DF",), 1, True, 0), Entry(_DOWN, ("ffn/down_FD",), 1, True, 1)),
}
_ENTRIES = (
    *EMBEDDING_AND_NORMS,
    Entry("model.layers.{layer}.post_attention_layernorm.weight", FFN_NORM),
    *_LATENT,
    *GROUPED_QUERY,
    Entry("model.layers.{layer}.mlp.router_proj.weight", ("ffn/router_DE",), 1, True),
    vector("model.layers.{layer}.mlp.router_norm.weight", "ffn/router_norm/scale"),
)
_MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
KV_UP_INIT_STD = 0.02


def _read(f: Fields) -> dict[str, Any]:
    width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    layers = f.integer("num_hidden_layers", most=MAX_LAYERS)
    eps = f.number("rms_norm_eps", 1e-6)
    stored = f.choice("ffn_type", tuple(_EXPERTS))
    f.require("expert_gated", False)
    f.require("block_implementation", "torch")
    f.require("hidden_act", "silu")
    f.require("router_act", "relu")
    f.require("attention_bias", False)
    if width % heads:
        f.problems.append(f"num_attention_heads={heads}: must divide hidden_size={width}")
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": width,
        "layers": layers,
        "max_seq_len": f.integer("max_position_embeddings"),
        "attention": _read_attention(f, heads, width // heads),
        "ffn": {
            "kind": "blockffn",
            "experts": f.integer("num_experts"),
            "expert_width": f.integer("expert_size"),
            "norm_after_router": f.choice("norm_after_router", ("rms", "sum", "none")),
            "norm_eps": eps,
            "norm_scale": f.number("norm_scale", 1.0),
        },
        **read_scales(f, width, layers),
        "norm": NormConfig(eps=eps),
        "tie_embeddings": f.flag("tie_word_embeddings", True),
        "init": INIT,
        "entries": (*_ENTRIES, *_EXPERTS[stored]),
    }


def _read_attention(f: Fields, heads: int, head_dim: int) -> dict[str, Any]:
    rope = f.rope()
    if f.choice("attention_type", ("mla", "vanilla")) == "vanilla":
        kv_heads = f.integer("num_key_value_heads", heads)
        return {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": rope}
    sizes = {name: f.integer(name) for name in _MLA_FIELDS[:-1]}
    if heads * head_dim == f.values.get("hidden_size"):
        f.require("v_head_dim", head_dim)  # the released class takes this width whatever the field says
    return {
        "kind": "mla",
        "heads": heads,
        **sizes,
        "v_head_dim": head_dim,
        "rope": rope,
        "kv_up_init_std": KV_UP_INIT_STD,
    }


def _write(model: Any) -> dict[str, Any]:
    attention, ffn = model.attention, model.ffn
    latent = isinstance(attention, MLAConfig)
    values = {
        **auto_map("minicpm", "MiniCPM"),
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": ffn.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads if latent else attention.kv_heads,
        "max_position_embeddings": model.max_seq_len,
        "initializer_range": model.init.scale if model.init.kind == "fixed" else INIT.scale,
        "rms_norm_eps": model.norm.eps,
        "rope_scaling": None,
        "tie_word_embeddings": model.tie_embeddings,
        **write_scales(model),
        "attention_type": "mla" if latent else "vanilla",
        "ffn_type": "block_linear",
        "ffn_gated": True,  # of dense layers, which there are none of
        "expert_gated": False,
        "hidden_act": "silu",
        "router_act": "relu",
        "num_experts": ffn.experts,
        "expert_size": ffn.expert_width,
        "norm_after_router": ffn.norm_after_router,
        "norm_scale": ffn.norm_scale,
        "block_implementation": "torch",
    }
    if latent:
        values |= {name: getattr(attention, name) for name in _MLA_FIELDS}
    if attention.rope is not None and attention.rope.base != RopeConfig().base:
        values["rope_theta"] = attention.rope.base
    return values


def _train(model: DecoderConfig) -> TrainConfig:
    """The recipe of pre-training, for an unknown number of steps."""
    return TrainConfig(
        schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0),
        optimizer=OPTIMIZER,
        groups=groups(1 / model.logit_divisor),
        objectives=objectives(2e-3, 5e-2),
    )


BLOCKFFN = Layout(
    "minicpm",
    "MiniCPMForCausalLM",
    "model.",
    (*_ENTRIES, *_EXPERTS["block_linear"]),
    INV_FREQ,
    _read,
    _write,
    ("mla", "gqa"),
    "blockffn",
    lambda model: model.ffn.kind == "blockffn",
    not_stored=(
        "attention.kv_up_init_std",
        *(
            f"ffn.{name}"
            for name in (
                "router_dtype",
                "auxiliary_losses",
                "locality_steepness",
                "chunk_length",
                "reference_chunk_mean",
                "init_std",
                "expected_density",
                "dense_twin_d_ff",
                "implementation",
            )
        ),
    ),
    arch="blockffn",
    train=_train,
    name="blockffn",
    needs_code=True,
)
