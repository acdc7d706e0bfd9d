"""Neurons that are removed from feed-forward networks: scores, how many each layer keeps, and the smaller model.

Shape letters: F neurons, D model width, L layers.

Sources: CFSP (arXiv 2409.13199), FLAP (arXiv 2312.11983), and the structured forms of magnitude and Wanda that both
compare themselves with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import ConfigError, require
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.ffn import GatedFFN, GatedFFNConfig, PlainFFN, PlainFFNConfig
from sparsezoo_jax.models.layers import Block
from sparsezoo_jax.sparsification.conversion import check_layers
from sparsezoo_jax.sparsification.layers import LayerInputs, Place, places_of, walk
from sparsezoo_jax.sparsification.placement import placed
from sparsezoo_jax.sparsification.progress import Arrays, Progress, Stage
from sparsezoo_jax.training.state import ModelTemplate, flatten, nested

NeuronMethod = Literal["cfsp", "magnitude-sp", "wanda-sp", "flap"]
#: Methods, and whether layers of their own widths are part of them.
NEURON_METHODS: dict[str, bool] = {"cfsp": True, "magnitude-sp": False, "wanda-sp": False, "flap": True}
_SPREAD = 128 * 1024 / 1e4
"""CFSP divides sums of angles over 128 x 1024 tokens by 10^4; for means over tokens that is this factor."""


def layer_importance(angles_L: np.ndarray, spread: float = 1.0) -> np.ndarray:
    """Z_l of CFSP: `sigmoid(spread * 13.1 * (I_l - mean I))`, I_l the mean angle over tokens as a share of pi."""
    return 1 / (1 + np.exp(-spread * _SPREAD * (angles_L - np.mean(angles_L))))


def kept_shares(importance_L: np.ndarray, share: float) -> np.ndarray:
    """Share of the neurons that each layer keeps when `share` of all go: `Z_l / mean Z (1 - share)` (CFSP).

    Where that is 1 or more for a layer, the importances are drawn to their mean until it is not, as the authors' code
    does it.
    """
    mean, largest = np.mean(importance_L), np.max(importance_L)
    if largest / mean * (1 - share) >= 1:
        room = (1 / (1 - share) - 1) * mean
        importance_L = mean + (importance_L - mean) * room / (largest - mean) / 1.05 if largest > mean else importance_L
    return np.minimum(importance_L / mean * (1 - share), 1.0)


def widths(kept_L: np.ndarray, neurons: int, multiple: int) -> np.ndarray:
    """Neurons that layers keep, int [L]: `int(F kept)`, or the nearest multiple; from one multiple to F."""
    found = (
        np.floor(kept_L * neurons + 1e-6) if multiple == 1 else np.floor(kept_L * neurons / multiple + 0.5) * multiple
    )
    return np.clip(found, min(multiple, neurons), neurons).astype(int)


def neuron_scores(
    method: NeuronMethod, matrices: Mapping[str, np.ndarray], inputs: LayerInputs, *, released: bool = False
) -> np.ndarray:
    """Scores of one layer's neurons, float64 [F]; the lowest go.

    With W the matrix "down" [F, D], w_j its row of neuron j, x_j what the neuron puts out and ||x_j|| the root of the
    mean over sequences of its squared norm over tokens:

    - magnitude-sp: `||w_j||_2`
    - wanda-sp: `mean over D of |w_j| ||x_j||`
    - flap: `var(x_j) ||w_j||_2^2`, the variance over tokens
    - cfsp: `mean over D of (|A| / sum |A| + |up| / sum |up| + |gate| / sum |gate|)_j ||x_j||`, A = w_j ||x_j||. Sums
      are over the neurons for each of D. The authors' code (`released`) has them over D for each neuron, so that each
      term is 1 / D and the score is 3 ||x_j|| / D, whatever the weights.

    Args:
      matrices: "down" [F, D], "up" and where there is one "gate" [D, F].
      inputs: of the layer.
    """
    down_FD = matrices["down"].astype(np.float64)
    norms_F = inputs.norms("down")
    if method == "magnitude-sp":
        return np.linalg.norm(down_FD, axis=1)
    if method == "wanda-sp":
        return np.mean(np.abs(down_FD), axis=1) * norms_F
    if method == "flap":
        sums = inputs.maps["down"]
        variance_F = np.maximum(sums.squares / inputs.tokens - np.square(sums.sums / inputs.tokens), 0)
        return variance_F * np.sum(np.square(down_FD), axis=1)
    terms = [np.abs(down_FD) * norms_F[:, None]]
    terms += [np.abs(matrices[name].astype(np.float64)).T for name in ("up", "gate") if name in matrices]
    axis = 1 if released else 0
    total_FD = sum(term / np.maximum(np.sum(term, axis=axis, keepdims=True), np.finfo(float).tiny) for term in terms)
    return np.mean(total_FD, axis=1) * norms_F


class Shrunk(NamedTuple):
    """A model with fewer neurons."""

    model: Decoder
    widths: list[int]
    """Neurons of each layer; the model's d_ff is the largest, and what a layer lacks of it is zeros."""
    importance: list[float] | None
    """CFSP's Z of each layer, of the whole model, or where all layers have one width above layers that are pruned; None
    for other methods."""


def check_neurons(config: DecoderConfig, *, bias: bool) -> GatedFFNConfig | PlainFFNConfig:
    """The feed-forward networks whose neurons can be removed, all layers' alike.

    Raises:
      ConfigError: others, or a decoder that has further ones.
    """
    ffn = config.ffn
    if not isinstance(ffn, GatedFFNConfig | PlainFFNConfig):
        raise ConfigError("model.ffn.kind", ffn.kind, "has no neurons that can be removed; gated and plain have")
    check_layers(config)
    pattern = ffn.activation_sparsity_pattern if isinstance(ffn, GatedFFNConfig) else ()
    allowed = "selects neurons by the distribution over all of them; none can be removed"
    require(not any(pattern), "model.ffn.activation_sparsity_pattern", pattern, allowed)
    return dataclasses.replace(ffn, bias=True) if bias else ffn


def shrink(
    model: Decoder,
    method: NeuronMethod,
    share: float,
    batches: Iterable[Mapping[str, Any]],
    *,
    per_layer: bool = False,
    multiple: int = 1,
    bias: bool = False,
    spread: float = 1.0,
    released: bool = False,
    progress: Progress | None = None,
) -> Shrunk:
    """The model without a share of the neurons of its feed-forward networks, layer by layer.

    What a layer reads is what the smaller layers below it make. Widths by layer are found first, from the whole model:
    by the importance of layers (cfsp), or by comparing all layers' scores, each standardised over its layer (flap).

    Args:
      model: a decoder that `check_neurons` takes.
      method: how neurons are scored; see `neuron_scores`.
      share: of the neurons that go.
      batches: the text, as for `layers.walk`.
      per_layer: widths differ by layer; for cfsp and flap. The rest up to the largest is zeros.
      multiple: of this widths are.
      bias: put what removed neurons give on average into the bias of the output (FLAP).
      spread: of cfsp's importance over layers (the paper's a).
      released: as in `neuron_scores`.
      progress: what was found before, and where it is kept. None: nowhere.
    """
    batches, progress = list(batches), Progress() if progress is None else progress
    ffn = check_neurons(model.config, bias=bias)
    model = _with_ffn(model, ffn)
    layers, neurons = model.config.layers, ffn.d_ff
    kept_L, importance = np.full(layers, 1 - share), None
    if per_layer:
        kept_L, importance = _by_layer(model, method, share, batches, spread, released, progress.stage("widths"))
    width_L = widths(kept_L, neurons, multiple)
    target = dataclasses.replace(model.config, ffn=dataclasses.replace(ffn, d_ff=int(width_L.max())))
    template = ModelTemplate(lambda rngs: Decoder(target, rngs=rngs))
    params, variables = ModelTemplate(lambda rngs: Decoder(model.config, rngs=rngs)).split(model)
    flat = {path: x for path, x in flatten(params).items() if "/ffn/" not in path}
    made = {path: np.zeros(v.shape, jnp.dtype(target.param_dtype)) for path, v in template.parameters.items()}
    shrunk = {path: array for path, array in made.items() if path not in flat}

    def visit(place: Place, block: Block, inputs: LayerInputs) -> tuple[bool, Arrays]:
        scores_F = neuron_scores(method, _matrices(block), inputs, released=released)
        kept = np.sort(np.argsort(-scores_F, kind="stable")[: width_L[place.layer]])
        gone = np.setdiff1d(np.arange(neurons), kept)
        part: Any = block.ffn
        if bias:
            mean_F = inputs.maps["down"].sums / inputs.tokens
            added_D = mean_F[gone] @ np.asarray(part.down_FD[...], np.float64)[gone]
            part.down_bias[...] = part.down_bias[...] + jnp.asarray(added_D, part.down_bias[...].dtype)
        part.down_FD[...] = part.down_FD[...].at[gone].set(0)
        found: Arrays = {"angle": np.asarray(inputs.angle)}
        for path in shrunk:
            if not path.startswith(f"{place.path}/ffn/"):
                continue
            value = np.asarray(getattr(part, path.rsplit("/", 1)[1])[...])
            axes = template.parameters[path].axes or ()
            for axis, name in enumerate(axes):
                value = np.take(value, kept, axis=axis) if name == "ffn" else value
            found[path] = value
        return True, found

    layers = walk(model, batches, visit, progress.stage("neurons"))
    for place, found in zip(places_of(model), layers, strict=True):
        for path in found.keys() - {"angle"}:
            shrunk[path][place.index][tuple(slice(0, n) for n in found[path].shape)] = found[path]
    if method == "cfsp" and importance is None:
        importance = [float(z) for z in layer_importance(np.array([found["angle"] for found in layers]), spread)]
    smaller = placed(template.merge(nested({**flat, **shrunk}), variables))
    return Shrunk(smaller, [int(w) for w in width_L], importance)


def _matrices(block: Block) -> dict[str, np.ndarray]:
    part: Any = block.ffn
    assert isinstance(part, GatedFFN | PlainFFN)
    return {name: np.asarray(getattr(part, path)[...]) for name, path in part.matrices.items()}


def _by_layer(
    model: Decoder,
    method: NeuronMethod,
    share: float,
    batches: list[Any],
    spread: float,
    released: bool,
    stage: Stage,
) -> tuple[np.ndarray, list[float] | None]:
    """Shares of the neurons that layers keep, found from the whole model, and CFSP's importance of the layers."""

    def visit(place: Place, block: Block, inputs: LayerInputs) -> tuple[bool, Arrays]:
        found: Arrays = {"angle": np.asarray(inputs.angle)}
        if method == "flap":
            found["scores"] = neuron_scores(method, _matrices(block), inputs, released=released)
        return False, found

    layers = walk(model, batches, visit, stage)
    if method == "cfsp":
        importance_L = layer_importance(np.array([found["angle"] for found in layers]), spread)
        return kept_shares(importance_L, share), [float(z) for z in importance_L]
    return standardised_shares(np.stack([found["scores"] for found in layers]), share), None


def standardised_shares(scores_LF: np.ndarray, share: float) -> np.ndarray:
    """Share of its neurons that each layer keeps if of all layers' scores, standardised by layer, the lowest go."""
    deviation_L1 = np.maximum(np.std(scores_LF, axis=1, keepdims=True), np.finfo(float).tiny)
    standard_LF = (scores_LF - np.mean(scores_LF, axis=1, keepdims=True)) / deviation_L1
    gone = math.floor(share * standard_LF.size + 1e-6)
    kept = np.ones(standard_LF.size, bool)
    kept[np.argsort(standard_LF.reshape(-1), kind="stable")[:gone]] = False
    return np.mean(kept.reshape(standard_LF.shape), axis=1)


def _with_ffn(model: Decoder, ffn: GatedFFNConfig | PlainFFNConfig) -> Decoder:
    """The same model with `ffn`, which may have biases that are 0 where the model has none."""
    if ffn == model.config.ffn:
        return model
    source, target = model.config, dataclasses.replace(model.config, ffn=ffn)
    params, variables = ModelTemplate(lambda rngs: Decoder(source, rngs=rngs)).split(model)
    template, flat = ModelTemplate(lambda rngs: Decoder(target, rngs=rngs)), flatten(params)
    new = {path: v for path, v in template.parameters.items() if path not in flat}
    zeros = {path: jnp.zeros(v.shape, jnp.dtype(target.param_dtype)) for path, v in new.items()}
    return placed(template.merge(nested({**zeros, **flat}), variables))
