"""Flags of the calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsezoo_jax.data.dataset_names import require_corpus
from sparsezoo_jax.errors import require


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """The text that says what maps read."""

    dataset: str | None = None
    """Corpus, named as in --data.dataset of training; none is that of --dataset, or the run's."""
    split: Literal["train", "validation"] = "train"
    """Split of that corpus, read from its beginning."""
    sequences: int = 128
    """Sequences of the run's length; fewer if there are not so many."""

    def __post_init__(self):
        require_corpus("--calibration.dataset", self.dataset)
        require(self.sequences > 0, "--calibration.sequences", self.sequences, "must be above 0")
