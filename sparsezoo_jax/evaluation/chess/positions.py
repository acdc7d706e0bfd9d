"""Positions of games and what holds in them: pieces on squares, and concepts of strategy.

A state is a position at one of the first 20 dots of a game string: White is to move, and the board is the one after
Black's last reply. Shapes: N games, S = 20 N states, G properties.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparsezoo_jax.data.chess.games import chess_package
from sparsezoo_jax.data.chess.pgn import moves_of
from sparsezoo_jax.data.documents import digest
from sparsezoo_jax.errors import DataError, StorageError

if TYPE_CHECKING:
    import chess

#: Characters of a game that are read, and dots (states) among them.
LENGTH, STATES = 256, 20
#: Changes whenever the same games would give other arrays.
_RECIPE = 1


def dots(game: str) -> list[int]:
    """Where the dots of a game string are."""
    return [i for i, character in enumerate(game) if character == "."]


def plies(game: str) -> np.ndarray:
    """For each character the number of moves on its board: it grows at every space. int [len(game)]."""
    return np.cumsum([character == " " for character in game])


def boards(game: str) -> Iterator[chess.Board]:
    """The initial board and the board after each move of a game string (the same object, moved on).

    Raises:
      DataError: a move is not legal. No package `chess`.
    """
    board = chess_package().Board()
    yield board
    for move in moves_of(game):
        try:
            board.push_san(move)
        except ValueError:
            raise DataError(f"{move} is no legal move in {game[:60]}...") from None
        yield board


# -------------------- Pieces on squares
def pieces(board: chess.Board) -> np.ndarray:
    """The squares of each class of piece, as bits (bit 0 is a1, bit 7 h1, bit 63 h8): uint64 [12].

    Classes are K Q R B N P of Black, then P N B R Q K of White: 0-5 and 7-12 of the published code, whose class 6 is
    the empty square.
    """
    kinds = (1, 2, 3, 4, 5, 6)
    black = [board.pieces_mask(kind, False) for kind in reversed(kinds)]
    white = [board.pieces_mask(kind, True) for kind in kinds]
    return np.array(black + white, np.uint64)


def board_properties(pieces_SC: np.ndarray, *, masked: bool) -> np.ndarray:
    """Binary properties of states, one for each square and class of piece: bool [S, 768], index 12 * square + class.

    Args:
      pieces_SC: uint64 [S, 12], see `pieces`.
      masked: a piece that stands where that piece stood at the beginning does not count.
    """
    if masked:
        pieces_SC = pieces_SC & ~pieces(chess_package().Board())
    octets = np.ascontiguousarray(pieces_SC).view(np.uint8)
    bits_SCQ = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(pieces_SC), 12, 64)
    return bits_SCQ.transpose(0, 2, 1).reshape(len(pieces_SC), 768).astype(bool)


# -------------------- Concepts
def can_check(board: chess.Board) -> bool:
    """Some legal move gives check."""
    return any(board.gives_check(move) for move in board.legal_moves)


def can_capture_queen(board: chess.Board) -> bool:
    """A legal move captures the opponent's first queen."""
    queen = next(iter(board.pieces(5, not board.turn)), None)
    return queen is not None and any(move.to_square == queen for move in board.legal_moves)


#: For each attacking piece the kinds of piece that it forks; pawn 1, knight 2, bishop 3, rook 4, queen 5, king 6.
_FORKED = {1: (2, 3, 4, 5, 6), 2: (4, 5, 6), 3: (4, 5, 6), 4: (5, 6)}


def fork(board: chess.Board) -> bool:
    """Unpinned pieces of one kind attack two enemy pieces of one more valuable kind, counted over all attackers."""
    for attacker, targets in _FORKED.items():
        attacked = [
            board.attacks_mask(s) for s in board.pieces(attacker, board.turn) if not board.is_pinned(board.turn, s)
        ]
        for target in targets:
            enemies = board.pieces_mask(target, not board.turn)
            if sum((mask & enemies).bit_count() for mask in attacked) >= 2:
                return True
    return False


def pin(board: chess.Board) -> bool:
    """A piece of either side is pinned to its king."""
    return any(
        board.is_pinned(color, square) for color in (True, False) for square in _squares(board.occupied_co[color])
    )


def ambiguous_moves(board: chess.Board) -> bool:
    """Two pieces of one kind can move to the same square."""
    origins: dict[tuple[int | None, int], set[int]] = defaultdict(set)
    for move in board.legal_moves:
        origins[board.piece_type_at(move.from_square), move.to_square].add(move.from_square)
    return any(len(squares) > 1 for squares in origins.values())


def connected_rooks(board: chess.Board) -> bool:
    """Two rooks of the side to move protect each other."""
    rooks = board.pieces(4, board.turn)
    return any(board.attacks_mask(square) & int(rooks) for square in rooks)


def _squares(mask: int) -> Iterator[int]:
    return (square for square in range(64) if mask >> square & 1)


#: Concepts with one property each, for the side to move (Karvonen et al., Table 3).
CONCEPTS: dict[str, Callable[[chess.Board], bool]] = {
    "check": lambda board: board.is_check(),
    "can_check": can_check,
    "has_queen": lambda board: board.pieces_mask(5, board.turn) != 0,
    "can_capture_queen": can_capture_queen,
    "bishop_pair": lambda board: board.pieces_mask(3, board.turn).bit_count() >= 2,
    "castling_rights": lambda board: board.has_castling_rights(board.turn),
    "kingside_rights": lambda board: board.has_kingside_castling_rights(board.turn),
    "queenside_rights": lambda board: board.has_queenside_castling_rights(board.turn),
    "fork": fork,
    "pin": pin,
    "en_passant": lambda board: board.has_legal_en_passant(),
    "ambiguous_moves": ambiguous_moves,
}


def threatened_squares(board: chess.Board) -> int:
    """The squares that the opponent attacks, as bits."""
    mask = 0
    for square in _squares(board.occupied_co[not board.turn]):
        mask |= board.attacks_mask(square)
    return mask


def legal_targets(board: chess.Board) -> int:
    """The squares that legal moves lead to, as bits."""
    mask = 0
    for move in board.legal_moves:
        mask |= 1 << move.to_square
    return mask


#: Concepts with one property a square.
SQUARE_CONCEPTS: dict[str, Callable[[chess.Board], int]] = {
    "threatened_squares": threatened_squares,
    "legal_moves": legal_targets,
}


def strategy_properties(board: chess.Board) -> np.ndarray:
    """The properties of all concepts in a position: bool [12 + 2 * 64]."""
    single = [concept(board) for concept in CONCEPTS.values()]
    masks = np.array([concept(board) for concept in SQUARE_CONCEPTS.values()], np.uint64)
    return np.concatenate([single, np.unpackbits(masks.view(np.uint8), bitorder="little")]).astype(bool)


# -------------------- Sets of games
class Properties(NamedTuple):
    """A set of binary properties of states."""

    labels_SG: np.ndarray
    """bool [S, G]."""
    concepts: tuple[int, ...]
    """Numbers of neighbouring properties that make up a concept; concepts count alike in a mean."""
    classes: int | None
    """Neighbouring properties that are those of one square and exclude each other; None where there are none such."""

    def weights(self) -> np.ndarray:
        """What each property counts in a mean over the set: [G], sums to 1."""
        sizes = np.array(self.concepts)
        return np.repeat(1 / (len(sizes) * sizes), sizes)


class Games:
    """Games to score on, each cut to 256 characters, with the states at their first 20 dots.

    Positions are found once and kept in `cache`. Raises `DataError` for an illegal move.
    """

    def __init__(self, texts: Sequence[str], cache: Path):
        self.texts = [text[:LENGTH] for text in texts]
        self._cache = cache / "chess-states"
        for text in self.texts:
            if len(dots(text)) < STATES:
                raise DataError(f"a game to score on needs {STATES} moves in {LENGTH} characters: {text[:60]}...")

    def __len__(self) -> int:
        return len(self.texts)

    def places(self) -> np.ndarray:
        """The characters at which features are read: int [N, 20]."""
        return np.array([dots(text)[:STATES] for text in self.texts])

    def properties(self, name: str) -> Properties:
        """A set of properties at all dots, states in the order of games and dots; see `ChessEvaluation.properties`."""
        if name == "strategy":
            labels = self._cached("strategy", strategy_properties)
            return Properties(labels, (1,) * len(CONCEPTS) + (64,) * len(SQUARE_CONCEPTS), None)
        labels = board_properties(self._cached("pieces", pieces), masked=name == "board")
        return Properties(labels, (768,), 12)

    def _cached(self, name: str, of: Callable[[chess.Board], np.ndarray]) -> np.ndarray:
        path = self._cache / f"{name}-{digest(_RECIPE, LENGTH, STATES, *self.texts)}.npy"
        try:
            if path.exists():
                return np.load(path)
            found = np.stack([of(board) for text in self.texts for board in _states(text)])
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial.npy")
            np.save(partial, found)
            partial.replace(path)
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: {error}; delete it to find the positions again") from None
        return found


def _states(text: str) -> Iterator[chess.Board]:
    counts = plies(text)
    wanted = [int(counts[dot]) for dot in dots(text)[:STATES]]
    return itertools.compress(boards(text[: dots(text)[STATES - 1]]), _indicator(wanted))


def _indicator(wanted: Sequence[int]) -> Iterator[bool]:
    chosen = set(wanted)
    return (i in chosen for i in itertools.count())


def choose_games(texts: Sequence[str] | Iterator[str], count: int) -> list[str]:
    """The first `count` different games that are long enough to be scored on; fewer if there are no more."""
    chosen: dict[str, None] = {}
    for text in texts:
        cut = text[:LENGTH]
        if cut.count(".") >= STATES:
            chosen.setdefault(cut)
        if len(chosen) == count:
            break
    return list(chosen)
