"""The corpus `chess`: games that Stockfish plays, as a TFDS dataset. Importing this module registers it.

Split: game number 19, 39, 59, ... (from 0) and the last game of fewer than 20 are `validation`, all others `train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from sparsezoo_jax import storage
from sparsezoo_jax.data.chess.config import ChessConfig
from sparsezoo_jax.data.chess.generation import generate_games
from sparsezoo_jax.data.chess.pgn import find_games, game_string
from sparsezoo_jax.data.documents import digest

#: One game in so many is held out.
VALIDATION_STRIDE = 20


@dataclasses.dataclass(kw_only=True)
class GamesConfig(tfds.core.BuilderConfig):
    """The games of a `ChessConfig`, kept as PGN in `directory` too."""

    recipe: ChessConfig
    directory: Path


def games_config(config: ChessConfig, directory: Path) -> GamesConfig:
    """The builder's configuration for a recipe; its name tells recipes apart."""
    name = f"{config.games}-games-seed-{config.seed}-{digest(config.recipe)[:8]}"
    return GamesConfig(name=name, recipe=config, directory=directory)


class Chess(tfds.core.GeneratorBasedBuilder):
    """Games as strings with their number."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Every 20th game is held out."}
    builder_config: GamesConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Games of Stockfish against weakened versions of itself.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": tfds.features.Text()}),
            disable_shuffling=True,  # keep the order of numbers
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        config = self.builder_config
        made = generate_games(config.recipe, config.directory / f"{config.name}.pgn")
        return {split: self._generate_examples(made.path, split) for split in ("train", "validation")}

    def _generate_examples(self, path: Path, split: str) -> Iterator[tuple[int, dict[str, object]]]:
        stride = min(VALIDATION_STRIDE, self.builder_config.recipe.games)
        with storage.open_read(path) as file:
            for number, game in enumerate(find_games((line, 0, content) for line, content in enumerate(file, 1))):
                if (number % stride == stride - 1) == (split == "validation"):
                    yield number, {"text": game_string(game.content or b""), "id": str(number)}
