"""Whether a model of images sees how parts lie to each other: oddity of triplets, closure, figure and ground.

Every score is a mean of credits, one a display, from 0 to 1: 1 for a right choice, and a share of it where choices are
equally good. So what does not tell the choices apart scores chance: 1/3 of triplets, 1/2 of the others.

Shapes: N displays, T patches, D numbers of a patch's features; float64 where distances are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.data.images.batches import patches_of
from sparsezoo_jax.data.images.gestalt import Closure, Convexity, Figures, Triplets
from sparsezoo_jax.evaluation.interpretability.intervals import bootstrap
from sparsezoo_jax.models.encoder import Encoder
from sparsezoo_jax.models.records import RESIDUAL

#: Distances that differ by less, in shares of the length of the features, are equal: float32 sums in another order.
_TIE = 1e-5
#: Of the features' mean square, what is added to it in the regression of figures.
_RIDGE = 1e-3
_BATCH = 128
#: The features that are not a model's.
PIXELS = "pixels"


class Score(NamedTuple):
    """A mean of credits, and its 95 % interval by bootstrap over displays."""

    value: float
    low: float
    high: float


def score(credits_N: np.ndarray) -> Score:
    """The score of credits [N]; of several models, [M, N], that of their mean for each display."""
    each_N = np.asarray(credits_N, float).reshape(-1, np.shape(credits_N)[-1]).mean(0)
    return Score(float(each_N.mean()), *bootstrap(each_N.tolist()))


class LayerFeatures:
    """Features of each patch by name, [N, T, D]: the pixels from -1 to 1, and the stream after each layer.

    The model is called as in evaluation, all patches seen; of a masked autoencoder that needs
    `models.encoder.read_as`.
    """

    def __init__(self, model: Encoder):
        self._patch = model.config.images.patch or 0
        graphdef, self._state = nnx.split(model)

        @jax.jit
        def called(state: nnx.State, tokens_BTP: jax.Array) -> list[jax.Array]:
            records = nnx.merge(graphdef, state)(tokens_BTP, logits=False, record={RESIDUAL}).records
            return [layer_BTD.astype(jnp.float32) for layer_BTD in records[RESIDUAL] if layer_BTD is not None]

        self._called = called

    def __call__(self, images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        """Those of images, uint8."""
        patches = patches_of(images_NHWC, self._patch)
        found: list[list[np.ndarray]] = []
        for first in range(0, len(patches), _BATCH):
            own = patches[first : first + _BATCH]
            filled = np.concatenate([own, np.zeros((_BATCH - len(own), *own.shape[1:]), np.uint8)])
            found.append([np.asarray(layer)[: len(own)] for layer in self._called(self._state, filled)])
        layers = {f"layer {i + 1}": np.concatenate(parts) for i, parts in enumerate(zip(*found, strict=True))}
        return {PIXELS: patches / 127.5 - 1, **layers}


def pooled(features_NTD: np.ndarray) -> np.ndarray:
    """The mean over patches, [N, D]."""
    return features_NTD.mean(1, dtype=np.float64)


def odd_one_out(features_N3D: np.ndarray, odd_N: np.ndarray) -> np.ndarray:
    """Credits [N] for finding the odd one of three: the image whose Euclidean distances to the other two have the
    largest sum, so that the other two are the nearest pair. Chance is 1/3.
    """
    features = features_N3D.astype(np.float64)
    opposite_N3 = np.stack(
        [np.linalg.norm(features[:, i] - features[:, j], axis=-1) for i, j in ((1, 2), (0, 2), (0, 1))], 1
    )
    chosen_N3 = opposite_N3 <= opposite_N3.min(1, keepdims=True) + _tolerance(features, (1, 2))[:, None]
    right_N = chosen_N3[np.arange(len(odd_N)), odd_N]
    return right_N / chosen_N3.sum(1)


def nearer(reference_ND: np.ndarray, one_ND: np.ndarray, other_ND: np.ndarray) -> np.ndarray:
    """Credits [N] where `one` is nearer to the reference than `other`, by Euclidean distance. Chance is 1/2."""
    reference = reference_ND.astype(np.float64)
    distances = [np.linalg.norm(reference - x, axis=-1) for x in (one_ND, other_ND)]
    return _above(distances[1] - distances[0], _tolerance(reference, (1,)))


class Readout(NamedTuple):
    """A linear map from the features of a patch to the share of it that a figure covers."""

    weight_D: np.ndarray
    bias: float

    def __call__(self, features_NTD: np.ndarray) -> np.ndarray:
        """The share, [N, T], not held within 0 and 1."""
        return features_NTD @ self.weight_D + self.bias


def fitted_readout(features_NTD: np.ndarray, covered_NT: np.ndarray) -> Readout:
    """The map of least squares with a ridge: a thousandth of the features' mean square is added to each one's."""
    x = features_NTD.reshape(-1, features_NTD.shape[-1]).astype(np.float64)
    y = covered_NT.reshape(-1)
    centred, mean = x - x.mean(0), x.mean(0)
    gram = centred.T @ centred / len(x)
    ridge = _RIDGE * np.trace(gram) / len(gram)
    weight = np.linalg.solve(gram + ridge * np.eye(len(gram)), centred.T @ (y - y.mean()) / len(x))
    return Readout(weight, float(y.mean() - mean @ weight))


def higher_inside(readout_NT: np.ndarray, covered_NT: np.ndarray) -> np.ndarray:
    """Credits where the mean over patches that are covered whole is above that over those not at all; chance is 1/2.

    Patches that the contour crosses are in neither, and displays without patches of both kinds are left out.
    """
    inside_NT, outside_NT = covered_NT >= 1 - 1e-9, covered_NT <= 1e-9
    both_N = inside_NT.any(1) & outside_NT.any(1)
    means = [(readout_NT * own)[both_N].sum(1) / own[both_N].sum(1) for own in (inside_NT, outside_NT)]
    return _above(means[0] - means[1], _TIE * np.abs(readout_NT[both_N]).mean(1))


def covered_patches(covered_NHW: np.ndarray, patch: int) -> np.ndarray:
    """The share of each patch that is covered, [N, T], from that of each pixel."""
    count, height, width = covered_NHW.shape
    split = covered_NHW.reshape(count, height // patch, patch, width // patch, patch)
    return split.mean((2, 4)).reshape(count, -1)


class Areas(NamedTuple):
    """What a readout of figures is fitted to and tried on."""

    shown: Figures
    """Figures that it is fitted to."""
    figures: Figures
    """Others, that it is tried on."""
    convexity: Convexity


class Displays(NamedTuple):
    """What models are tested with."""

    triplets: Mapping[str, Triplets]
    """By name."""
    closure: Closure | None = None
    areas: Areas | None = None


def gestalt_credits(model: Encoder, displays: Displays) -> dict[str, dict[str, np.ndarray]]:
    """Credits of a model by test and by features (those of `LayerFeatures`), an array each.

    Tests are those of the triplets by their names, and where there are displays for them "closure" (the aligned
    inducers are nearer to the real square than the exchanged ones), "figure" (a linear readout of figures, fitted to
    others, is higher in a figure than beside it) and "convexity" (the same readout is higher in the convex area).
    Distances are those of `pooled` features.
    """
    patch, features = model.config.images.patch or 0, LayerFeatures(model)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, (images, odd) in displays.triplets.items():
        layers = features(images.reshape(-1, *images.shape[2:]))
        each = {layer: pooled(x).reshape(len(odd), 3, -1) for layer, x in layers.items()}
        found[name] = {layer: odd_one_out(x, odd) for layer, x in each.items()}
    if displays.closure is not None:
        aligned, exchanged, real = (features(images) for images in displays.closure)
        found["closure"] = {
            layer: nearer(pooled(real[layer]), pooled(aligned[layer]), pooled(exchanged[layer])) for layer in real
        }
    if displays.areas is not None:
        shown, figures, convexity = displays.areas
        covered_NT = covered_patches(shown.covered, patch)
        read = {layer: fitted_readout(x, covered_NT) for layer, x in features(shown.images).items()}
        for name, images, covered in (
            ("figure", figures.images, figures.covered),
            ("convexity", convexity.images, convexity.convex),
        ):
            own = covered_patches(covered, patch)
            found[name] = {layer: higher_inside(read[layer](x), own) for layer, x in features(images).items()}
    return found


def _above(difference_N: np.ndarray, tolerance_N: np.ndarray) -> np.ndarray:
    return np.where(np.abs(difference_N) <= tolerance_N, 0.5, difference_N > 0).astype(float)


def _tolerance(features: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return _TIE * np.sqrt((features**2).mean(tuple(axes)) * features.shape[-1])
