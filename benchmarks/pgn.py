"""The reader of PGN files beside python-chess: games a second, and what each makes of odd games.

    python -m benchmarks.pgn [FILE.pgn]

Without a file, games of the tests are read, repeated, and annotated as in the dumps of Lichess. python-chess plays the
moves on a board, which checks that they are legal; this package's reader looks at their notation alone.
"""

from __future__ import annotations

import argparse
import io
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import chess.pgn

from sparsezoo_jax.data.chess.pgn import GameError, find_games, game_string

GAMES = Path(__file__).parents[1] / "tests" / "data" / "games.pgn"
_START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR"

#: Name -> bytes of a game, and its moves; "" where it has to be left out.
ODD = {
    "Latin-1 in a tag": (b'[White "Zo\xeb"]\n\n1. e4 e5 *\n', ";1.e4 e5"),
    "Latin-1 in a comment": (b"1. e4 {caf\xe9} e5 *\n", ";1.e4 e5"),
    "a tag without a value": (b'[Event "x"]\n[White ]\n[Black "y"]\n\n1. e4 e5 *\n', ";1.e4 e5"),
    "a null move in a variation": (b"1. e4 (1. d4 -- 2. c4) e5 *\n", ";1.e4 e5"),
    "no moves in a variation": (b"1. e4 (what if 1. Qxh9?) e5 *\n", ";1.e4 e5"),
    "a bracket in a comment in a variation": (b"1. e4 (1. d4 {)} d5) e5 *\n", ";1.e4 e5"),
    "a comment over blank lines": (b"1. e4 {a\n\nb} e5 *\n", ";1.e4 e5"),
    "a blank line between moves": (b"1. e4 e5\n\n2. d4 *\n", ";1.e4 e5 2.d4"),
    "the standard position as FEN": (b'[FEN "%b w KQkq - 0 1"]\n\n1. e4 e5 *\n' % _START.encode(), ";1.e4 e5"),
    "zeros for castling": (b"1. e4 e5 2. Nf3 Nc6 3. Bc4 Bc5 4. 0-0 *\n", ";1.e4 e5 2.Nf3 Nc6 3.Bc4 Bc5 4.O-O"),
    "signs of evaluation": (b"1. e4 += e5 +/- *\n", ";1.e4 e5"),
    "squares on both ends": (b"1. e2-e4 e7e5 *\n", ";1.e4 e5"),
    "a null move": (b"1. e4 -- *\n", ""),
    "another position": (b'[FEN "4k3/8/8/8/8/8/4P3/4K3 w - - 0 1"]\n\n1. e4 *\n', ""),
    "Chess960": (b'[Variant "Chess960"]\n[FEN "%b w KQkq - 0 1"]\n\n1. e4 *\n' % _START.encode(), ""),
    "no notation": (b"1. e4 Ke9 *\n", ""),
    "an illegal move": (b"1. e4 e5 2. Ke3 *\n", ""),
    "an open comment": (b"1. e4 {e5 2. d4 *\n", ""),
}


def ours(content: bytes) -> Iterator[str]:
    """Game strings of a PGN file as this package reads it; "" for a game that is skipped."""
    for game in find_games((number, 0, line) for number, line in enumerate(io.BytesIO(content), 1)):
        try:
            yield "" if game.left_out or game.content is None else game_string(game.content)
        except GameError:
            yield ""


def theirs(content: bytes) -> Iterator[str]:
    """The same by python-chess; "" for a game with errors, from another position or of a variant."""
    stream = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", "surrogateescape")
    while (game := chess.pgn.read_game(stream)) is not None:
        board = game.board()
        usual = not board.chess960 and board.fen() == chess.STARTING_FEN
        if game.errors or not usual or not all(game.mainline_moves()):
            yield ""
        else:
            yield (";" + board.variation_san(game.mainline_moves()).replace(". ", ".")).removesuffix(";")


def annotated(content: str) -> str:
    """Games with evaluations and clocks behind each move."""
    return re.sub(r"(?<= )([KQRBNa-hO][^ .\]\"]+)(?= )", r"\1 { [%eval 0.17] [%clk 0:03:00] }", content)


def rate(read, content: bytes) -> float:
    """Games a second: the best of three passes."""
    best = 0.0
    for _ in range(3):
        started = time.process_time()
        count = sum(1 for _ in read(content))
        best = max(best, count / (time.process_time() - started))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    options = parser.parse_args()
    logging.getLogger("chess.pgn").setLevel(logging.CRITICAL)
    plain = (options.file or GAMES).read_bytes()
    files = {"file" if options.file else "plain": plain}
    if options.file is None:
        files |= {"annotated": annotated(plain.decode()).encode()}
    print("| games a second | here | python-chess |\n|---|---|---|")
    for name, content in files.items():
        print(f"| {name}, {len(content) / sum(1 for _ in ours(content)):,.0f} bytes a game | ", end="")
        print(f"{rate(ours, content):,.0f} | {rate(theirs, content):,.0f} |")
        same = list(ours(content)) == list(theirs(content))
        print(f"|   same games | {'yes' if same else 'NO'} | |")
    print("\n| odd game | here | python-chess |\n|---|---|---|")
    for name, (content, expected) in ODD.items():
        cells = []
        for read in (ours, theirs):
            found = list(read(content))
            cells.append("right" if found == [expected] else f"{found}")
        print(f"| {name} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
