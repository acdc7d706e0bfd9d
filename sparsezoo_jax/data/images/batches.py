"""Batches of images, in the form of those of text: a patch is a token.

Shapes: N images, B of a batch, T patches of an image, P numbers of a patch, H rows, W columns, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from sparsezoo_jax.data.batches import Batch, endless_order, rows_of_process
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.documents import Split, digest
from sparsezoo_jax.data.images.image_set import ImageSet, open_images
from sparsezoo_jax.data.pipeline import NumberedBatches
from sparsezoo_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Patching:
    """How a model reads images."""

    size: int
    """Pixels of a side."""
    channels: int
    patch: int
    """Pixels of a patch's side."""
    visible: int
    """Patches that are seen; the others are to be predicted. All: the class is."""
    classes: int
    """Classes that the model tells apart."""

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2


def patches_of(images_NHWC: np.ndarray, patch: int) -> np.ndarray:
    """Patches [N, T, P] in the order of rows; a patch has its rows one after another, pixel by pixel."""
    n, height, width, channels = images_NHWC.shape
    split = images_NHWC.reshape(n, height // patch, patch, width // patch, patch, channels)
    return split.swapaxes(2, 3).reshape(n, -1, patch * patch * channels)


class ReadImages:
    """The images of a split, as a model reads them.

    Raises:
      DataError: there is no such set, or its images or classes are not those of the model.
    """

    def __init__(self, config: DataConfig, split: Split, patching: Patching):
        name, own = config.dataset or "", config.images
        self.seed, self.patching = own.seed, patching
        count = own.train_count if split == "train" else own.validation_count
        found = open_images(
            name,
            (config.train_split if split == "train" else config.validation_split),
            count=count,
            size=patching.size,
            seed=own.seed,
            tfds_data_dir=config.tfds_data_dir,
        )
        _check(name, found, patching)
        self.images, self.labels, self.classes = found
        if split == "train" and own.label_noise > 0:
            self.labels = replaced(self.labels, own.label_noise, len(self.classes), own.seed)
        self.fingerprint = digest("images", split, self.images.tobytes(), self.labels.tobytes(), own.seed)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], draws: np.random.Generator, rows: int | None = None) -> Batch:
        """These images as a batch; rows beyond them, up to `rows`, are empty.

        `tokens` are uint8 [B, T, P]; the other arrays are those of a `Batch`, [B, T]. The target of every patch is the
        image's class, which counts once, at the first patch. Where patches are to be predicted, `draws` choose those:
        their segment is 0 and they, not the class, count.
        """
        patches, count = self.patching.patches, len(indices)
        total = count if rows is None else rows
        pixels = patches_of(self.images[:1], self.patching.patch).shape[-1]
        tokens = np.zeros((total, patches, pixels), np.uint8)
        targets, segment_ids = (np.zeros((total, patches), np.int32) for _ in range(2))
        mask = np.zeros((total, patches), bool)
        if count:
            tokens[:count] = patches_of(self.images[list(indices)], self.patching.patch)
            targets[:count] = self.labels[list(indices), None]
            segment_ids[:count] = 1
            mask[:count, 0] = True
        if self.patching.visible < patches:
            hidden = draws.random((total, patches)).argsort(axis=1).argsort(axis=1) >= self.patching.visible
            mask = hidden & (segment_ids > 0)
            segment_ids[hidden] = 0
        positions = np.broadcast_to(np.arange(patches, dtype=np.int32), (total, patches)).copy()
        return Batch(tokens=tokens, targets=targets, segment_ids=segment_ids, positions=positions, mask=mask)


def replaced(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """Labels of which a share is replaced by others drawn with equal probabilities, which may be the same."""
    draw = np.random.default_rng((seed, 1))
    drawn = draw.integers(0, classes, labels.shape, labels.dtype)
    return np.where(draw.random(labels.shape) < share, drawn, labels)


def _check(name: str, found: ImageSet, patching: Patching) -> None:
    shape, wanted = found.images.shape[1:], (patching.size, patching.size, patching.channels)
    if shape != wanted:
        there, here = ("x".join(map(str, of)) for of in (shape, wanted))
        raise DataError(
            f"data.dataset={name}: has images of {there}, and the model reads {here} (model.images.size, .channels)"
        )
    if len(found.classes) > patching.classes:
        raise DataError(
            f"data.dataset={name}: has {len(found.classes)} classes, and the model tells {patching.classes} apart "
            "(model.vocab_size)"
        )


class ImageBatches(NumberedBatches):
    """Training batches without end, every epoch in another order; see `NumberedBatches`.

    Batch n is a function of the images, the seeds and n. Its state is `fingerprint`, `seed`, `batch_size`, `visible`
    and `next_batch`.
    """

    def __init__(self, images: ReadImages, *, batch_size: int, seed: int, rows: range, prefetch: int = 2):
        self._images, self._batch_size, self._rows, self._seed = images, batch_size, rows, seed
        self._order = endless_order(len(images), seed)
        identity = {
            "fingerprint": images.fingerprint,
            "seed": seed,
            "batch_size": batch_size,
            "visible": images.patching.visible,
        }
        super().__init__(identity, math.inf, 0, prefetch)

    def batch_at(self, n: int) -> Batch:
        """Batch n of the run (this process's rows)."""
        first = n * self._batch_size
        # Every process hides patches of its own rows, so that a batch does not depend on how many there are.
        whole = self._images.batch(
            [self._order(first + row) for row in range(self._batch_size)],
            np.random.default_rng((self._images.seed, 2, n)),
        )
        own = slice(self._rows.start, self._rows.stop)
        return Batch(
            tokens=whole["tokens"][own],
            targets=whole["targets"][own],
            segment_ids=whole["segment_ids"][own],
            positions=whole["positions"][own],
            mask=whole["mask"][own],
        )

    def close(self) -> None:
        """Stops the background thread."""
        self._prefetcher.close()


def image_batches(images: ReadImages, config: DataConfig, process_index: int, process_count: int) -> ImageBatches:
    """The training batches of a run: of process p of P the rows p B / P to (p + 1) B / P."""
    rows = rows_of_process(config.batch_size, process_index, process_count)
    return ImageBatches(images, batch_size=config.batch_size, seed=config.seed, rows=rows, prefetch=config.prefetch)


def images_once(images: ReadImages, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """All images once, in order, the same patches of each hidden every time; the last batch is filled up."""
    count = -(-len(images) // batch_size)
    for n in range(count if max_batches is None else min(count, max_batches)):
        indices = range(n * batch_size, min((n + 1) * batch_size, len(images)))
        yield images.batch(indices, np.random.default_rng((images.seed, 3, n)), rows=batch_size)
