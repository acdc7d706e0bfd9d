"""Scores of global relations: right, wrong and undecided choices, and what pixels alone say, which is nothing."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.data.images.batches import patches_of
from sparsezoo_jax.data.images.gestalt import closure, convexity, disrt, figures
from sparsezoo_jax.evaluation.gestalt import (
    PIXELS,
    Areas,
    Displays,
    LayerFeatures,
    covered_patches,
    fitted_readout,
    gestalt_credits,
    higher_inside,
    nearer,
    odd_one_out,
    pooled,
    score,
)
from sparsezoo_jax.models import build_model
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.images import MAEConfig
from sparsezoo_jax.overrides import with_values


def test_the_odd_one_is_farthest_from_the_others():
    near = np.asarray([[[0.0, 0], [1, 0], [5, 5]]])
    for place in range(3):
        order = [[2, 0, 1], [0, 2, 1], [0, 1, 2]][place]
        assert odd_one_out(near[:, order], np.asarray([place])) == [1]
        assert odd_one_out(near[:, order], np.asarray([(place + 1) % 3])) == [0]
    # Three that are equal, or two pairs that are: the credit is shared.
    np.testing.assert_allclose(odd_one_out(np.ones((1, 3, 4)), np.asarray([1])), [1 / 3])
    line = np.asarray([[[0.0], [1.0], [2.0]]])
    np.testing.assert_allclose([odd_one_out(line, np.asarray([i]))[0] for i in range(3)], [0.5, 0, 0.5])
    # The same sums in another order are equal.
    parts = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    same = np.stack([parts, parts, parts])[None]
    mixed = np.stack([np.random.default_rng(i).permutation(64) for i in range(3)])
    sums = np.stack([np.cumsum(same[0, i][:, mixed[i]], 1)[:, -1] for i in range(3)])[None]
    np.testing.assert_allclose(odd_one_out(sums, np.asarray([0])), [1 / 3])


def test_nearer_is_by_distance():
    reference, one, other = (np.asarray(x) for x in ([[0.0, 1], [0, 1], [0, 1]], [[0, 2.0], [3, 1], [1, 1]],
                                                     [[0, 4.0], [0, 0], [0, 2]]))  # fmt: skip
    np.testing.assert_array_equal(nearer(reference, one, other), [1, 0, 0.5])


def test_a_readout_finds_what_is_linear():
    draw = np.random.default_rng(0)
    features = draw.standard_normal((20, 16, 5))
    weight = np.asarray([1.0, -2, 0, 0.5, 3])
    read = fitted_readout(features, features @ weight + 0.7)
    np.testing.assert_allclose(read.weight_D, weight, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(read(features), features @ weight + 0.7, atol=0.05)


def test_a_figure_is_compared_with_what_lies_beside_it():
    covered = np.asarray([[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    readout = np.asarray([[0.9, 0.7, -9, 0.1], [0.1, 0.2, 9, 0.8], [1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    # The third has no patch that is covered whole.
    np.testing.assert_array_equal(higher_inside(readout, covered), [1, 0, 0.5])
    pixels = np.zeros((1, 4, 4))
    pixels[0, :2, 2:] = 1
    pixels[0, 3, 0] = 1
    np.testing.assert_array_equal(covered_patches(pixels, 2), [[0, 1, 0.25, 0]])


def test_a_score_is_a_mean_with_an_interval_over_displays():
    found = score(np.asarray([1, 0, 1, 1] * 25))
    assert found.value == 0.75
    assert 0.65 < found.low < 0.72
    assert 0.78 < found.high < 0.85
    # Of several models: of the mean of each display, which does not make displays more than they are.
    both = score(np.asarray([[1, 0, 1, 1] * 25, [1, 0, 1, 1] * 25]))
    assert both == found
    mixed = score(np.asarray([[1, 0] * 50, [0, 1] * 50]))
    assert (mixed.low, mixed.high) == (0.5, 0.5)


@pytest.fixture(scope="module")
def small():
    config = with_values(
        preset("vit").model, {"d_model": 16, "layers": 2, "ffn": PlainFFNConfig(d_ff=24, activation="relu")}
    )
    return build_model(config, nnx.Rngs(0))


def test_pixels_say_nothing_and_layers_have_scores_of_their_own(small):
    images = figures(12, margin=8).images
    triplets = {pair: disrt(images, 4, pair=pair, reach=2) for pair in ("intact", "broken")}
    displays = Displays(triplets, closure(12), Areas(figures(12, seed=1), figures(24, seed=2), convexity(12)))
    found = gestalt_credits(small, displays)
    assert set(found) == {"intact", "broken", "closure", "convexity", "figure"}
    for layers in found.values():
        assert list(layers) == [PIXELS, "layer 1", "layer 2"]
    for test, chance in (("intact", 1 / 3), ("broken", 1 / 3), ("closure", 0.5)):
        np.testing.assert_allclose(found[test][PIXELS], chance)
        assert not np.allclose(found[test]["layer 2"], chance)
    # Displays come in twos with their colours exchanged: colour alone is right in one of them.
    assert found["convexity"][PIXELS].mean() == pytest.approx(0.5, abs=0.1)
    assert 0 < len(found["figure"]["layer 1"]) < 24


def test_features_are_the_streams_of_all_patches(small):
    images = figures(3).images
    found = LayerFeatures(small)(images)
    tokens = patches_of(images, 4)
    np.testing.assert_allclose(found[PIXELS], tokens / 127.5 - 1)
    out = small(tokens, logits=False, record={"residual"})
    for layer, name in enumerate(("layer 1", "layer 2")):
        np.testing.assert_allclose(found[name], out.records["residual"][layer], atol=1e-5)
    np.testing.assert_allclose(pooled(found["layer 1"]), found["layer 1"].mean(1), atol=1e-6)


def test_an_autoencoder_has_to_see_all_patches(small):
    images = dataclasses.replace(small.config.images, mae=MAEConfig(hidden_share=0.75))
    hiding = build_model(dataclasses.replace(small.config, images=images), nnx.Rngs(0))
    with pytest.raises(Exception, match="segment_ids=None: must say which patches are hidden"):
        LayerFeatures(hiding)(figures(1).images)
