"""GPT-2."""

from __future__ import annotations

from typing import Any

from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.rows import HEAD, Entry, Layout, activation_name, vector
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.untrusted import MAX_LAYERS

_QKV = ("q", "k", "v")
_GPT2 = (
    Entry("transformer.wte.weight", ("embedding_VD",), 1),
    Entry("transformer.wpe.weight", ("positions_PD",), 1),
    vector("transformer.ln_f.weight", "final_norm/scale"),
    vector("transformer.ln_f.bias", "final_norm/bias"),
    HEAD,
    vector("transformer.h.{layer}.ln_1.weight", "attention_residual/pre/scale"),
    vector("transformer.h.{layer}.ln_1.bias", "attention_residual/pre/bias"),
    Entry(
        "transformer.h.{layer}.attn.c_attn.weight",
        tuple(f"attention/projections/{x}" for x in ("q_DNH", "k_DKH", "v_DKH")),
        1,
    ),
    Entry("transformer.h.{layer}.attn.c_attn.bias", tuple(f"attention/projections/{x}_bias" for x in _QKV)),
    Entry("transformer.h.{layer}.attn.c_proj.weight", ("attention/projections/o_NHD",), 2),
    vector("transformer.h.{layer}.attn.c_proj.bias", "attention/projections/o_bias"),
    vector("transformer.h.{layer}.ln_2.weight", "ffn_residual/pre/scale"),
    vector("transformer.h.{layer}.ln_2.bias", "ffn_residual/pre/bias"),
    Entry("transformer.h.{layer}.mlp.c_fc.weight", ("ffn/up_DF",), 1),
    vector("transformer.h.{layer}.mlp.c_fc.bias", "ffn/up_bias"),
    Entry("transformer.h.{layer}.mlp.c_proj.weight", ("ffn/down_FD",), 1),
    vector("transformer.h.{layer}.mlp.c_proj.bias", "ffn/down_bias"),
)


def _read_gpt2(f: Fields) -> dict[str, Any]:
    width, heads = f.integer("n_embd"), f.integer("n_head")
    f.require("scale_attn_weights", True)
    f.require("scale_attn_by_inverse_layer_idx", False)
    f.require("add_cross_attention", False)
    if width % heads:
        f.problems.append(f"n_head={heads}: must divide n_embd={width}")
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": width,
        "layers": f.integer("n_layer", most=MAX_LAYERS),
        "max_seq_len": f.integer("n_positions", f.integer("n_ctx", 1024)),
        "tie_embeddings": f.flag("tie_word_embeddings", True),
        "attention": {"heads": heads, "kv_heads": heads, "head_dim": width // heads, "rope": None, "bias": True},
        "ffn": {
            "d_ff": f.integer("n_inner", 4 * width),
            "activation": f.activation(("activation_function",), "gelu_new"),
            "bias": True,
        },
        "norm": NormConfig(kind="layer", eps=f.number("layer_norm_epsilon", 1e-5), bias=True),
        "learned_positions": True,
    }


def _write_gpt2(model: Any) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.d_model,
        "n_layer": model.layers,
        "n_head": model.attention.heads,
        "n_positions": model.max_seq_len,
        "n_inner": None if model.ffn.d_ff == 4 * model.d_model else model.ffn.d_ff,
        "activation_function": activation_name(model.ffn.activation, "gelu_new"),
        "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


GPT2 = Layout(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.",
    _GPT2,
    r"h\.\d+\.attn\.(bias|masked_bias)",  # causal masks
    _read_gpt2,
    _write_gpt2,
    ("gqa",),
    "plain",
    lambda model: model.learned_positions or model.norm.kind == "layer",
)
