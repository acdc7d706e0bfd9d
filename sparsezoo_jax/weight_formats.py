"""Flags that choose the number formats of a packed model's weights, shared by commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparsezoo_jax.inference import Formats

Format = Literal["model", "float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class WeightFormats:
    """Number formats of `inference.packed`."""

    weights: Format = "model"
    """Number format of the weights; model is that of the run's activations. int8 rounds them."""
    predictor: Format | None = None
    """Number format of Spark FFNs' predictors; none is that of --weights."""
    head: Format | None = None
    """Number format of the output projection; none is that of --weights."""

    @property
    def formats(self) -> Formats:
        """What `inference.packed` takes."""
        from sparsezoo_jax.inference import Formats

        return Formats(self.weights, self.predictor, self.head)

    @property
    def chosen(self) -> bool:
        """Whether any format was asked for."""
        return self.weights != "model" or self.predictor is not None or self.head is not None
