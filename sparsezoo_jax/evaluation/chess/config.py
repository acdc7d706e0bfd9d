"""What chess interpretability is measured on."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax.data.dataset_names import require_corpus
from sparsezoo_jax.errors import STRICT, require

PropertySet = Literal["board", "board_unmasked", "strategy"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChessEvaluation:
    """Which features are scored, on which games and board-state properties."""

    layer: int | None = None
    """Layer whose FFN features are scored, from 1; none is the one at three quarters of the depth."""
    games: tuple[str, ...] = ()
    """PGN files (or directories, globs) with games to score on; none takes the run's validation split."""
    count: int = 1000
    """Games to find the features' meaning on, and as many other games to test it on."""
    properties: tuple[PropertySet, ...] = ("board",)
    """board: the pieces on squares that differ from the initial position; board_unmasked: all pieces; strategy:
    fourteen concepts such as pins and forks."""
    random_weights: bool = False
    """Score a model of the same shape with random weights instead: the floor."""
    seed: int = 0
    """Seed of those weights."""
    batch_size: int = 8
    """Games that the model reads at a time."""

    def __post_init__(self):
        for name in self.games:
            require_corpus("chess.games", name)
        require(self.layer is None or self.layer >= 1, "chess.layer", self.layer, "must be at least 1")
        require(self.count >= 1, "chess.count", self.count, "must be at least 1")
        require(bool(self.properties), "chess.properties", "", "must name at least one set")
        require(0 <= self.seed < 2**32, "chess.seed", self.seed, f"must be from 0 to {2**32 - 1}")
        require(self.batch_size >= 1, "chess.batch_size", self.batch_size, "must be at least 1")
