"""Image sets of the TFDS catalogue, as arrays in memory.

Shapes: N images, H rows, W columns, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.images.image_set import MAX_COUNT, ImageSet, Wanted
from sparsezoo_jax.data.tfds_source import open_split, prepared_builder
from sparsezoo_jax.errors import DataError

#: TFDS's collections of images with class labels.
_COLLECTIONS = ("image_classification", "image")


def open_tfds_images(name: str, wanted: Wanted) -> ImageSet:
    """The images of a TFDS set with a class label, cut to their middle square and scaled to `wanted.size`.

    Raises:
      DataError: there is no such set or split, it can't be prepared here, has no image with a class label, fewer
        images, or images of several sizes where `wanted.size` is None; or Pillow is not installed.
      StorageError: writing fails.
    """
    shown = f"data.dataset=tfds:{name}"
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{shown}: needs Pillow: pip install 'sparsezoo-jax[images]'") from error

    builder = prepared_builder(DataConfig(tfds_data_dir=wanted.tfds_data_dir), name, _COLLECTIONS)
    image, label, classes = _features(builder.info.features, shown)
    source = open_split(builder, name, wanted.split)
    count = len(source) if wanted.count is None else wanted.count
    if not 1 <= count <= min(len(source), MAX_COUNT):
        raise DataError(f"{shown}: {len(source)} images in split '{wanted.split}', not {count}")
    images, labels = [], np.empty(count, np.int32)
    for n in range(count):
        example = source[n]
        images.append(_square(np.asarray(example[image]), wanted.size, Image))
        labels[n] = example[label]
        if images[n].shape != images[0].shape:
            sizes = " and ".join("x".join(map(str, found.shape[:2])) for found in (images[0], images[n]))
            raise DataError(f"{shown}: has images of {sizes} pixels; give a size")
    return ImageSet(np.stack(images), labels, classes)


def _features(features: Any, shown: str) -> tuple[str, str, tuple[str, ...]]:
    """The names of the first image and the first class label, and the names of the classes."""
    import tensorflow_datasets as tfds

    found = dict(features or {})
    images = [name for name, feature in found.items() if isinstance(feature, tfds.features.Image)]
    labels = [name for name, feature in found.items() if isinstance(feature, tfds.features.ClassLabel)]
    if not images or not labels:
        raise DataError(f"{shown}: has no image with a class label; its fields are {', '.join(found)}")
    if (kind := np.dtype(found[images[0]].np_dtype)) != np.uint8:
        raise DataError(f"{shown}: has images of {kind} numbers, not of bytes")
    return images[0], labels[0], tuple(found[labels[0]].names)


def _square(image_HWC: np.ndarray, size: int | None, library: Any) -> np.ndarray:
    side = min(image_HWC.shape[:2])
    top, left = ((length - side) // 2 for length in image_HWC.shape[:2])
    image_HWC = image_HWC[top : top + side, left : left + side]
    if size is None or size == side:
        return image_HWC
    channels = [
        np.asarray(library.fromarray(image_HWC[..., c]).resize((size, size), library.Resampling.BILINEAR))
        for c in range(image_HWC.shape[2])
    ]
    return np.stack(channels, axis=-1)
