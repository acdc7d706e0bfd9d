"""Games in PGN files as strings such as `;1.e4 e5 2.Nf3`: moves alone, without tags, comments, variations and results.

The moves are read, not played: their notation is checked and brought to one spelling, their legality is not. Only the
tags FEN and Variant are looked at, and only a move has to be ASCII, so tags and comments may be in any encoding.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sparsezoo_jax.errors import DataError

#: The characters of game strings; a character's token is its place (Karvonen et al., arXiv 2408.00113).
CHARACTERS = " #+-.0123456789;=BKNOQRabcdefghx"
#: Begins every game string.
START = ";"
#: Bytes of one game in its file, annotations included; what is longer has no tags where games should begin.
MAX_GAME_BYTES = 1 << 24

# Why a game has no string.
NOT_CHESS = "not chess notation"
OTHER_START = "a game from another starting position"
VARIANT = "a game of a variant of chess"
NULL_MOVE = "a game with a null move"

_TAG = re.compile(rb'\s*\[(\w+)\s+"([^"\r\n]*)')
_STANDARD = b"rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq -"
_USUAL = (b"standard", b"chess", b"normal", b"classical", b"from position", b"")

_COMMENT = rb"\{[^}]*\} | ;[^\n]* | (?<![^\n])%[^\n]*"
_TOKEN = re.compile(
    rb"""\s*+(?:
      (?P<null>--|Z0|0000|@@@@)(?![-\w@])
    | (?P<skip>"""
    + _COMMENT
    + rb""" | \$\d+ | [!?]+ | e\.p\. | \d+(?:\s*\.[.\s]*|(?=\s)) | (?:\+/?[-=]|[-=]/?\+|=)(?=[\s)]|\Z) )
    | (?P<open>\()
    | (?P<result>1-0|0-1|1/2(?:-1/2)?|\*)(?![-\w])
    | (?P<move>[A-Za-z0][^\s(){};$!?.]*)
    )""",
    re.VERBOSE,
)
_BRACES = re.compile(rb"\{[^}]*\}")
_RESULTS = frozenset((b"1-0", b"0-1", b"1/2", b"1/2-1/2", b"*"))
_TAGS = re.compile(rb"(?:\s*+(?:\[|(?<![^\n])%)[^\n]*+)*+")
# What variations are made of: all but their brackets and comments is passed over.
_VARIATION = re.compile(rb"(?:[^(){};%]++|(?<=[^\n])%|" + _COMMENT.replace(b" ", b"") + rb")*+([()])?")
_SAN = re.compile(
    r"""(?:
      (?P<body>[KQRBN][a-h]?[1-8]?x?[a-h][1-8] | (?:[a-h]x)?[a-h][2-7])
    | (?P<last_rank>(?:[a-h]x)?[a-h][18])=?(?P<promotion>[QRBNqrbn])
    | (?P<castling>[O0]-[O0](?:-[O0])?)
    )(?P<check>\+{1,2}|\#)?""",
    re.VERBOSE,
)


class Game(NamedTuple):
    """One game in its file."""

    start: int
    """Byte offset."""
    line: int
    """Line of its first tag, from 1."""
    content: bytes | None
    """Its tags and moves; None if it is longer than `MAX_GAME_BYTES`."""
    left_out: str | None
    """Why it has no game string, if its tags say so."""


class GameError(DataError):
    """A game that has no game string.

    Attributes:
      line: lines between the first one of the game and that of the fault.
      reason: NOT_CHESS or NULL_MOVE.
    """

    def __init__(self, content: bytes, position: int, reason: str, detail: str):
        self.line, self.reason = content.count(b"\n", 0, position), reason
        super().__init__(detail)


def follows_tags(lines_before: Iterable[bytes]) -> bool | None:
    """Whether a line would go on with the tags of a game, given the lines before it, the last one first; None if they
    don't tell.
    """
    for line in lines_before:
        if _TAG.match(line):
            return True
        if not _is_neutral(line):
            return False
    return None


def _is_neutral(line: bytes) -> bool:
    """Whether a line changes nothing: blank, escaped, or what looks like a tag and is none."""
    line = line.lstrip() if not line.startswith(b"%") else line
    return not line or line[:1] in (b"[", b"%")


def find_games(
    lines: Iterable[tuple[int, int, bytes | None]],
    *,
    begun: bool = False,
    in_tags: bool = False,
    end: int | None = None,
) -> Iterator[Game]:
    """The games that begin in some lines of a PGN file.

    Args:
      lines: number, offset and content of each; None for one that is too long to be kept. Those after `end` are read as
        far as the last game goes.
      begun: the lines begin within a game that is none of theirs.
      in_tags: and that within its tags.
      end: offset before which games begin; None: all do.
    """
    game: list[bytes] | None = [] if begun else None
    ours = not begun
    first = start = size = 0
    left_out = None
    for number, offset, line in lines:
        tag = _TAG.match(line) if line is not None else None
        neutral = tag is None and line is not None and _is_neutral(line)
        if tag is not None and not in_tags:
            if game is not None and ours:
                yield Game(start, first, b"".join(game) if size <= MAX_GAME_BYTES else None, left_out)
            game, ours = None, True
        if end is not None and offset >= end and (game is None or not ours):
            return
        if game is None:
            if neutral:
                continue
            game, first, start, size, left_out = [], number, offset, 0, None
        if tag is not None:
            in_tags, left_out = True, left_out or _left_out(tag[1], tag[2])
        elif not neutral:
            in_tags = False
        size += MAX_GAME_BYTES + 1 if line is None else len(line)
        if line is None or size > MAX_GAME_BYTES or not ours:
            game.clear()
        else:
            game.append(line)
    if game is not None and ours:
        yield Game(start, first, b"".join(game) if size <= MAX_GAME_BYTES else None, left_out)


def _left_out(tag: bytes, value: bytes) -> str | None:
    if tag == b"FEN" and value.split()[:4] != _STANDARD.split():
        return OTHER_START
    if tag.lower() == b"variant" and value.strip().lower() not in _USUAL:
        return VARIANT
    return None


def game_string(content: bytes) -> str:
    """One game's PGN as a game string: move numbers joined to White's moves, one space elsewhere; "" without moves.

    Raises:
      GameError: something that is no move, a null move, an open comment or variation, or a second game without tags.
    """
    tags = _TAGS.match(content)
    begin = tags.end() if tags is not None else 0
    moves = _plain_moves(content[begin:])
    return to_string(_moves(content, begin) if moves is None else moves)


def to_string(moves: Iterable[str]) -> str:
    """Moves in standard algebraic notation as a game string; "" without any."""
    moves = list(moves)
    turns = (f"{i // 2 + 1}.{' '.join(moves[i : i + 2])}" for i in range(0, len(moves), 2))
    return START + " ".join(turns) if moves else ""


def moves_of(game: str) -> list[str]:
    """The moves of a game string, a last one that is cut off included, a number that is cut off not."""
    words = (word.rpartition(".")[2] for word in game.removeprefix(START).split(" "))
    return [word for word in words if word and not word.isdigit()]


def _plain_moves(content: bytes) -> list[str] | None:
    """What `_moves` gives, found word by word; None for a game that needs more than that, or that is at fault."""
    if content.startswith(b"%") or b"\n%" in content or content.rfind(b"{") > content.rfind(b"}"):
        return None
    body = _BRACES.sub(b" ", content)
    if b"(" in body or b";" in body:
        return None
    moves: list[str] = []
    ended = False
    for word in body.split():
        found = _word(word)
        if found is None or (ended and found):
            return None
        moves += found
        ended = ended or word in _RESULTS
    return moves


@functools.lru_cache(maxsize=1 << 16)  # games have few different words
def _word(word: bytes) -> tuple[str, ...] | None:
    try:
        return tuple(_moves(word + b" ", 0))
    except GameError:
        return None


def _moves(content: bytes, position: int) -> Iterator[str]:
    ended = False
    size = len(content.rstrip())
    while position < size:
        match = _TOKEN.match(content, position)
        if match is None:
            rest = content[position:].lstrip()
            fault = len(content) - len(rest)
            unclosed = {b"{": "a '{' without a '}'", b")": "a ')' without a '('"}.get(rest[:1])
            raise GameError(content, fault, NOT_CHESS, unclosed or _no_move(rest))
        kind, place = match.lastgroup, position
        position = match.end()
        if kind == "move":
            if ended:
                detail = "moves after the result; games need tags between them"
                raise GameError(content, match.start("move"), NOT_CHESS, detail)
            move = _normal(match["move"].decode("latin-1"))
            if move is None:
                raise GameError(content, match.start("move"), NOT_CHESS, _no_move(match["move"]))
            yield move
        elif kind == "open":
            position = _end_of_variation(content, position)
        elif kind == "result":
            ended = True
        elif kind == "null":
            raise GameError(content, match.start("null"), NULL_MOVE, "a null move")
        assert position > place


def _end_of_variation(content: bytes, position: int) -> int:
    depth, begin = 1, position
    while depth:
        match = _VARIATION.match(content, position)
        assert match is not None  # it may be empty
        if match[1] is None:
            fault = match.end() if match.end() < len(content) else begin - 1
            detail = "a '{' without a '}'" if match.end() < len(content) else "a '(' without a ')'"
            raise GameError(content, fault, NOT_CHESS, detail)
        depth += 1 if match[1] == b"(" else -1
        position = match.end()
    return position


def _normal(move: str) -> str | None:
    match = _SAN.fullmatch(move)
    if match is None:
        return None
    check = (match["check"] or "").replace("++", "+")
    if match["castling"]:
        return match["castling"].replace("0", "O") + check
    return (match["body"] or f"{match['last_rank']}={match['promotion'].upper()}") + check


def _no_move(text: bytes) -> str:
    word = text[:80].split(maxsplit=1)[0].decode("utf-8", "replace")
    return f"{word if len(word) <= 20 else f'{word[:20]}...'!r} is no move in algebraic notation"
