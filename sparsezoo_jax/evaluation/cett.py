"""The share of hidden units that a model needs, of any activation: the CETT-PPL meter of Sparsing Law, and its rivals.

A hidden unit a_i adds n_i = a_i W_i to its layer's output, W_i a row of the down projection. Units of a token with a
norm ||n_i|| below a threshold are dropped; CETT, the cumulative error of tail truncation, is the norm of their sum over
that of the whole output, averaged over tokens. Each layer has the threshold that yields one CETT for all layers, and
that is the one which raises the perplexity by a given share. What is left is the activation ratio.

Shape letters: B batch, T position, M tokens of all batches, F hidden units, D model width, L layers.

Source: Sparsing Law (arXiv 2411.02335), with the search of its code (github.com/thunlp/SparsingLaw).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import ConfigError, DataError, require
from sparsezoo_jax.evaluation.perplexity import evaluate_model
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.config import LayerSpec
from sparsezoo_jax.models.decoder import Output
from sparsezoo_jax.models.records import FFN_GATE, FFN_HIDDEN

Batch = Mapping[str, Any]
Rule = Literal["cett", "threshold", "top_k"]
GRID = 65_536
"""Thresholds of a layer that the search knows, evenly spaced."""
SUBSAMPLE = 65_536
"""Norms of which the largest threshold is a quantile."""
LARGEST = 0.99
"""That quantile."""
PRECISION = 1e-6
"""Width of the interval of CETT at which the search ends."""
RATIO = "activation_ratio"


class Thinned(nnx.Module):
    """A decoder that drops hidden units by a rule; its statistics hold the `activation_ratio` of each layer.

    Rules, by a number for each layer:
      cett: units a_i with |a_i| ||W_i|| below it.
      threshold: units whose gate is below it in magnitude (FATReLU of one global threshold; 0 is the share of units
        that are not 0, the ReLU's own measure).
      top_k: all but so many units of each token with the largest gates in magnitude.

    In networks without a gate the unit itself is its gate.

    Raises:
      ConfigError: not one number for each layer.
    """

    def __init__(self, model: Decoder, rule: Rule, values_L: Sequence[float] | np.ndarray):
        layers = model.config.layers
        require(len(values_L) == layers, "thresholds", f"<{len(values_L)} values>", f"must be one a layer, {layers}")
        self.model, self.rule = model, rule
        self.values_L = nnx.Variable(jnp.asarray(values_L, jnp.float32))

    def _keep(self, layer: int, records: Mapping[str, jax.Array], dictionary_FD: jax.Array) -> jax.Array:
        value = self.values_L[layer]
        if self.rule == "cett":
            return contributions(records[FFN_HIDDEN], dictionary_FD) >= value
        size_BTF = jnp.abs(records[FFN_GATE].astype(jnp.float32))
        if self.rule == "threshold":
            return size_BTF >= value
        width = size_BTF.shape[-1]
        rank = jnp.clip(width - value.astype(jnp.int32), 0, width - 1)
        return size_BTF >= jnp.take(jnp.sort(size_BTF, axis=-1), rank, axis=-1)[..., None]

    def __call__(self, tokens_BT: jax.Array, *, segment_ids: jax.Array, positions: jax.Array) -> Output:
        out = self.model(
            tokens_BT,
            segment_ids=segment_ids,
            positions=positions,
            record=(FFN_HIDDEN, FFN_GATE),
            summarise=_active_share,
            keep=self._keep,
        )
        return out._replace(stats={**out.stats, RATIO: jnp.stack([jnp.asarray(x) for x in out.records[RATIO]])})


def _active_share(records: dict[str, jax.Array], spec: LayerSpec, ctx: CallContext) -> dict[str, jax.Array]:
    active_BT = jnp.mean(records[FFN_HIDDEN] != 0, axis=-1, dtype=jnp.float32)
    return {RATIO: ctx.mean_over_tokens(active_BT)}


def contributions(hidden: jax.Array, dictionary_FD: jax.Array) -> jax.Array:
    """Norm of what each hidden unit adds to the output, float32 [..., F]."""
    return jnp.abs(hidden.astype(jnp.float32)) * jnp.linalg.norm(dictionary_FD.astype(jnp.float32), axis=-1)


@jax.jit
def output_norms(hidden_MF: jax.Array, dictionary_FD: jax.Array) -> jax.Array:
    """Norm of each token's output, [M]."""
    return jnp.linalg.norm(hidden_MF @ dictionary_FD, axis=-1)


@jax.jit
def error_of_truncation(
    hidden_MF: jax.Array, dictionary_FD: jax.Array, whole_M: jax.Array, threshold: jax.Array
) -> jax.Array:
    """CETT: norm of what the units with a contribution of at most `threshold` add, over that of all; mean over tokens.

    `whole_M` are the `output_norms`; a token whose output is 0 loses nothing. float32 scalar.
    """
    small_MF = jnp.where(contributions(hidden_MF, dictionary_FD) > threshold, 0, hidden_MF)
    lost_M = output_norms(small_MF, dictionary_FD)
    return jnp.mean(jnp.where(whole_M > 0, lost_M / jnp.where(whole_M > 0, whole_M, 1), 0))


class LayerThresholds:
    """The thresholds of one layer by CETT, from its hidden units for some tokens without thresholds anywhere."""

    def __init__(self, hidden_MF: jax.Array, dictionary_FD: jax.Array):
        self.hidden_MF = hidden_MF.astype(jnp.float32)
        self.dictionary_FD = dictionary_FD.astype(jnp.float32)
        norms = np.asarray(contributions(self.hidden_MF, self.dictionary_FD)).ravel()
        largest = float(np.quantile(norms[:: max(1, norms.size // SUBSAMPLE)], LARGEST))
        self.grid = np.linspace(float(norms.min()), largest, GRID, dtype=np.float32)
        self._whole_M = output_norms(self.hidden_MF, self.dictionary_FD)
        self._errors: dict[int, float] = {}

    def _error(self, index: int) -> float:
        # Searches for neighbouring values of CETT meet the same thresholds again.
        if index not in self._errors:
            threshold = jnp.float32(self.grid[index])
            error = error_of_truncation(self.hidden_MF, self.dictionary_FD, self._whole_M, threshold)
            self._errors[index] = float(error)
        return self._errors[index]

    def at(self, cett: float) -> float:
        """The largest threshold of the grid before the first whose CETT is above `cett`."""
        low, high = 0, GRID
        while low < high:
            middle = (low + high) // 2
            if self._error(middle) > cett:
                high = middle
            else:
                low = middle + 1
        return float(self.grid[max(low - 1, 0)])


@dataclasses.dataclass(frozen=True)
class Point:
    """A model with hidden units dropped by one rule at one setting."""

    rule: Rule
    setting: float
    """CETT, the threshold of gates, or the share of hidden units that are kept."""
    activation_ratio: list[float]
    """Share of hidden units that are left, per layer, mean over tokens."""
    mean: float
    """That over all layers."""
    loss: float
    """Cross-entropy, nats/token."""
    increase: float
    """Relative increase of the perplexity over the model with all units."""


class Calibrated:
    """A model, the batches that it is measured on, its loss there and its layers' thresholds.

    Holds the hidden units of all tokens and layers, in the model's number format and once more in float32.

    Args:
      model: the decoder.
      batches: called for a new pass over the batches of a data pipeline, dicts of [B, T] arrays, all of one shape.

    Raises:
      ConfigError: a layer whose feed-forward network has no hidden units to measure.
      DataError: the batches hold no token.
    """

    def __init__(self, model: Decoder, batches: Callable[[], Iterable[Batch]]):
        check(model)
        self.model, self.batches = model, batches
        self.loss = evaluate_model(model, batches()).loss
        dictionaries = [ffn.dictionary for ffn in _ffns(model)]
        hidden: list[list[jax.Array]] = [[] for _ in dictionaries]
        gates: list[np.ndarray] = []
        graphdef, state = nnx.split(model)
        for batch in batches():
            arrays = {name: jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions")}
            records = _read(graphdef, state, arrays)
            valid_BT = np.asarray(batch["segment_ids"]) > 0
            for layer, (a_BTF, s_BTF) in enumerate(zip(records[FFN_HIDDEN], records[FFN_GATE], strict=True)):
                hidden[layer].append(a_BTF[valid_BT])
                gate = np.abs(np.asarray(s_BTF, np.float32))[valid_BT].ravel()
                gates.append(gate[:: max(1, gate.size // SUBSAMPLE)])
        if not any(len(x) for parts in hidden for x in parts):
            raise DataError("the split to measure on has no token")
        self.gates = np.concatenate(gates)
        """Magnitudes of gates, some of all layers."""
        self.layers = [
            LayerThresholds(jnp.concatenate(parts), dictionary)
            for parts, dictionary in zip(hidden, dictionaries, strict=True)
            if dictionary is not None
        ]

    def thresholds(self, cett: float) -> np.ndarray:
        """Each layer's threshold for this CETT, float32 [L]."""
        return np.array([layer.at(cett) for layer in self.layers], np.float32)

    def point(self, rule: Rule, setting: float) -> Point:
        """The model under `rule`; settings as in `Point`."""
        if rule == "cett":
            values = self.thresholds(setting)
        elif rule == "threshold":
            values = np.full(len(self.layers), setting, np.float32)
        else:
            values = np.array([max(1, round(setting * layer.hidden_MF.shape[-1])) for layer in self.layers], np.float32)
        found = evaluate_model(Thinned(self.model, rule, values), self.batches())
        ratio = found.stats[RATIO]
        return Point(rule, setting, ratio, float(np.mean(ratio)), found.loss, math.expm1(found.loss - self.loss))


@partial(jax.jit, static_argnums=0)
def _read(graphdef: nnx.GraphDef, state: Any, batch: Batch) -> dict[str, tuple[jax.Array, ...]]:
    out = nnx.merge(graphdef, state)(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        logits=False,
        record=(FFN_HIDDEN, FFN_GATE),
    )
    return out.records


def _ffns(model: Decoder) -> list[Any]:
    return [block.ffn for segment in model.unstacked().segments for block in segment.blocks]


def check(model: Decoder) -> None:
    """Raise `ConfigError` for a model that has layers whose hidden units can't be measured."""
    config = model.config
    partial_width = config.residual.active_width(config.d_model, "ffn") != config.d_model
    allowed = "--cett can't measure a residual stream whose width is routed"
    require(not partial_width, "model.residual.kind", config.residual.kind, allowed)
    for index, (ffn, spec) in enumerate(zip(_ffns(model), config.layer_specs(), strict=True)):
        allowed = f"--cett can't measure it: layer {index} shows no hidden units"
        require(ffn.dictionary is not None, "model.ffn.kind", spec.ffn.kind, allowed)


def find_cett(models: Sequence[Calibrated], increase: float) -> float:
    """The largest CETT at which the mean perplexity ratio of `models` (checkpoints of a run) is below 1 + `increase`.

    Bisection on [0, 1]; the ratio is exp(loss with thresholds - loss without).

    Raises:
      ConfigError: `increase` is not in (0, 1).
    """
    require(0 < increase < 1, "--cett", f"{increase:.3g}", "must be in (0, 1)")
    low, high = 0.0, 1.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        if np.mean([1 + model.point("cett", middle).increase for model in models]) < 1 + increase:
            low = middle
        else:
            high = middle
    # Not the middle: where one unit decides, the ratio jumps, and the middle may lie behind the jump.
    return low


@dataclasses.dataclass(frozen=True)
class Course:
    """The activation ratio of checkpoints of a run, at one CETT for all."""

    increase: float
    """Relative increase of the perplexity that the CETT stands for."""
    cett: float
    steps: list[int]
    points: list[Point]


def course(
    checkpoints: Mapping[int, Callable[[], Decoder]],
    batches: Callable[[], Iterable[Batch]],
    increase: float,
    *,
    joint: int = 5,
) -> Course:
    """Find the CETT on the `joint` last checkpoints together, and measure all of them at it, as the paper for curves.

    Args:
      checkpoints: by step, what loads the model; early ones are held one at a time.
      batches: called for a new pass over the batches to measure on.
      increase: as in `find_cett`.

    Raises:
      ConfigError: `increase` out of range, or a model without hidden units to measure.
    """
    steps = sorted(checkpoints)
    last = [Calibrated(checkpoints[step](), batches) for step in steps[-joint:]]
    level = find_cett(last, increase)
    early = [Calibrated(checkpoints[step](), batches).point("cett", level) for step in steps[:-joint]]
    return Course(increase, level, steps, early + [model.point("cett", level) for model in last])


def parse_share(text: str) -> float:
    """A percentage such as "1%" as a share in (0, 1).

    Raises:
      ConfigError: anything else.
    """
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not (text.endswith("%") and 0 < share < 1):
        raise ConfigError("--cett", text, "must be a percentage above 0% and below 100%, such as 1%")
    return share


SETTINGS: dict[Rule, tuple[float, ...]] = {
    "cett": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    "top_k": (0.7, 0.5, 0.3, 0.2, 0.1, 0.05),
}
"""Settings of the curve."""
QUANTILES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Of the magnitudes of gates that are not 0, pooled over layers: the curve's thresholds."""


def curve(model: Calibrated) -> list[Point]:
    """Activation ratio against perplexity under CETT and its rivals.

    The first point is that of the exact zeros, which a ReLU has; then global thresholds on the gate, the top k gates of
    each token, and CETT.
    """
    nonzero = model.gates[model.gates > 0]
    thresholds = [0.0, *(float(x) for x in np.quantile(nonzero, QUANTILES))] if nonzero.size else [0.0]
    points = [model.point("threshold", value) for value in thresholds]
    return points + [model.point(rule, value) for rule, values in SETTINGS.items() for value in values]
