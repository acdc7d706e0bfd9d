"""FLOPs and bytes per token of a decoder at several context lengths: its dense twin's, as configured, as measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sparsezoo_jax.errors import require
from sparsezoo_jax.models import (
    DecoderConfig,
    Sparsity,
    activated_parameters,
    bytes_per_token,
    count_parameters,
    dense_twin,
    flops_per_token,
)

CONTEXTS = (512, 2048, 8192)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one token at one context length, output projection not counted."""

    context: int
    """Tokens of the sequence."""
    variant: str
    """"dense" (twin of equal parameters), "configured" (the sparsity aimed at) or "measured"."""
    flops_mean: float
    """FLOPs, mean over the positions of the context."""
    flops_last: float
    """FLOPs of the token that sees the whole context."""
    bytes_last: float
    """Bytes of weights and key/value cache that decoding that token reads at batch size 1."""


def contexts(config: DecoderConfig) -> tuple[int, ...]:
    """Context lengths at which the cost of a model is of interest: of images the patches that are seen at once."""
    return CONTEXTS if config.images.patch is None else (config.images.visible,)


def cost_table(
    config: DecoderConfig, contexts: Sequence[int] = CONTEXTS, measured: Sparsity | None = None
) -> list[Cost]:
    """The costs of a decoder at each of `contexts`, which may be longer than the model was trained for.

    The "dense" rows are left out where there is no dense form of equal parameters or the decoder is it, the "measured"
    rows without `measured`. Measured attention takes the keys attended by queries beyond the target for the target.

    Raises:
      ConfigError: a context below 1.
    """
    variants: dict[str, tuple[DecoderConfig, Sparsity | None]] = {"configured": (config, None)}
    twin = dense_twin(config)
    if twin is not None and twin != config:
        variants = {"dense": (twin, None), **variants}
    if measured is not None:
        variants["measured"] = (config, measured)
    costs = []
    for context in contexts:
        require(context > 0, "--contexts", context, "must be above 0")
        for variant, (decoder, sparsity) in variants.items():
            mean = flops_per_token(decoder, context, position="mean", sparsity=sparsity)
            last = flops_per_token(decoder, context, position="last", sparsity=sparsity)
            costs.append(Cost(context, variant, mean, last, bytes_per_token(decoder, context, sparsity=sparsity)))
    return costs


def as_rows(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """The costs as dictionaries, for JSON."""
    return [dataclasses.asdict(cost) for cost in costs]


def parameter_counts(config: DecoderConfig, measured: Sparsity) -> dict[str, int | float]:
    """Parameters in all, without embeddings, and those that one token needs: as configured and as measured."""
    count, aim, found = count_parameters(config), activated_parameters(config), activated_parameters(config, measured)
    return {
        "total": count.total,
        "non_embedding": count.non_embedding,
        "activated_layers": aim.layers,
        "activated_layers_measured": found.layers,
        "activated_head": aim.head,
    }
