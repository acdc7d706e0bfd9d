"""Activation flow: how a layer's hidden states spread over the dimensions of the stream, and for how long they stay.

A token's magnitude shares are `|x_j| / sum_k |x_k|`; its active dimensions are the fewest that hold half of it.
Measured are the residual stream after each layer and the normalised inputs of attention and feed-forward network, as
these read them, of any decoder. Sums are made on the device (`flow_sums`), figures from them on the host (`figures`).

Source: MoHD (arXiv 2412.05644), its observation of activation flow; thresholds and the length of runs are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.models.chunks import has_predecessor
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.records import RESIDUAL, SUBLAYER_INPUT

NAMES = (RESIDUAL, SUBLAYER_INPUT)
"""The records that `flow_sums` reads."""

STREAMS = ("residual", "attention_input", "ffn_input")
TOKENS = 1024
"""Tokens of a batch that are read, whole sequences but at least one: shares are sorted, and runs need neighbours."""
SHARED, SPECIALISED = 0.9, (0.01, 0.5)
"""Shares of tokens from which on a dimension is shared, and between which it is specialised."""


@dataclasses.dataclass(frozen=True)
class StreamFlow:
    """Activation flow of one layer through one of `STREAMS`."""

    width: int
    flow: float
    """`sum_j |x_j|`, mean over tokens (F_l)."""
    dims_50: float
    """Fewest dimensions that hold 50 % of a token's magnitude, mean over tokens; these are its active dimensions."""
    dims_90: float
    """The same for 90 %."""
    shared: int
    """Dimensions that are active for at least 90 % of the tokens."""
    specialised: int
    """Dimensions that are active for 1 % to 50 % of the tokens."""
    run_length: float
    """Consecutive tokens of a document for which an active dimension stays active, mean over all such runs."""
    jaccard: float | None
    """Overlap of the active dimensions of neighbouring tokens, mean; None without neighbours."""


def flow_sums(records: Mapping[str, jax.Array], ctx: CallContext) -> dict[str, jax.Array]:
    """Sums over the tokens read of one layer's records, which batches add up; records that are absent are left out."""
    arrays: dict[str, jax.Array] = {}
    if RESIDUAL in records:
        arrays["residual"] = records[RESIDUAL]
    if SUBLAYER_INPUT in records:
        arrays["attention_input"], arrays["ffn_input"] = records[SUBLAYER_INPUT]
    return {f"flow_{stream}_{name}": value for stream, x in arrays.items() for name, value in _sums(x, ctx).items()}


def _sums(x_BTD: jax.Array, ctx: CallContext) -> dict[str, jax.Array]:
    sequences = max(TOKENS // x_BTD.shape[1], 1)
    x_BTD = jnp.abs(x_BTD[:sequences].astype(jnp.float32))
    valid_BT, pairs_BT = ctx.valid_BT[:sequences], has_predecessor(ctx)[:sequences]
    flow_BT = jnp.sum(x_BTD, axis=-1)
    share_BTD = x_BTD / jnp.maximum(flow_BT, jnp.finfo(jnp.float32).tiny)[..., None]
    sorted_BTD = -jnp.sort(-share_BTD, axis=-1)
    held_BTD = jnp.cumsum(sorted_BTD, axis=-1)
    half_BT, most_BT = (1 + jnp.sum(held_BTD < p, axis=-1) for p in (0.5, 0.9))
    half_BT, most_BT = (jnp.minimum(count, x_BTD.shape[-1]) for count in (half_BT, most_BT))
    least_BT1 = jnp.take_along_axis(sorted_BTD, half_BT[..., None] - 1, axis=-1)
    active_BTD = (share_BTD >= least_BT1) & valid_BT[..., None]
    before_BTD = jnp.pad(active_BTD[:, :-1], ((0, 0), (1, 0), (0, 0))) & pairs_BT[..., None]
    stays_BT = jnp.sum(active_BTD & before_BTD, axis=-1)
    either_BT = jnp.sum(active_BTD | before_BTD, axis=-1)

    def total(x_BT: jax.Array, where: jax.Array = valid_BT) -> jax.Array:
        return jnp.sum(jnp.where(where, x_BT, 0), dtype=jnp.float32)

    return {
        "tokens": total(jnp.ones_like(flow_BT)),
        "magnitude": total(flow_BT),
        "dims_50": total(half_BT),
        "dims_90": total(most_BT),
        "active_by_dim": jnp.sum(active_BTD, axis=(0, 1), dtype=jnp.int32),
        "run_starts": jnp.sum(active_BTD & ~before_BTD, dtype=jnp.int32),
        "pairs": total(jnp.ones_like(flow_BT), pairs_BT),
        "jaccard": total(stays_BT / jnp.maximum(either_BT, 1), pairs_BT),
    }


def figures(total: Mapping[str, np.ndarray]) -> dict[str, StreamFlow]:
    """The flow through each of `STREAMS` that the summed batches have."""
    return {stream: _figures(total, f"flow_{stream}_") for stream in STREAMS if f"flow_{stream}_tokens" in total}


def _figures(total: Mapping[str, np.ndarray], prefix: str) -> StreamFlow:
    tokens, by_dim = float(total[f"{prefix}tokens"]), total[f"{prefix}active_by_dim"]
    pairs, often = float(total[f"{prefix}pairs"]), by_dim / max(tokens, 1)

    def mean(name: str) -> float:
        return float(total[f"{prefix}{name}"]) / max(tokens, 1)

    return StreamFlow(
        width=len(by_dim),
        flow=mean("magnitude"),
        dims_50=mean("dims_50"),
        dims_90=mean("dims_90"),
        shared=int(np.sum(often >= SHARED)),
        specialised=int(np.sum((often >= SPECIALISED[0]) & (often <= SPECIALISED[1]))),
        run_length=float(by_dim.sum() / max(total[f"{prefix}run_starts"], 1)),
        jaccard=float(total[f"{prefix}jaccard"]) / pairs if pairs else None,
    )
