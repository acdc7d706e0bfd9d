"""What a model's maps read, over some text: histograms of the scores of their channels, and norms of the channels.

Scores are counted by the upper bits of their float32 form. So the bins are the same for all models: a hundredth of a
score is known as well as a hundred of it, no first pass has to find where scores lie, and no outlier widens the bins of
the others (CATS counts in 20,000 equal bins from -2 to 2, which large activations leave).
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import DataError
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.config import LayerSpec
from sparsezoo_jax.models.decoder import call_context
from sparsezoo_jax.models.layers import Block, Passed
from sparsezoo_jax.models.records import MAPS, input_of, scores_of
from sparsezoo_jax.models.sparsified import SparsifiedFFN
from sparsezoo_jax.models.width import WholeWidth
from sparsezoo_jax.sparsification.layers import Place, layer_by_layer
from sparsezoo_jax.sparsification.methods import Quantile
from sparsezoo_jax.sparsification.progress import Arrays, Stage
from sparsezoo_jax.storage import write_atomic

_BITS = 9
"""Bits of the significand that tell bins apart: 512 bins an octave, 0.2 % wide or less."""
_SHIFT = 23 - _BITS
_FIRST = (127 - 32) << _BITS
BINS = 48 << _BITS
"""From 2^-32 to 2^16. The first and the last bin have also what is beyond."""
EDGES = ((_FIRST + np.arange(BINS + 1)) << _SHIFT).astype(np.int32).view(np.float32).astype(np.float64)
EDGES[0] = 0.0
CATS_EDGES = np.linspace(-2, 2, 19_998)
"""Those of the histogram of the authors' code of CATS, but for the infinite ones."""


@dataclasses.dataclass(frozen=True)
class MapStatistics:
    """What one map of all layers that have it read."""

    layers: tuple[int, ...]
    """The layers that have it, counted from 0."""
    counts: np.ndarray
    """int64 [layers, 2, BINS]: scores by bin, of channels that are not negative and of negative ones."""
    squares: np.ndarray
    """float64 [layers, I]: sum of the squares of each channel; 0 beyond the channels of a layer that has fewer."""
    magnitudes: np.ndarray
    """float64 [layers, I]: sum of the magnitudes of each channel, likewise."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The statistics of all maps, over so many tokens."""

    tokens: int
    layers: int
    """Layers of the model."""
    maps: dict[str, MapStatistics]

    def save(self, path: Path) -> None:
        """Write as NumPy's .npz: "tokens", "model_layers", and for each map "q/counts", "q/layers" and so on.

        Raises:
          StorageError: it can't be written.
        """
        arrays = {f"{name}/{field}": value for name, map in self.maps.items() for field, value in vars(map).items()}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, tokens=self.tokens, model_layers=self.layers, **arrays)
        write_atomic(path, content.getvalue())


def bin_of(score: jax.Array) -> jax.Array:
    """The bin of scores, float32 and at least 0: int32 of the same shape."""
    upper = jax.lax.bitcast_convert_type(score, jnp.int32) >> _SHIFT
    return jnp.clip(upper - _FIRST, 0, BINS - 1)


def _statistics(
    dense_tokens: int, records: dict[str, jax.Array], spec: LayerSpec, ctx: CallContext
) -> dict[str, jax.Array]:
    """Those of a layer and a batch, by name of map and statistic."""
    counted_BT = ctx.valid_BT & (ctx.positions_BT >= dense_tokens)
    found: dict[str, jax.Array] = {"tokens": jnp.sum(counted_BT)}
    for name in MAPS:
        if input_of(name) in records:
            of_map = _of_map(records[input_of(name)].astype(jnp.float32), records[scores_of(name)], counted_BT)
            found |= {f"{name}/{field}": value for field, value in of_map.items()}
    return found


def _of_map(x_BTI: jax.Array, score_BTI: jax.Array, counted_BT: jax.Array) -> dict[str, jax.Array]:
    """Statistics of what one map reads, float32, over the tokens that count."""
    place_BTI = bin_of(score_BTI) + jnp.where(x_BTI < 0, BINS, 0)
    ones_BTI = jnp.broadcast_to(counted_BT[..., None], x_BTI.shape).astype(jnp.int32)
    counts = jnp.zeros(2 * BINS, jnp.int32).at[place_BTI].add(ones_BTI)
    x_BTI = jnp.where(counted_BT[..., None], x_BTI, 0)
    return {
        "counts": counts.reshape(2, BINS),
        "squares": jnp.sum(jnp.square(x_BTI), axis=(0, 1)),
        "magnitudes": jnp.sum(jnp.abs(x_BTI), axis=(0, 1)),
    }


class _Experts(WholeWidth):
    """Around layers whose maps have masks: statistics of maps of experts, over the tokens that each expert gets."""

    def __init__(self, dense_tokens: int, ctx: CallContext):
        self._counted_BT = ctx.positions_BT >= dense_tokens
        self.found: dict[str, jax.Array] = {}

    def experts(
        self,
        name: str,
        read: Callable[[jax.Array], jax.Array],
        taken_BTE: jax.Array,
        norms_EI: jax.Array | None = None,
    ) -> None:
        def added(total: dict[str, jax.Array], expert: jax.Array) -> tuple[dict[str, jax.Array], None]:
            x_BTI = read(expert).astype(jnp.float32)
            score_BTI = jnp.abs(x_BTI) if norms_EI is None else jnp.abs(x_BTI) * norms_EI[expert]
            one = _of_map(x_BTI, score_BTI, taken_BTE[..., expert] & self._counted_BT)
            return jax.tree.map(jnp.add, total, one), None

        channels = jax.eval_shape(read, jnp.int32(0)).shape[-1]
        zeros = {"counts": jnp.zeros((2, BINS), jnp.int32)}
        zeros |= {field: jnp.zeros(channels) for field in ("squares", "magnitudes")}
        total, _ = jax.lax.scan(added, zeros, jnp.arange(taken_BTE.shape[-1]))
        self.found |= {f"{name}/{field}": value for field, value in total.items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    config: DecoderConfig,
    graphdef: Any,
    dense_tokens: int,
    state: Any,
    x_BTD: jax.Array,
    batch: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The stream after a layer, and the statistics of the layer's maps."""
    ctx = call_context(config, batch["tokens"], batch["segment_ids"], batch["positions"])
    ctx.record = frozenset(record(name) for name in MAPS for record in (input_of, scores_of))
    ctx.summarise = partial(_statistics, dense_tokens)
    block, experts = nnx.merge(graphdef, state), _Experts(dense_tokens, ctx)
    if isinstance(block.ffn, SparsifiedFFN):
        ctx.width = experts
    passed, aux, _ = block(Passed(x_BTD), ctx, None)
    return passed.x, aux.records | experts.found


def calibrate(
    model: Decoder, batches: Iterable[Mapping[str, Any]], dense_tokens: int = 0, stage: Stage | None = None
) -> Calibration:
    """Statistics of the maps of a sparsified model that leave channels out, before their masks.

    Layers are called one after another: the streams of all sequences are held, and of one layer at a time its arrays.
    What is kept of a layer and map is its histogram and two numbers a channel.

    Args:
      model: a decoder of sparsified layers; with cuts of 0 it computes what the model that it is made of computes.
      batches: of a data pipeline: dicts of [B, T] arrays tokens, segment_ids, positions; padding has segment id 0.
      dense_tokens: first tokens of a document that are not counted.
      stage: where what is found is kept (`layers.layer_by_layer`).

    Raises:
      DataError: the batches hold no token that counts.
    """

    def visit(
        place: Place, block: Block, streams: list[jax.Array], held: list[dict[str, jax.Array]]
    ) -> tuple[list[jax.Array], Arrays]:
        graphdef, state = nnx.split(block)
        after: list[jax.Array] = []
        total: Arrays = {}
        for x_BTD, batch in zip(streams, held, strict=True):
            y_BTD, found = _read(model.config, graphdef, dense_tokens, state, x_BTD, batch)
            after.append(y_BTD)
            for name, value in jax.device_get(found).items():
                # Sums over many batches outgrow float32 and int32.
                wide = np.asarray(value, np.float64 if value.dtype.kind == "f" else np.int64)
                total[name] = total[name] + wide if name in total else wide
        return after, total

    layers = layer_by_layer(model, batches, visit, stage)
    tokens = int(layers[0].get("tokens", 0))
    if tokens == 0:
        raise DataError("the text to calibrate on has no token")
    maps = {}
    for name in MAPS:
        there = tuple(layer for layer, found in enumerate(layers) if f"{name}/counts" in found)
        if there:
            fields = ("counts", "squares", "magnitudes")
            found = ([layers[layer][f"{name}/{field}"] for layer in there] for field in fields)
            maps[name] = MapStatistics(there, *map(_stacked, found))
    return Calibration(tokens, model.config.layers, maps)


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of several layers as one, filled up with zeros where layers have maps of unlike width."""
    width = max(array.shape[-1] for array in arrays)
    return np.stack([np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in arrays])


def _inverse(counts: np.ndarray, below: float) -> float:
    """The score below which there are `below` of the counted, evenly spread within their bin; 0 in the first bin."""
    total = np.cumsum(counts)
    if below <= 0 or total[-1] == 0:
        return 0.0
    place = min(int(np.searchsorted(total, below, side="right")), BINS - 1)
    if place == 0:
        return 0.0
    inside = min((below - total[place - 1]) / max(counts[place], 1), 1.0)
    return float(EDGES[place] + inside * (EDGES[place + 1] - EDGES[place]))


def threshold(counts: np.ndarray, share: float, quantile: Quantile = "magnitude") -> float:
    """The threshold that a share of scores does not exceed, from their histogram.

    Args:
      counts: [2, BINS], of not negative and of negative channels.
      share: of the scores, in [0, 1).
      quantile: "magnitude", the quantile of the scores; "symmetric", `F^-1(1/2 + share/2)` with F the distribution of
        scores that have the sign of their channels, which is the same if that is symmetric (TEAL, as its authors'
        code); "grid", the quantile of the scores rounded down to a multiple of 2e-4 and to 2 at most (the lower edge of
        its bin in CATS's code, for `jnp.searchsorted(..., side="right")`).
    """
    if quantile == "symmetric":
        above = counts.sum() * (1 - share) / 2
        return _inverse(counts[0], counts[0].sum() - above)
    found = _inverse(counts.sum(axis=0), share * counts.sum())
    if quantile == "magnitude":
        return found
    return max(float(CATS_EDGES[np.searchsorted(CATS_EDGES, found, side="right") - 1]), 0.0)


def thresholds(
    calibration: Calibration, shares: Mapping[str, np.ndarray], quantile: Quantile = "magnitude"
) -> dict[str, np.ndarray]:
    """For each map the thresholds of the layers, float32 [L]; NaN where a layer does not have the map.

    `shares`: of the channels, by map [L].
    """
    found = {}
    for name, map in calibration.maps.items():
        found[name] = np.full(calibration.layers, np.nan, np.float32)
        for layer, counts in zip(map.layers, map.counts, strict=True):
            found[name][layer] = threshold(counts, float(shares[name][layer]), quantile)
    return found
