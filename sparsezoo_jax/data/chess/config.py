"""How the games of the corpus `chess` are made."""

from __future__ import annotations

from typing import Annotated

from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.storage import require_place
from sparsezoo_jax.untrusted import Local


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChessConfig:
    """Games that Stockfish plays against weakened versions of itself (Karvonen's chess_gpt_eval).

    A game depends on its number and on the fields `seed`, `nodes`, `opening_probability` and `max_moves` alone, given
    the release of Stockfish.
    """

    games: int = 2000
    """Games to play."""
    seed: int = 0
    """Seed of the games."""
    nodes: int = 200
    """Positions that Stockfish searches for a move; each move takes up to 1.4 times more or fewer."""
    opening_probability: float = 0.3
    """Share of games that begin with a line of the opening book."""
    max_moves: int = 200
    """Moves of each side after which a game ends unfinished."""
    stockfish: Annotated[str | None, Local()] = None
    """Program of Stockfish; none looks for `stockfish` on PATH and in /usr/games."""
    processes: int | None = None
    """Processes that play; none takes all cores. The games are the same."""

    def __post_init__(self):
        require_place("data.chess.stockfish", self.stockfish)
        require(self.games >= 2, "data.chess.games", self.games, "must be at least 2")
        require(0 <= self.seed < 2**32, "data.chess.seed", self.seed, f"must be from 0 to {2**32 - 1}")
        require(1 <= self.nodes <= 10**9, "data.chess.nodes", self.nodes, f"must be from 1 to {10**9}")
        require(
            0 <= self.opening_probability <= 1,
            "data.chess.opening_probability",
            self.opening_probability,
            "must be from 0 to 1",
        )
        require(self.max_moves >= 1, "data.chess.max_moves", self.max_moves, "must be at least 1")
        require(
            self.processes is None or 1 <= self.processes <= 1024,
            "data.chess.processes",
            self.processes,
            "must be from 1 to 1024, or none",
        )

    @property
    def recipe(self) -> str:
        """What the games depend on, besides the engine."""
        return (
            f"seed {self.seed}, {self.nodes} nodes, openings {self.opening_probability:g}, "
            f"at most {self.max_moves} moves, recipe {RECIPE}"
        )


#: Changes whenever the same settings would give other games.
RECIPE = 1
