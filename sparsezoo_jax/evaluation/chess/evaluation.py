"""Score features: largest activations, levels at the dots of games, coverage and reconstruction of each set."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsezoo_jax.data import DataConfig, Tokenizer, local_cache, open_documents
from sparsezoo_jax.data.documents import read_all
from sparsezoo_jax.data.skipping import Skips, accepted
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation.chess.positions import LENGTH, STATES, Games, choose_games
from sparsezoo_jax.evaluation.chess.scores import (
    Coverage,
    Reconstruction,
    coverage,
    fit,
    levels_of,
    reconstruct,
    reconstruction,
)
from sparsezoo_jax.evaluation.features import Features

#: Games whose activations, at all characters, give the largest of each feature: about 128,000 characters.
MAXIMUM_GAMES = 500


@dataclass(frozen=True)
class SetScores:
    """The scores of one set of properties."""

    coverage: Coverage
    reconstruction: Reconstruction
    possible: float
    """Coverage of perfect classifiers of what occurs in the games to learn from."""


@dataclass(frozen=True)
class ChessScores:
    """What features say about the board."""

    train_games: int
    test_games: int
    features: int
    alive: int
    """Features that are not 0 somewhere in the games that their largest activations are taken from."""
    l0: float
    """Non-zero features of a state of the test games, on average."""
    sets: dict[str, SetScores]

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return dataclasses.asdict(self)


def games_for(config: DataConfig, sources: Sequence[str], count: int) -> tuple[Games, Games]:
    """Games to learn from and as many others to test on.

    Args:
      config: a run's data; its validation split is read unless `sources` are given.
      sources: PGN files, directories or globs, read whole.
      count: of each.

    Raises:
      DataError: too few games that are long enough, or files that can't be read.
    """
    if sources:
        configs = [dataclasses.replace(config, dataset=name, mixture=None, validation_fraction=0.0) for name in sources]
        documents = [open_documents(source, "train") for source in configs]
        name = ", ".join(sources)
    else:
        documents, name = [open_documents(config, "validation")], "the run's validation split"
    skips = Skips.of(config)
    items = itertools.chain.from_iterable(map(read_all, documents))
    chosen = choose_games((document.text for document in accepted(items, skips)), 2 * count)
    skips.warn("chess.games")
    if len(chosen) < 2 * count:
        raise DataError(
            f"chess.count={count}: needs twice as many different games of {STATES} moves and more, {name} has "
            f"{len(chosen)}; give other chess.games, or a chess.count of at most {len(chosen) // 2}"
        )
    cache = local_cache(config)
    return Games(chosen[:count], cache), Games(chosen[count:], cache)


def score_features(
    features: Features,
    tokenizer: Tokenizer,
    train: Games,
    test: Games,
    *,
    properties: Sequence[str] = ("board",),
    batch_size: int = 8,
) -> ChessScores:
    """Coverage and reconstruction of sets of properties.

    Besides one batch of activations only their levels are kept, one byte for each feature and state.

    Args:
      features: what is scored.
      tokenizer: one token a character.
      train: games to find out on what features stand for; the largest activations are taken from the first 500.
      test: games to restore the board of.
      properties: names of sets, see `ChessEvaluation.properties`.
      batch_size: games of a call of `features`.

    Raises:
      DataError: another kind of tokenizer, or no feature that is ever active.
    """
    tokens = {name: _tokens(games, tokenizer) for name, games in (("train", train), ("test", test))}
    largest = _largest(features, tokens["train"][:MAXIMUM_GAMES], batch_size)
    alive = np.flatnonzero(largest > 0)
    if not len(alive):
        raise DataError("no feature of this layer is ever active")
    levels, l0 = {}, 0.0
    for name, games in (("train", train), ("test", test)):
        levels[name] = np.zeros((STATES * len(games), len(alive)), np.uint8)
        active = 0
        for start, states_SF in _states(features, tokens[name], games.places(), batch_size):
            active += np.count_nonzero(states_SF)
            found = levels_of(states_SF[:, alive], largest[alive])
            levels[name][start : start + len(found)] = found
        l0 = active / (STATES * len(games))
    sets = {}
    for name in properties:
        learn, new = train.properties(name), test.properties(name)
        fitted = fit(levels["train"], learn.labels_SG)
        predicted = reconstruct(levels["test"], fitted)
        possible = float(learn.labels_SG.any(axis=0) @ learn.weights())
        sets[name] = SetScores(coverage(fitted, learn.weights()), reconstruction(predicted, new, fitted), possible)
    return ChessScores(len(train), len(test), len(largest), len(alive), float(l0), sets)


def _tokens(games: Games, tokenizer: Tokenizer) -> list[list[int]]:
    tokens = tokenizer.encode_batch(games.texts)
    for ids, text in zip(tokens, games.texts, strict=True):
        if len(ids) != len(text):
            raise DataError("the tokenizer is not one of chess games: it has not one token for each character")
    return tokens


def _batches(tokens: Sequence[list[int]], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Token and segment ids [B, 256], all of one shape, and how many rows are games."""
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        ids, segments = np.zeros((2, batch_size, LENGTH), np.int32)
        for row, game in enumerate(part):
            ids[row, : len(game)], segments[row, : len(game)] = game, 1
        yield ids, segments, len(part)


def _largest(features: Features, tokens: Sequence[list[int]], batch_size: int) -> np.ndarray:
    """The largest magnitude of each feature over all characters."""
    largest: Any = 0.0
    for ids, segments, _ in _batches(tokens, batch_size):
        activations = np.abs(np.asarray(features(ids, segments)))
        largest = np.maximum(largest, activations.max(axis=(0, 1), where=segments[..., None] > 0, initial=0))
    return largest


def _states(
    features: Features, tokens: Sequence[list[int]], dots_NP: np.ndarray, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Activations [S', F] at the dots of some games, and the index of the first of these states."""
    start = 0
    for ids, segments, count in _batches(tokens, batch_size):
        activations = np.asarray(features(ids, segments))
        places = dots_NP[start : start + count]
        states = np.take_along_axis(activations[:count], places[..., None], axis=1)
        yield start * STATES, states.reshape(count * STATES, -1)
        start += count
