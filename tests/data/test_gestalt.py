"""Displays of global relations: what is counted within blocks is equal, how blocks lie to each other is not."""

from itertools import pairwise

import numpy as np
import pytest

from sparsezoo_jax.data.images import open_images
from sparsezoo_jax.data.images.gestalt import (
    _inducer,
    blocks_of,
    broken,
    closure,
    convexity,
    disrt,
    figures,
    joined,
    moved_by,
    neighbours_kept,
)
from sparsezoo_jax.errors import ConfigError, DataError


def multiset(image, block):
    return sorted(part.tobytes() for part in blocks_of(image, block))


def is_moved(one, other, block):
    side = len(one) // block
    return any(np.array_equal(moved_by(one, block, *divmod(way, side)), other) for way in range(side * side))


def test_blocks_are_squares_in_the_order_of_rows():
    image = np.arange(6 * 6 * 2).reshape(6, 6, 2)
    parts = blocks_of(image, 3)
    np.testing.assert_array_equal(parts[1], image[:3, 3:])
    np.testing.assert_array_equal(parts[2], image[3:, :3])
    np.testing.assert_array_equal(joined(parts), image)


def test_neighbours_are_kept_by_moving_and_lost_by_exchanging():
    same = np.arange(16)
    assert neighbours_kept(same) == 32
    moved = np.roll(same.reshape(4, 4), (1, 2), (0, 1)).ravel()
    assert neighbours_kept(moved) == 32
    swapped = same.copy()
    swapped[[0, 10]] = swapped[[10, 0]]  # each has two neighbours, and is one of two blocks
    assert neighbours_kept(swapped) == 32 - 8


def test_no_block_of_a_broken_image_has_a_neighbour_that_it_had():
    image = np.arange(8 * 8, dtype=np.uint8).reshape(8, 8, 1)
    for seed in range(5):
        made = broken(image, 2, np.random.default_rng(seed))
        order = [multiset_index(part, blocks_of(image, 2)) for part in blocks_of(made, 2)]
        assert sorted(order) == list(range(16))
        assert neighbours_kept(np.asarray(order)) == 0


def multiset_index(part, parts):
    (found,) = (i for i, other in enumerate(parts) if np.array_equal(part, other))
    return found


@pytest.mark.parametrize("pair", ["intact", "broken"])
@pytest.mark.parametrize(("name", "size", "block"), [("digits", 8, 2), ("shapes", 16, 4), ("textures", 16, 4)])
def test_triplets_have_equal_blocks_and_one_that_is_otherwise_arranged(name, size, block, pair):
    images = open_images(name, count=12, size=size).images
    made, odd = disrt(images, block, pair=pair)
    assert made.shape == (12, 3, *images.shape[1:])
    assert made.dtype == np.uint8
    for image, three, place in zip(images, made, odd, strict=True):
        for one in three:
            assert multiset(one, block) == multiset(image, block)
        alike = [i for i in range(3) if i != place]
        assert is_moved(image, three[place], block) == (pair == "broken")
        assert is_moved(three[alike[0]], three[alike[1]], block) == (pair == "intact")
        assert all(is_moved(image, three[i], block) == (pair == "intact") for i in alike)
        assert not any(np.array_equal(a, b) for a, b in pairwise([*three, three[0]]))
    assert set(odd) == {0, 1, 2}
    again, other = disrt(images[:3], block, pair=pair), disrt(images, block, pair=pair, seed=1)
    np.testing.assert_array_equal(again.images, made[:3])
    assert not np.array_equal(other.images, made)


def test_within_reach_a_figure_stays_whole_and_differs_as_much_wherever_it_is():
    found = figures(30, margin=8)
    made, odd = disrt(found.images, 4, reach=2)
    pixels = made.astype(float)
    apart = [np.abs(pixels[:, i] - pixels[:, j]).mean((1, 2, 3)) for i, j in ((1, 2), (0, 2), (0, 1))]
    alike = np.stack(apart, 1)[np.arange(30), odd].mean()
    assert alike == pytest.approx((np.sum(apart, 0).mean() - alike) / 2, rel=0.25)
    for image, three, place in zip(found.images, made, odd, strict=True):
        for one in (one for i, one in enumerate(three) if i != place):
            ways = [(d, r) for d in range(-2, 3) for r in range(-2, 3) if np.array_equal(moved_by(image, 4, d, r), one)]
            assert len(ways) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 3}, "block=3: must divide the images' 8 pixels"),
        ({"block": 8}, "block=8: must be below the images' 8 pixels"),
        ({"block": 2, "reach": 0}, "reach=0: must be above 0, or none"),
    ],
)
def test_triplets_that_cannot_be_made_say_why(arguments, message):
    with pytest.raises(ConfigError, match=message):
        disrt(open_images("digits", count=1).images, **arguments)


def test_an_image_of_equal_blocks_is_an_error(monkeypatch):
    monkeypatch.setattr("sparsezoo_jax.data.images.gestalt._TRIES", 50)
    with pytest.raises(DataError, match="an image of 16 blocks, 1 of them different, can't be rearranged"):
        disrt(np.zeros((1, 8, 8, 1), np.uint8), 2)


def test_figures_stay_off_the_border():
    found = figures(24, 32, margin=8)
    assert found.images.shape == (24, 32, 32, 3)
    inside = np.zeros((32, 32), bool)
    inside[8:24, 8:24] = True
    assert not found.covered[:, ~inside].any()
    assert (found.covered.max((1, 2)) == 1).all()
    # Where a figure is, the image has another colour than beside it.
    for image, covered in zip(found.images.astype(float), found.covered, strict=True):
        assert abs(image[covered == 1].mean() - image[covered == 0].mean()) > 40
    np.testing.assert_array_equal(figures(3, 32, margin=8).images, found.images[:3])
    with pytest.raises(ConfigError, match="margin=11: leaves no room for a shape in 32 pixels"):
        figures(1, 32, margin=11)


def test_inducers_change_places_whole_and_point_outwards():
    found = closure(20)
    ground = np.median(found.aligned.reshape(20, -1, 3), axis=1)
    sides = []
    for aligned, exchanged, real, colour in zip(*found, ground, strict=True):
        assert multiset(aligned, 4) == multiset(exchanged, 4)
        spread = []
        for image in (aligned, exchanged):
            points = np.argwhere(np.abs(image - colour).mean(-1) > 35)
            spread.append(((points - points.mean(0)) ** 2).sum(1).mean())
        # A disc that lacks the quarter towards the middle has its mass farther from it.
        assert spread[0] > spread[1] * 1.05
        sides.append(np.sqrt((np.abs(real - colour).mean(-1) > 35).sum()))
    np.testing.assert_allclose(sorted({round(x / 4) for x in sides}), [3, 4])
    np.testing.assert_array_equal(closure(2).real, found.real[:2])
    assert not np.array_equal(closure(2, seed=1).aligned, found.aligned[:2])
    for arguments, message in (
        ((1, 30), "unit=4: must be above 1 and divide size=30"),
        ((1, 20), "size=20: must be at"),
    ):
        with pytest.raises(ConfigError, match=message):
            closure(*arguments)


def test_an_inducer_lacks_one_quarter():
    disc = _inducer(16, 1, -1)
    assert not disc[8:, :8].any()
    assert disc.sum() == pytest.approx(0.75 * np.pi * 7.5**2, rel=0.02)
    np.testing.assert_allclose(disc[:8, 8:], disc[:8, :8][:, ::-1])


def test_the_convex_area_bulges_and_is_as_large_as_the_other():
    found = convexity(24)
    np.testing.assert_allclose(found.convex.mean((1, 2)), 0.5, atol=0.01)
    for n in range(0, 24, 2):
        area = found.convex[n]
        down = max(area[:, 0].min(), area[:, -1].min()) == 1
        extent = area.sum(1 if down else 0)
        # Half circles: how far it reaches is concave along the contour, but at the cusps between them.
        around = np.concatenate([extent, extent[:2]])
        bends = around[2:] - 2 * around[1:-1] + around[:-2]
        assert (bends < 0).mean() > 0.7
        assert bends.max() > -2 * bends.min()
        np.testing.assert_array_equal(found.convex[n], found.convex[n + 1])
        first, second = found.images[n].astype(float), found.images[n + 1].astype(float)
        full, none = found.convex[n] == 1, found.convex[n] == 0
        np.testing.assert_allclose(first[full].mean(0), second[none].mean(0), atol=4)
        assert abs(first[full].mean() - first[none].mean()) > 40
    np.testing.assert_array_equal(convexity(4).images, found.images[:4])
    with pytest.raises(ConfigError, match="count=3: must be even"):
        convexity(3)
