"""SparseLM (arXiv 2603.23198): Llama's names, with a ReLU that its `hidden_act` does not mention."""

from __future__ import annotations

from typing import Any

from sparsezoo_jax.configs.sparselm import l1
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.llama import COMMON, read_sizes, write_sizes
from sparsezoo_jax.huggingface.layouts.rows import FFN_NORM, INV_FREQ, Entry, Layout
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import TrainConfig

_MLP = "model.layers.{layer}.mlp."
_NORM = Entry("model.layers.{layer}.post_attention_layernorm.weight", FFN_NORM)
_OTHERS = tuple(entry for entry in COMMON if not entry.name.startswith(_MLP))


def _mlp(gate: Entry, up: Entry, down: Entry) -> tuple[Entry, ...]:
    return *_OTHERS, _NORM, *(entry._replace(name=_MLP + entry.name) for entry in (gate, up, down))


def _variants(gated: bool) -> tuple[tuple[Entry, ...], ...]:
    """How the authors' sparse classes name the matrices that they hold for their kernels."""
    return (
        _mlp(
            Entry("gate_weight", ("ffn/gate_DF",), 1),
            Entry("up_weight", ("ffn/up_DF",), 1, transposed=gated),
            Entry("down_weight", ("ffn/down_FD",), 1),
        ),
        _mlp(
            Entry("GATE", ("ffn/gate_DF",), 1, transposed=True),
            Entry("UP", ("ffn/up_DF",), 1, transposed=True),
            Entry("DOWN", ("ffn/down_FD",), 1),
        ),
    )


def _read(f: Fields) -> dict[str, Any]:
    heads, gated = f.integer("num_attention_heads"), f.flag("sparsity_gated_mlp", True)
    f.require("mlp_bias", False)
    f.require("rope_interleaved", False)
    return {
        **read_sizes(f, 2048, tied=True),
        "attention": {
            "heads": heads,
            "kv_heads": f.integer("num_key_value_heads", heads),
            "head_dim": f.integer("head_dim", f.integer("hidden_size", 1) // heads),
            "rope": f.rope(),
            "bias": f.flag("attention_bias", False),
        },
        # `hidden_act` says "silu" in the released files and is not read by the authors' class either.
        "ffn": {
            "d_ff": f.integer("sparsity_new_intermediate_size", f.integer("intermediate_size")),
            "gated": gated,
        },
        "norm": NormConfig(eps=f.number("rms_norm_eps", 1e-6)),
        "variants": _variants(gated),
    }


def _write(model: Any) -> dict[str, Any]:
    return {
        **write_sizes(model),
        "hidden_act": "relu",
        "mlp_bias": False,
        "is_llama_config": True,
        "rope_interleaved": False,
        "sparsity_gated_mlp": model.ffn.gated,
        "sparsity_max_seq_len": model.max_seq_len,
    }


SPARSELM = Layout(
    "llama_sparse_relu",
    "SparseLlamaForCausalLM",
    "model.",
    (*COMMON, _NORM),
    rf"{INV_FREQ}|(tracker|metrics_accumulator)\..*",
    _read,
    _write,
    ("gqa",),
    "sparselm",
    lambda model: model.ffn.kind == "sparselm" and isinstance(model.residual, PreNormConfig),
    not_stored=tuple(
        f"ffn.{name}"
        for name in ("revival", "revival_std", "dead_after", "stored_neurons", "stored_tokens", "implementation")
    ),
    arch="sparselm",
    train=lambda model: TrainConfig(objectives=(l1(),)),
    needs_code=True,
)
