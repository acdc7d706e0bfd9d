"""scikit-learn's digits: 1,797 handwritten ones of 8 x 8 pixels, which come with the package."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsezoo_jax.data.images.image_set import ImageSet, Wanted, first, register_images
from sparsezoo_jax.errors import ConfigError, DataError

_SIDE, _LEVELS = 8, 16
#: Every sixth digit, after they are shuffled, is kept for validation.
_HELD_OUT = 6


@register_images("digits")
def digits(wanted: Wanted) -> ImageSet:
    """1,497 digits for training and 300 for validation, with one channel of 17 levels of grey.

    A larger `size` repeats pixels; it must be a multiple of 8.

    Raises:
      DataError: scikit-learn is not installed, or there are fewer digits.
      ConfigError: `size` is no multiple of 8.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data.dataset=digits: needs scikit-learn: pip install 'sparsezoo-jax[images]'") from error
    size = wanted.size or _SIDE
    if size % _SIDE:
        raise ConfigError("size", size, f"must be a multiple of {_SIDE}, the pixels of a digit's side")
    loaded: Any = load_digits()
    pixels, labels = loaded["data"], loaded["target"]
    order = np.random.default_rng(wanted.seed).permutation(len(labels))
    held_out = np.arange(len(labels)) % _HELD_OUT == 0
    order = order[held_out if wanted.split == "validation" else ~held_out]
    images = np.rint(pixels[order] * (255 / _LEVELS)).astype(np.uint8).reshape(-1, _SIDE, _SIDE, 1)
    images = images.repeat(size // _SIDE, 1).repeat(size // _SIDE, 2)
    found = ImageSet(images, labels[order].astype(np.int32), tuple(str(digit) for digit in range(10)))
    return first(found, "digits", wanted)
