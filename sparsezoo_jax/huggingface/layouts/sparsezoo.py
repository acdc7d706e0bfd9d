"""Models that transformers has no class for: the decoder's own parts and names, for the code in `remote/`."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.rows import HEAD, Entry, Layout, linear, vector
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.overrides import as_python, faults
from sparsezoo_jax.untrusted import MAX_LAYERS

MODEL_TYPE = "sparsezoo"
_LAYER = "model.layers.{layer}"
_MODEL = TypeAdapter(DecoderConfig)
#: Our fields by transformers' names of the sizes.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "layers",
    "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_embeddings",
}
#: Fields that have one name in both.
_PARTS = (
    *("attention", "ffn", "first_layers", "first_ffn", "residual", "norm", "adapter", "layer_pattern"),
    *("embedding_scale", "learned_positions", "logit_divisor", "final_softcap"),
)


def _norm(name: str, path: str) -> tuple[Entry, Entry]:
    return vector(f"{name}.weight", f"{path}/scale"), vector(f"{name}.bias", f"{path}/bias")


def _router(name: str, path: str) -> tuple[Entry, Entry]:
    """Of MoHD's blocks."""
    return Entry(f"{name}.centroids.weight", (f"{path}/centroids_DN",), 1, True), vector(
        f"{name}.bias", f"{path}/bias_E"
    )


def _whole(name: str, path: str) -> Entry:
    return Entry(f"{_LAYER}.{name}", (path,), whole=True)


def _of_residual(part: str) -> tuple[Entry, ...]:
    """The residual connection around a sublayer, and the adapter after it."""
    name, path = f"{part}_residual", f"{part}_residual"
    return (
        *_norm(f"{_LAYER}.{name}.norm", f"{path}/pre"),
        *_norm(f"{_LAYER}.{name}.post_norm", f"{path}/post"),
        *_router(f"{_LAYER}.{name}.router", f"{path}/router"),
        *_router(f"{_LAYER}.{name}.output_router", f"{path}/output_router"),
        _whole(f"{name}.fusion.within", f"{path}/fusion/within_PQQ"),
        _whole(f"{name}.fusion.across", f"{path}/fusion/across_QPP"),
        *linear(f"{_LAYER}.{part}_adapter.down", f"{part}_adapter/down_DR"),
        *linear(f"{_LAYER}.{part}_adapter.up", f"{part}_adapter/up_RD"),
    )


def _maps(part: str, *rows: tuple[str, str]) -> tuple[Entry, ...]:
    """Linear maps of a sublayer; of ours the last axis is the output, but heads' last two are."""
    entries = (linear(f"{_LAYER}.{part}.{name}", f"{part}/{path}", 2 if "_NHD" in path else 1) for name, path in rows)
    return tuple(entry for pair in entries for entry in pair)


_ENTRIES = (
    Entry("model.embed_tokens.weight", ("embedding_VD",), 1),
    Entry("model.embed_positions.weight", ("positions_PD",), 1),
    *_norm("model.norm", "final_norm"),
    *_router("model.head.router", "head/router"),
    HEAD,
    *_of_residual("attention"),
    *_of_residual("ffn"),
    *_maps(
        "attention",
        *((f"{name}_proj", f"projections/{name}_{axes}") for name, axes in (("q", "DNH"), ("k", "DKH"), ("v", "DKH"))),
        ("o_proj", "projections/o_NHD"),
        ("q_proj", "q_DNH"),
        ("q_a_proj", "q_a_DR"),
        ("q_b_proj", "q_b_RNH"),
        ("kv_a_proj", "kv_a_DC"),
        ("kv_b_proj", "kv_b_CNH"),
        ("o_proj", "o_NHD"),
    ),
    *(
        entry
        for name, path in (("q", "projections/q"), ("k", "projections/k"), ("q_a", "q_a"), ("kv_a", "kv_a"))
        for entry in _norm(f"{_LAYER}.attention.{name}_norm", f"attention/{path}_norm")
    ),
    *_maps(
        "ffn",
        *(("gate_proj", "gate_DF"), ("up_proj", "up_DF"), ("down_proj", "down_FD")),
        *(("k1", "k1_RF"), ("k2", "k2_DF"), ("v", "v_FD")),
        ("router", "router_DE"),
        *(("shared_gate_proj", "shared_gate_DF"), ("shared_up_proj", "shared_up_DF")),
        ("shared_down_proj", "shared_down_FD"),
        *(("shared_gate_proj", "shared/gate_DF"), ("shared_up_proj", "shared/up_DF")),
        ("shared_down_proj", "shared/down_FD"),
        *(("expert_up_proj", "expert_up_DF"), ("expert_down_proj", "expert_down_FD")),
    ),
    *(_whole(f"ffn.{name}", f"ffn/{name}_{axes}") for name, axes in (("gate", "EDW"), ("up", "EDW"), ("down", "EWD"))),
    vector(f"{_LAYER}.ffn.input_step", "ffn/input_step"),
    vector(f"{_LAYER}.ffn.hidden_step", "ffn/hidden_step"),
    vector(f"{_LAYER}.ffn.router_bias", "ffn/bias_E"),
    vector(f"{_LAYER}.ffn.router_scale", "ffn/router_norm/scale"),
    vector(f"{_LAYER}.ffn.router_scale", "ffn/router_scale_E"),
    vector(f"{_LAYER}.ffn.expert_norm_scale", "ffn/norm_scale_W"),
)


def _read(f: Fields) -> dict[str, Any]:
    """The decoder's fields; what is wrong with them is found by making the decoder's configuration of them."""
    f.integer("num_hidden_layers", most=MAX_LAYERS)
    values = {ours: f.values.get(theirs) for theirs, ours in _SIZES.items() if theirs in f.values}
    values |= {name: f.values[name] for name in _PARTS if name in f.values}
    arch = f.values.get("arch", "dense")
    if not isinstance(arch, str):
        f.problems.append(f"arch={arch}: must be the name of an architecture")
    try:
        model = _MODEL.validate_python(as_python(values))
    except ValidationError as error:
        f.problems.append(faults(error))
    except UserError as error:
        f.problems.append(str(error))
    else:
        found = {name: getattr(model, name) for name in (*_SIZES.values(), *_PARTS)}
        return {**found, "attention": as_python(values["attention"]), "ffn": as_python(values["ffn"]), "arch": arch}
    return {}


def _write(model: Any) -> dict[str, Any]:
    values = _MODEL.dump_python(model, mode="json")
    attention = values["attention"]
    if "warmup_steps" in values["residual"]:
        values["residual"]["warmup_steps"] = 0  # it is over, and a new run counts its steps from 0
    return {
        "auto_map": {
            "AutoConfig": "configuration_sparsezoo.SparseZooConfig",
            "AutoModel": "modeling_sparsezoo.SparseZooModel",
            "AutoModelForCausalLM": "modeling_sparsezoo.SparseZooForCausalLM",
        },
        **{theirs: values[ours] for theirs, ours in _SIZES.items()},
        "num_attention_heads": model.attention.heads,
        "num_key_value_heads": attention.get("kv_heads", model.attention.heads),
        **{name: values[name] for name in _PARTS},
    }


SPARSEZOO = Layout(
    MODEL_TYPE,
    "SparseZooForCausalLM",
    "model.",
    _ENTRIES,
    r"(?!)",
    _read,
    _write,
    ("gqa",),  # these two where a checkpoint names no kind: it may be any
    "gated",
    lambda model: False,
    # A finished warm-up of routed widths is no part of what a model computes, nor are layers that only training uses.
    not_stored=("residual.warmup_steps", "mtp_layers"),
    needs_code=True,
)
