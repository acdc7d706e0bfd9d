"""Layouts of layers for decoding: which module takes a trained one's place, registered for each class of modules."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.inference.matrices import WeightFormat

FORMATS = ("model", "float32", "bfloat16", "int8")


class Formats(NamedTuple):
    """Number formats of the weights; "model" is the activations' dtype, None is that of `weights`."""

    weights: WeightFormat = "model"
    predictor: WeightFormat | None = None
    """Of the predictors of Spark FFNs, all of which are read for every token."""
    head: WeightFormat | None = None
    """Of the output projection."""

    def check(self) -> None:
        """Raise `ConfigError` for an unknown format."""
        for name, form in self._asdict().items():
            require(form is None or form in FORMATS, f"--{name}", form, f"must be one of {', '.join(FORMATS)}")


class DecodingLayout(abc.ABC):
    """What a layer that is laid out for decoding offers beside its call, which is the trained layer's."""

    @abc.abstractmethod
    def restore(self, source: Any) -> None:
        """Put the weights back into `source`, a trained layer of the same configuration."""

    @abc.abstractmethod
    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the neurons (or experts) active."""

    def bytes_of(self, stats: Mapping[str, float]) -> float:
        """Bytes of weights that a token with these statistics of the layer read. Default: by its `ffn_density`."""
        return self.bytes_read(stats["ffn_density"])


Layer = TypeVar("Layer", bound=nnx.Module)
Pack = Callable[[Any, Formats, float | None], nnx.Module | None]
_LAYOUTS: dict[type[nnx.Module], Pack] = {}


def packs(layer: type[Layer]) -> Callable[[Pack], Pack]:
    """Decorator: registers the layout of modules of exactly this class, attention or feed-forward network.

    The function is called with the module, the number formats, and the share of the residual stream's width that its
    maps compute (None: all of it). It returns a `DecodingLayout` that shares no array with the module, or None for one
    that it can't lay out: that layer decodes as it was trained, and `packed` says so.
    """

    def register(pack: Pack) -> Pack:
        _LAYOUTS[layer] = pack
        return pack

    return register


def laid_out(source: nnx.Module, formats: Formats, active: float | None) -> nnx.Module | None:
    """The layout of `source`; None where its class has none, or none for its configuration."""
    pack = _LAYOUTS.get(type(source))
    return None if pack is None else pack(source, formats, active)
