"""Games in PGN files as strings such as `;1.e4 e5 2.Nf3`: moves alone, without tags, comments, variations and results.

The moves are read, not played: their notation is checked and brought to one spelling, their legality is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sparsezoo_jax.errors import DataError

#: The characters of game strings; a character's token is its place (Karvonen et al., arXiv 2408.00113).
CHARACTERS = " #+-.0123456789;=BKNOQRabcdefghx"
#: Begins every game string.
START = ";"

_TAG = re.compile(rb'\s*\[(\w+)\s+"')
_TAG_LINE = re.compile(r'\s*\[\w+\s+".*')
_VARIANT = re.compile(rb'\s*\[Variant\s+"(?!Standard"|From Position")', re.IGNORECASE)
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<skip>\{[^}]*\} | ;[^\n]* | \$\d+ | [!?]+ | e\.p\. | \d+(?:\s*\.[.\s]*|(?=\s)) )
    | (?P<open>\() | (?P<close>\))
    | (?P<result>1-0|0-1|1/2-1/2|\*)(?![-\w])
    | (?P<move>[A-Za-z0][^\s(){};$!?.]*)
    )""",
    re.VERBOSE,
)
_SAN = re.compile(
    r"""(?:
      (?P<body>[KQRBN][a-h]?[1-8]?x?[a-h][1-8] | (?:[a-h]x)?[a-h][2-7])
    | (?P<last_rank>(?:[a-h]x)?[a-h][18])=?(?P<promotion>[QRBN])
    | (?P<castling>[O0]-[O0](?:-[O0])?)
    )(?P<check>\+{1,2}|\#)?""",
    re.VERBOSE,
)


class Place(NamedTuple):
    """Where a game is in its file."""

    start: int
    """Byte offset."""
    size: int
    """Bytes."""
    line: int
    """Line of its first tag, from 1."""


def find_games(lines: Iterable[bytes]) -> Iterator[Place]:
    """The games in a PGN file, given its lines; those from another starting position or of a variant are left out."""
    start = offset = 0
    first = 1
    begun, in_tags, standard = False, False, True
    for number, line in enumerate(lines, 1):
        tag = _TAG.match(line)
        if tag is not None:
            if not in_tags:
                if begun and standard:
                    yield Place(start, offset - start, first)
                start, first, begun, in_tags, standard = offset, number, True, True, True
            if tag[1] == b"FEN" or _VARIANT.match(line):
                standard = False
        elif line.strip():
            in_tags = False
            if not begun:
                start, first, begun = offset, number, True
        offset += len(line)
    if begun and standard:
        yield Place(start, offset - start, first)


def game_string(pgn: str, where: str) -> str:
    """One game's PGN as a game string: move numbers joined to White's moves, one space elsewhere; "" without moves.

    Args:
      pgn: tags and moves of one game.
      where: names the game in errors.

    Raises:
      DataError: something that is no move, an open comment or variation, or a second game without tags.
    """
    lines = [line for line in pgn.splitlines() if not line.startswith("%")]
    begin = next((i for i, line in enumerate(lines) if line.strip() and not _TAG_LINE.fullmatch(line)), len(lines))
    moves = list(_moves("\n".join(lines[begin:]), where))
    return to_string(moves)


def to_string(moves: Iterable[str]) -> str:
    """Moves in standard algebraic notation as a game string; "" without any."""
    moves = list(moves)
    turns = (f"{i // 2 + 1}.{' '.join(moves[i : i + 2])}" for i in range(0, len(moves), 2))
    return START + " ".join(turns) if moves else ""


def moves_of(game: str) -> list[str]:
    """The moves of a game string, a last one that is cut off included, a number that is cut off not."""
    words = (word.rpartition(".")[2] for word in game.removeprefix(START).split(" "))
    return [word for word in words if word and not word.isdigit()]


def _moves(text: str, where: str) -> Iterator[str]:
    depth = position = 0
    ended = False
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise DataError(f"{where}: {_excerpt(text[position:])} is no move in algebraic notation")
        position = match.end()
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
            if depth < 0:
                raise DataError(f"{where}: a ')' without a '('")
        elif match["result"] and depth == 0:
            ended = True
        elif match["move"] and depth == 0:
            if ended:
                raise DataError(f"{where}: moves after the result; games need tags between them")
            yield _normal(match["move"], where)
    if depth:
        raise DataError(f"{where}: a '(' without a ')'")


def _normal(move: str, where: str) -> str:
    match = _SAN.fullmatch(move)
    if match is None:
        raise DataError(f"{where}: {_excerpt(move)} is no move in algebraic notation")
    check = (match["check"] or "").replace("++", "+")
    if match["castling"]:
        return match["castling"].replace("0", "O") + check
    return (match["body"] or f"{match['last_rank']}={match['promotion']}") + check


def _excerpt(text: str) -> str:
    word = text.split(maxsplit=1)[0]
    return repr(word if len(word) <= 20 else f"{word[:20]}...")
