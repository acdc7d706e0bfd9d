"""Configuration of an image set, beside the name, splits and order that it shares with corpora."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from sparsezoo_jax.data.images.image_set import MAX_COUNT
from sparsezoo_jax.errors import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageDataConfig:
    """Which images of a set a run reads."""

    train_count: int | None = None
    """Images to train on, the first ones. None: all of a set that has an end, 4,096 of one that is generated."""
    validation_count: int | None = None
    """Images to validate on. None: all of a set that has an end, 1,024 of one that is generated."""
    seed: int = 0
    """Of what is generated, of the split of digits, and of hidden patches and replaced labels."""
    label_noise: float = 0.0
    """Share of the training labels that are replaced, once, by labels drawn at random, which may be the same; 1 leaves
    no relation between images and labels."""

    def __post_init__(self):
        for name in ("train_count", "validation_count"):
            value = getattr(self, name)
            good = value is None or 1 <= value <= MAX_COUNT
            require(good, f"data.images.{name}", value, f"must be from 1 to {MAX_COUNT}, or none")
        require(0 <= self.seed < 2**32, "data.images.seed", self.seed, f"must be from 0 to {2**32 - 1}")
        noise = self.label_noise
        require(0 <= noise <= 1, "data.images.label_noise", noise, "must be from 0 to 1")
