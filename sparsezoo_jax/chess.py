"""Chess games to train on: `python -m sparsezoo_jax.chess generate --games N --seed S --out FILE.pgn`.

Stockfish plays against weaker versions of itself under limits of nodes, so that a seed gives the same games on every
machine with the same release of Stockfish, whatever the number of processes. An interrupted command goes on where it
was. Train on the file with --data.dataset FILE.pgn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic.dataclasses import dataclass

from sparsezoo_jax import cli
from sparsezoo_jax.data.chess.config import ChessConfig
from sparsezoo_jax.errors import STRICT
from sparsezoo_jax.path_flags import Stores


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Chess(ChessConfig):
    """Flags of the command."""

    action: Annotated[Literal["generate"], tyro.conf.Positional]
    """generate: let Stockfish play games into a PGN file."""
    out: Annotated[Path, Stores()]
    """PGN file to write."""

    def config(self) -> ChessConfig:
        return ChessConfig(**{name: getattr(self, name) for name in ChessConfig.__dataclass_fields__})


def main(args: Sequence[str]) -> None:
    """Generate, and print what was made."""
    command = cli.parse(Chess, args, prog="chess", description=(__doc__ or "").strip())
    from sparsezoo_jax.data.chess.generation import generate_games

    made = generate_games(command.config(), command.out)
    print(f"{made.path}: {made.games:,} games, {made.played:,} of them played now in {made.seconds:.1f} s")


if __name__ == "__main__":
    cli.run(main)
