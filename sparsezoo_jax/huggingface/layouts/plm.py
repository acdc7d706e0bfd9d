"""PLM (arXiv 2503.12167): DeepSeek-V2's names, whose rotated columns pair neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.configs.plm import OPTIMIZER
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.llama import read_sizes
from sparsezoo_jax.huggingface.layouts.rows import (
    EMBEDDING_AND_NORMS,
    FFN_NORM,
    INV_FREQ,
    LATENT,
    Entry,
    Layout,
    activation_name,
)
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import WSDC

_ATTENTION, _MLP = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _entries(rotated: int) -> tuple[Entry, ...]:
    return (
        *EMBEDDING_AND_NORMS,
        Entry("model.layers.{layer}.post_attention_layernorm.weight", FFN_NORM),
        Entry(f"{_ATTENTION}.q_proj.weight", ("attention/q_DNH",), 1, True, rotated=rotated),
        Entry(f"{_ATTENTION}.kv_a_proj_with_mqa.weight", ("attention/kv_a_DC",), 1, True, rotated=rotated),
        *LATENT,
        Entry(f"{_MLP}.up_proj.weight", ("ffn/up_DF",), 1, True),
        Entry(f"{_MLP}.down_proj.weight", ("ffn/down_FD",), 1, True),
    )


def _completed(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Without the field, whether there is an output projection tells: the released class's default contradicts it."""
    if values.get("tie_word_embeddings") is not None:
        return dict(values)
    return {**values, "tie_word_embeddings": "lm_head.weight" not in shapes}


def _read(f: Fields) -> dict[str, Any]:
    heads = f.integer("num_attention_heads")
    f.require("num_key_value_heads", heads)
    f.require("q_lora_rank", None)
    f.require("attention_bias", False)
    f.require("mlp_bias", False)
    sizes = {name: f.integer(name) for name in _SIZES}
    rotated = sizes["qk_rope_head_dim"]
    if rotated % 2:
        f.problems.append(f"qk_rope_head_dim={rotated}: must be even")
    return {
        **read_sizes(f, 4096, tied=True),
        "attention": {
            "kind": "mla",
            "heads": heads,
            "q_lora_rank": None,
            **sizes,
            "rope": f.rope(),
        },
        "ffn": {
            "d_ff": f.integer("intermediate_size"),
            "activation": f.activation(("hidden_act",), "relu2"),
        },
        "norm": NormConfig(eps=f.number("rms_norm_eps", 1e-6)),
        "entries": _entries(rotated),
    }


def _write(model: Any) -> dict[str, Any]:
    attention = model.attention
    return {
        # transformers needs the two modules that come with the released checkpoint.
        "auto_map": {
            "AutoConfig": "configuration_plm.PLMConfig",
            "AutoModelForCausalLM": "modeling_plm.PLMForCausalLM",
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.q_lora_rank,
        **{name: getattr(attention, name) for name in _SIZES},
        "hidden_act": activation_name(model.ffn.activation),
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": attention.rope.base,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
    }


PLM = Layout(
    "plm",
    "PLMForCausalLM",
    "model.",
    _entries(0),
    INV_FREQ,
    _read,
    _write,
    ("mla",),
    "plain",
    lambda model: model.ffn.kind == "plain" and model.attention.kind == "mla",
    not_stored=("attention.kv_up_init_std",),
    arch="plm",
    train=lambda model: TrainConfig(
        schedule=WSDC(learning_rate=3e-4, stable_steps=0.7, decay_steps=0.2), optimizer=OPTIMIZER
    ),
    completed=_completed,
    needs_code=True,
)
