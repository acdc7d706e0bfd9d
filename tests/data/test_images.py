import subprocess
import sys

import numpy as np
import pytest

from sparsezoo_jax.data import DataConfig
from sparsezoo_jax.data.images import IMAGE_SETS, open_images, register_images
from sparsezoo_jax.data.images.batches import Patching, ReadImages, image_batches, images_once, replaced
from sparsezoo_jax.data.images.config import ImageDataConfig
from sparsezoo_jax.data.images.drawing import OUTLINES, shape
from sparsezoo_jax.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["shapes", "textures", "moving_shapes", "digits"])
def test_a_set_is_bytes_with_labels_the_same_for_a_seed_and_others_for_another(name):
    few = open_images(name, count=24)
    assert few.images.dtype == np.uint8
    assert few.labels.dtype == np.int32
    assert len(few.images) == len(few.labels) == 24
    assert 0 <= few.labels.min() <= few.labels.max() < len(few.classes)
    again, other = open_images(name, count=12), open_images(name, count=24, seed=1)
    np.testing.assert_array_equal(again.images, few.images[:12])  # image n does not depend on how many are asked for
    np.testing.assert_array_equal(again.labels, few.labels[:12])
    assert not np.array_equal(other.images, few.images)


@pytest.mark.parametrize("name", ["shapes", "textures", "moving_shapes"])
def test_no_image_is_in_both_splits_nor_twice_in_one(name):
    train, validation = (open_images(name, split, count=32, size=16) for split in ("train", "validation"))
    assert len({image.tobytes() for image in (*train.images, *validation.images)}) == 64
    np.testing.assert_array_equal(np.bincount(train.labels[:24]), 24 // len(train.classes))


def test_digits_are_split_once_and_can_be_enlarged():
    from sklearn.datasets import load_digits

    train, validation = open_images("digits", "train"), open_images("digits", "validation")
    assert (train.images.shape, validation.images.shape) == ((1497, 8, 8, 1), (300, 8, 8, 1))
    bunch = load_digits()
    pixels, labels = bunch["data"], bunch["target"]
    theirs = sorted((row.astype(int).tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True))
    ours = np.concatenate([train.images, validation.images]).reshape(-1, 64)
    rows = np.rint(ours * (16 / 255)).astype(int)
    both = np.concatenate([train.labels, validation.labels])
    assert sorted((row.tobytes(), int(label)) for row, label in zip(rows, both, strict=True)) == theirs
    large = open_images("digits", count=3, size=16)
    np.testing.assert_array_equal(large.images[:, ::2, 1::2], train.images[:3])


def test_shapes_cover_their_areas():
    # Areas of radius 1: a circle, the square and the triangle in it, two bars less their overlap, and so on.
    inner = np.cos(2 * np.pi / 5) / np.cos(np.pi / 5)
    areas = {
        "disc": np.pi,
        "square": 2,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 2 * (1.9 * 0.6) - 0.6**2,
        "ring": np.pi * (1 - 0.55**2),
        "star": 5 * inner * np.sin(np.pi / 5),
    }
    assert set(areas) == set(OUTLINES)
    for name, area in areas.items():
        covered = shape(name, 64, 31.3, 33.8, 25.0, 0.4)
        assert covered.sum() / 25**2 == pytest.approx(area, rel=0.01), name
        rows, columns = np.nonzero(covered)
        assert max(abs(rows - 33.8).max(), abs(columns - 31.3).max()) < 26.5


def test_moving_shapes_move_where_their_class_says():
    clips = open_images("moving_shapes", count=32, frames=5)
    assert clips.images.shape == (32, 5, 32, 32, 3)
    still = np.median(clips.images[:, 0].astype(float), axis=(1, 2))
    seen = np.abs(clips.images - still[:, None, None, None]).sum(-1) > 60
    for clip, label in enumerate(clips.labels):
        middles = np.array([np.argwhere(frame).mean(0) for frame in seen[clip]])
        down, right = middles[-1] - middles[0]
        assert np.hypot(down, right) > 5
        turn = (np.arctan2(-down, right) / (np.pi / 4) - label + 4) % 8 - 4
        assert abs(turn) < 0.25, clips.classes[label]
    changed = (clips.images[:, 1:] != clips.images[:, :-1]).mean()
    assert 0 < changed < 0.2  # the ground stays as it is


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_set_of_the_catalogue_through_mock_data(name):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=5):
        found = open_images(f"tfds:{name}", "test", count=4)
        natural = found.images.shape
        small = open_images(f"tfds:{name}", "test", size=16)
        with pytest.raises(DataError, match=rf"tfds:{name}: 5 images in split 'train', not 6"):
            open_images(f"tfds:{name}", "train", count=6)
    assert natural == {"mnist": (4, 28, 28, 1), "cifar10": (4, 32, 32, 3)}[name]
    assert small.images.shape == (5, 16, 16, natural[-1])
    assert len(found.classes) == 10
    assert found.images.dtype == np.uint8
    assert (small.labels[:4] == found.labels).all()
    assert "tensorflow" not in sys.modules


def test_images_of_several_sizes_are_cut_and_scaled_or_refused():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=4):
        assert open_images("tfds:oxford_flowers102", "validation", size=20).images.shape == (4, 20, 20, 3)
        with pytest.raises(DataError, match=r"has images of \d+x\d+ and \d+x\d+ pixels; give a size"):
            open_images("tfds:oxford_flowers102", "validation")
        with pytest.raises(DataError, match=r"no image with a class label; its fields are .*text"):
            open_images("tfds:lm1b", "train")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("digit", {}, r"data\.dataset=digit: no image set; there are digits, .*shapes"),
        ("shapes", {"split": "test"}, "no images in split 'test'; it has train, validation"),
        ("shapes", {"size": 2}, "size=2: must be from 4 to 1024"),
        ("shapes", {"count": 0}, "count=0: must be from 1"),
        ("shapes", {"seed": -1}, "seed=-1: must be from 0"),
        ("moving_shapes", {"frames": 0}, "frames=0: must be from 1"),
        ("digits", {"size": 12}, "size=12: must be a multiple of 8"),
        ("digits", {"count": 2000}, "1497 images in split 'train', not 2000"),
        ("tfds:mnistt", {}, r"data\.dataset=mnistt: .* did you mean mnist"),
        ("tfds:someone:mnist", {}, "code from elsewhere, which is not run"),
    ],
)
def test_what_cannot_be_opened_says_why(name, fields, message):
    with pytest.raises((DataError, ConfigError), match=message):
        open_images(name, **fields)


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="is another image set's name"):
        register_images("shapes")(IMAGE_SETS["digits"])


def test_generated_sets_need_no_other_package():
    code = (
        "import sys; from sparsezoo_jax.data.images import open_images; open_images('shapes', count=2);"
        "print([name for name in ('sklearn', 'PIL', 'tensorflow_datasets', 'jax') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def read(split="train", visible=16, **fields):
    config = DataConfig(dataset="digits", batch_size=4, images=ImageDataConfig(**fields))
    return ReadImages(config, split, Patching(8, 1, 2, visible, 10)), config


def test_a_batch_is_a_function_of_its_number_and_a_process_has_its_rows():
    images, config = read(train_count=40)
    whole = image_batches(images, config, 0, 1)
    batches = [next(whole) for _ in range(12)]
    state = whole.get_state()
    later = next(whole)
    whole.set_state(state)
    np.testing.assert_array_equal(next(whole)["tokens"], later["tokens"])
    half = image_batches(images, config, 1, 2)
    for batch in batches[:3]:
        own = next(half)
        for name in batch:
            np.testing.assert_array_equal(own[name], batch[name][2:])
    seen = np.concatenate([batch["tokens"] for batch in batches[:10]])  # an epoch
    assert len({image.tobytes() for image in seen}) == 40
    first = batches[0]
    assert first["tokens"].shape == (4, 16, 4)
    assert first["tokens"].dtype == np.uint8
    np.testing.assert_array_equal(first["mask"].sum(1), 1)
    for image, label in zip(first["tokens"], first["targets"][:, 0], strict=True):
        restored = image.reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8, 1)
        (found,) = np.flatnonzero((images.images == restored).all((1, 2, 3)))
        assert images.labels[found] == label
    whole.close()
    half.close()
    other, _ = read(train_count=41)
    moved = image_batches(other, config, 0, 1)
    with pytest.raises(DataError, match="saved with fingerprint"):
        moved.set_state(state)
    moved.close()


def test_hidden_patches_are_the_targets_and_are_drawn_anew_in_training_only():
    images, config = read(visible=4, train_count=40, validation_count=10)
    batches = image_batches(images, config, 0, 1)
    draws = [next(batches)["mask"] for _ in range(11)]
    batches.close()
    for mask in draws:
        np.testing.assert_array_equal(mask.sum(1), 12)
    assert not np.array_equal(draws[0], draws[10])
    share = np.mean(np.concatenate(draws), 0)
    assert (share > 0.5).all()
    assert (share < 0.95).all()
    validation, _ = read("validation", visible=4, validation_count=10)
    once, again = (list(images_once(validation, 4)) for _ in range(2))
    assert len(once) == 3
    np.testing.assert_array_equal(once[1]["mask"], again[1]["mask"])
    np.testing.assert_array_equal(once[1]["segment_ids"] == 0, once[1]["mask"])
    last = once[-1]  # two images and two rows of nothing
    np.testing.assert_array_equal(last["mask"].sum(1), [12, 12, 0, 0])
    assert not last["segment_ids"][2:].any()


def test_a_share_of_the_labels_is_drawn_anew():
    labels = np.arange(5000, dtype=np.int32) % 10
    noisy = replaced(labels, 0.5, 10, seed=0)
    assert np.mean(noisy != labels) == pytest.approx(0.45, abs=0.02)  # a tenth of the drawn ones is the same
    assert abs(np.corrcoef(replaced(labels, 1.0, 10, seed=0), labels)[0, 1]) < 0.05
    assert (read(label_noise=1.0)[0].labels != read()[0].labels).mean() > 0.8
    np.testing.assert_array_equal(read("validation", label_noise=1.0)[0].labels, read("validation")[0].labels)


@pytest.mark.parametrize(
    ("patching", "message"),
    [
        (Patching(8, 3, 2, 16, 10), "has images of 8x8x1, and the model reads 8x8x3"),
        (Patching(8, 1, 2, 16, 9), "has 10 classes, and the model tells 9 apart"),
    ],
)
def test_images_that_the_model_cannot_read_are_refused(patching, message):
    with pytest.raises(DataError, match=message):
        ReadImages(DataConfig(dataset="digits"), "train", patching)
