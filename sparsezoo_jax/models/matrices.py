"""The matrices of a decoder's layers, by the names of the maps that they belong to (`weight_maps` of a kind)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from flax import nnx

from sparsezoo_jax.models.contract import Part, SublayerName
from sparsezoo_jax.models.decoder import Decoder
from sparsezoo_jax.models.layers import Block

SUBLAYERS: tuple[SublayerName, ...] = ("attention", "ffn")


class LayerMatrix(NamedTuple):
    """The matrix of one map of one layer, or of all layers that are stacked with it."""

    name: str
    """Name of the map."""
    layers: tuple[int, ...]
    """The layers that it belongs to, in the order of its first axis, counted from 0."""
    param: nnx.Param
    """[layers, inputs, outputs], inputs and outputs with one axis or more each; [inputs, outputs] if not `stacked`."""
    stacked: bool


def find(part: Part, path: str) -> nnx.Param:
    """The parameter of a module at a path of `Part.matrices`."""
    node = part
    for name in path.split("/"):
        node = getattr(node, name)
    return node  # pyright: ignore[reportReturnType]


def block_matrices(block: Block, d_model: int) -> Iterator[tuple[str, SublayerName, str, nnx.Param]]:
    """Map, sublayer, path within the sublayer and matrix, for each map whose matrix the layer's modules name."""
    for sublayer in SUBLAYERS:
        part, kind = getattr(block, sublayer), getattr(block.spec, sublayer)
        for name in kind.weight_maps(d_model):
            if name in part.matrices:
                yield name, sublayer, part.matrices[name], find(part, part.matrices[name])


def layer_matrices(model: Decoder) -> Iterator[LayerMatrix]:
    """The matrices of all layers; those of modules of multi-token prediction are not among them."""
    first = 0
    for segment in model.segments:
        for place, block in enumerate(segment.blocks):
            layers = tuple(range(first + place, first + segment.layers, len(segment.blocks)))
            for name, _, _, param in block_matrices(block, model.config.d_model):
                yield LayerMatrix(name, layers, param, segment.stacked)
        first += segment.layers
