"""MiniCPM (arXiv 2404.06395) and MiniCPM-S: Llama's tensors; embeddings, sublayers and logits are scaled."""

from __future__ import annotations

import math
from typing import Any

from sparsezoo_jax.configs.minicpm import INIT, OPTIMIZER, groups
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.llama import LLAMA, Relative, read_llama, write_llama
from sparsezoo_jax.huggingface.layouts.rows import INV_FREQ, Layout, auto_map
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import WSD

_MINICPM = Relative(biases=("attention_bias",), fatrelu=True, tied=True)
#: Fields of BlockFFN, whose model type is the same.
_OF_BLOCKFFN = {"ffn_type", "expert_size", "router_act"}


def read_scales(f: Fields, width: int, layers: int) -> dict[str, Any]:
    """The decoder's fields for `scale_emb`, `scale_depth` and `dim_model_base`, which are 1 in the released class."""
    return {
        "residual": PreNormConfig(scale=f.number("scale_depth", 1.0) / math.sqrt(layers)),
        "embedding_scale": f.number("scale_emb", 1.0),
        "logit_divisor": width / f.number("dim_model_base", 1.0),
    }


def write_scales(model: Any) -> dict[str, Any]:
    scale = model.d_model**0.5 if model.embedding_scale == "sqrt_d_model" else model.embedding_scale
    return {
        "scale_emb": _plain(scale),
        "scale_depth": _plain(model.residual.scale * math.sqrt(model.layers)),
        "dim_model_base": _plain(model.d_model / model.logit_divisor),
    }


def _plain(value: float) -> float:
    """Without what multiplying there and back leaves in the last digits; whole numbers as integers."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _read(f: Fields) -> dict[str, Any]:
    found = read_llama(f, _MINICPM)
    # Mixtures and sparse attention come under the same model type.
    f.require("num_experts", 0)
    f.require("sparse_config", None)
    return {**found, **read_scales(f, found["d_model"], found["layers"]), "init": INIT}


def _write(model: Any) -> dict[str, Any]:
    return {**auto_map("minicpm", "MiniCPM"), **write_llama(model, _MINICPM), **write_scales(model)}


def _is_scaled(model: DecoderConfig) -> bool:
    residual = model.residual
    if not isinstance(residual, PreNormConfig) or residual.post_norm:
        return False
    return (residual.scale, model.embedding_scale, model.logit_divisor) != (1.0, 1.0, 1.0)


def _train(model: DecoderConfig) -> TrainConfig:
    """The recipe of pre-training, for an unknown number of steps."""
    schedule = WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0)
    return TrainConfig(schedule=schedule, optimizer=OPTIMIZER, groups=groups(1 / model.logit_divisor))


MINICPM = Layout(
    "minicpm",
    "MiniCPMForCausalLM",
    "model.",
    LLAMA.entries,
    INV_FREQ,
    _read,
    _write,
    ("gqa",),
    "gated",
    _is_scaled,
    train=_train,
    recognises=lambda values: values.get("model_type") == "minicpm" and not _OF_BLOCKFFN & values.keys(),
    needs_code=True,
)
