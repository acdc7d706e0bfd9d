"""Models with masks on their maps' inputs, made of trained ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.models import AttentionKind, Decoder, DecoderConfig, FFNKind
from sparsezoo_jax.models.contract import SublayerName
from sparsezoo_jax.models.masks import STREAM_MAPS, ActivationSparsity, Masks
from sparsezoo_jax.models.sparsified import SparsifiedAttentionConfig, SparsifiedFFNConfig
from sparsezoo_jax.sparsification.methods import without_absent
from sparsezoo_jax.sparsification.placement import placed
from sparsezoo_jax.training.state import ModelTemplate, flatten, nested

_ATTENTION = ("q", "q_up", "k", "v", "o")
_LAYER = re.compile(r"/(attention|ffn)/")


def is_sparsified(config: DecoderConfig) -> bool:
    """Whether layers of a decoder leave out channels already."""
    kinds = (config.attention, config.ffn, config.first_ffn)
    return any(isinstance(kind, SparsifiedAttentionConfig | SparsifiedFFNConfig) for kind in kinds)


def check_stream(config: DecoderConfig) -> None:
    """Raise `ConfigError` unless each layer reads nothing but the one stream that the layer below it leaves."""
    for field, value, plain in (
        ("altup.streams", config.altup.streams, 1),
        ("per_layer.width", config.per_layer.width, None),
        ("kv_shared_layers", config.kv_shared_layers, 0),
    ):
        allowed = f"must be {plain}: layers are worked on one after another, by the stream between them alone"
        require(value == plain, f"model.{field}", value, allowed)
    allowed = "has one router for all layers: they are not worked on one after another"
    require(config.ffn.pre_gate(config) is None, "model.ffn.kind", config.ffn.kind, allowed)


def check_layers(config: DecoderConfig) -> None:
    """Raise `ConfigError` unless all layers have like FFNs, over the whole stream, and nothing else has one."""
    require(config.first_ffn is None, "model.first_layers", config.first_layers, "must be 0: layers have unlike FFNs")
    allowed = "must be 0: modules of multi-token prediction have neurons of their own"
    require(config.mtp_layers == 0, "model.mtp_layers", config.mtp_layers, allowed)
    check_stream(config)
    width = config.residual.active_width(config.d_model, "ffn")
    allowed = "has a residual stream whose width is routed; its neurons can't be moved"
    require(width == config.d_model, "model.residual.kind", config.residual.kind, allowed)


def maps_taken(
    config: DecoderConfig, maps: tuple[str, ...], *, exact: bool = False, weights: bool = False
) -> dict[str, tuple[str, ...]]:
    """Which of the maps the kinds of a decoder have, by the field of its configuration: attention, ffn, first_ffn.

    Args:
      config: a decoder.
      maps: where some of them are of attention (or of feed-forward networks), layers of every kind must have one of
        these, in all layers.
      exact: every one of the maps must be there; otherwise those that a layer does not have are passed over.
      weights: take also maps whose channels can't be left out, but whose weights can be pruned.

    Raises:
      UserError: the decoder is sparsified already.
      ConfigError: a kind that has none of the maps, or whose residual stream has a routed width; `check_stream`.
    """
    if is_sparsified(config):
        raise UserError("the decoder is sparsified already; take the one that it was made of")
    check_stream(config)
    for_attention, for_ffn = (
        tuple(name for name in maps if (name in _ATTENTION) == attention) for attention in (True, False)
    )
    found: dict[str, tuple[str, ...]] = {}
    for field, wanted in (("attention", for_attention), ("ffn", for_ffn), ("first_ffn", for_ffn)):
        kind = getattr(config, field)
        if not wanted or kind is None:
            continue
        there, listed = (
            kind.weight_maps(config.d_model) if weights else kind.linear_maps(config.d_model),
            ",".join(wanted),
        )
        missing = [name for name in wanted if name not in there]
        has = f"has the maps {', '.join(there)}" if there else "has no maps whose channels could be left out"
        allowed = f"{has}; {listed} can't be sparsified"
        bad = missing if exact else missing == list(wanted)
        require(not bad, f"model.{field}.kind", kind.kind, allowed)
        found[field] = tuple(name for name in wanted if name in there)
    sublayers: tuple[SublayerName, ...] = ("attention", "ffn")
    for sublayer in sublayers:
        width = config.residual.active_width(config.d_model, sublayer)
        allowed = "has a residual stream whose width is routed; its channels can't be left out"
        whole = sublayer not in found or width == config.d_model
        require(whole, "model.residual.kind", config.residual.kind, allowed)
    return found


def check_no_experts(config: DecoderConfig, taken: Mapping[str, tuple[str, ...]], what: str) -> None:
    """Raise `ConfigError` where maps of experts are among those of a decoder that are taken (`maps_taken`).

    `what`: what can't be done with these, with the flag that asks for it.
    """
    for field, names in taken.items():
        kind = getattr(config, field)
        experts = [name for name in names if field != "attention" and name in kind.expert_maps]
        allowed = f"{what}: each of its experts has own matrices of {', '.join(experts)}; name other maps with --maps"
        require(not experts, f"model.{field}.kind", kind.kind, allowed)


def sparsified_config(config: DecoderConfig, sparsity: ActivationSparsity, *, exact: bool = False) -> DecoderConfig:
    """The decoder whose layers leave out channels by `sparsity`; errors and `exact` as in `maps_taken`."""
    changes: dict[str, AttentionKind | FFNKind] = {}
    taken = maps_taken(config, sparsity.maps, exact=exact)
    if sparsity.rotate:
        check_no_experts(config, taken, "can't be rotated (--rotate), for a basis is that of one matrix")
    for field, names in taken.items():
        if sparsity.rotate:
            there = getattr(config, field).linear_maps(config.d_model)
            parts = [name for name in names if name in STREAM_MAPS and there[name].channels != config.d_model]
            allowed = f"can't be rotated (--rotate): its maps {', '.join(parts)} read a part of the stream each"
            require(not parts, f"model.{field}.kind", getattr(config, field).kind, allowed)
        wrapper = SparsifiedAttentionConfig if field == "attention" else SparsifiedFFNConfig
        changes[field] = wrapper(of=getattr(config, field), sparsity=without_absent(sparsity, names))
    return dataclasses.replace(config, **changes)


def wrapped(model: Decoder, target: DecoderConfig) -> Decoder:
    """The decoder of `target`, made by `sparsified_config`, with the weights of `model`.

    Its cuts are all 0, and so are its low-rank maps; its rotations are identities.
    """
    source, template = (ModelTemplate(lambda rngs, c=c: Decoder(c, rngs=rngs)) for c in (model.config, target))
    params, variables = source.split(model)
    inner = {"attention": isinstance(target.attention, SparsifiedAttentionConfig)}
    inner["ffn"] = isinstance(target.ffn, SparsifiedFFNConfig)

    def moved(tree: Any) -> dict[str, Any]:
        def path(name: str) -> str:
            return _LAYER.sub(lambda found: found[0] + "inner/" * inner[found[1]], name, count=1)

        return {path(name): x for name, x in flatten(tree).items()}

    made = {
        name: jnp.zeros(parameter.shape, jnp.dtype(target.param_dtype))
        for name, parameter in template.parameters.items()
        if "/bypass/" in name
    }
    made |= {
        name: jnp.broadcast_to(jnp.eye(target.d_model, dtype=jnp.dtype(target.param_dtype)), parameter.shape)
        for name, parameter in template.parameters.items()
        if name.endswith("/rotation_DD")
    }
    cuts = {
        name: np.zeros(variable.shape, np.float32)
        for name, variable in template.variables.items()
        if name.endswith("/masks/cut_P")
    }
    return placed(template.merge(nested({**moved(params), **made}), nested({**moved(variables), **cuts})))


def with_cuts(model: Decoder, cuts: Mapping[str, np.ndarray]) -> None:
    """Set the cuts of a sparsified model, for each map one a layer, [L]; those of layers without the map don't count.

    Modules of multi-token prediction, which only training uses, keep theirs.
    """
    first = 0
    for segment in model.segments:
        for place, block in enumerate(segment.blocks):
            layers = np.arange(first + place, first + segment.layers, len(segment.blocks))
            for part in (block.attention, block.ffn):
                masks = getattr(part, "masks", None)
                if isinstance(masks, Masks):
                    values = np.stack([cuts[name][layers] for name in masks.names], axis=-1)
                    masks.cut_P[...] = jnp.asarray(values if segment.stacked else values[0], jnp.float32)
        first += segment.layers
