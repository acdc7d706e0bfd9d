"""One game: Stockfish with White against a weakened Stockfish with Black, drawn from a seeded source of randomness.

Stockfish's own option "Skill Level" draws from the clock and its time limits depend on the machine, so neither could be
repeated. Here a weak player chooses by the option's rule among the best moves that Stockfish lists under a limit of
nodes, with our random numbers.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsezoo_jax.data.chess.config import ChessConfig
from sparsezoo_jax.data.chess.openings import OPENINGS
from sparsezoo_jax.errors import DataError

if TYPE_CHECKING:
    import chess.engine

FULL_STRENGTH, RANDOM_MOVER = 20, -2
#: Black is of full strength with this probability; else level l of -2 .. 20 has a weight of _LEVEL_DECAY ** l.
_FULL_STRENGTH_PROBABILITY, _LEVEL_DECAY = 0.15, 0.93
_LEVELS = range(RANDOM_MOVER, FULL_STRENGTH + 1)

#: Moves that a weak player chooses from, as in Stockfish.
_CANDIDATES = 4
#: The most that chance adds to a candidate's score: about the middle-game pawn of Stockfish, in centipawns.
_CHANCE = 60
_MATE = 10_000
#: An engine loads its network before it answers, which takes a while on a busy machine.
_START_SECONDS = 120.0
_FALLBACK_DIRECTORY = "/usr/games"


def chess_package() -> Any:
    """The module `chess`; raises `DataError` naming the extra if it is not installed."""
    try:
        import chess
    except ImportError:
        raise DataError("chess positions need the package 'chess': pip install 'sparsezoo-jax[chess]'") from None
    return chess


def find_stockfish(path: str | None) -> str:
    """The program at `path`, or Stockfish on PATH or in Debian's directory of games.

    Raises:
      DataError: there is none; the message says what to install.
    """
    if path is not None:
        program = shutil.which(Path(path).expanduser())
        if program is None:
            raise DataError(f"data.chess.stockfish={path}: is no program")
        return program
    program = shutil.which("stockfish") or shutil.which("stockfish", path=_FALLBACK_DIRECTORY)
    if program is None:
        raise DataError(
            "data.dataset=chess: Stockfish is neither on PATH nor in /usr/games; install the package 'stockfish' "
            "(apt-get install stockfish), or name the program with data.chess.stockfish"
        )
    return program


class Players:
    """A pair of running engines; `play` gives any game of a configuration.

    Raises `DataError` if the program does not speak the UCI protocol.
    """

    def __init__(self, config: ChessConfig):
        chess_package()
        import chess.engine

        self._config = config
        program = find_stockfish(config.stockfish)
        self._engines: list[chess.engine.SimpleEngine] = []
        try:
            for _ in range(2):
                # A group of its own: an interrupt from the keyboard is for the commands, not for their engines.
                engine = chess.engine.SimpleEngine.popen_uci(program, timeout=_START_SECONDS, setpgrp=True)
                self._engines.append(engine)
                engine.configure({"Threads": 1, "Hash": 1})
        except (chess.engine.EngineError, TimeoutError, OSError) as error:
            self.close()
            why = str(error) or f"no answer in {_START_SECONDS:.0f} s"
            raise DataError(f"{program}: is no UCI chess engine ({why})") from None

    @property
    def name(self) -> str:
        """The engine's own name and version."""
        return self._engines[0].id.get("name", "unnamed engine")

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines:
            engine.close()

    def play(self, number: int) -> str:
        """Game `number` (from 0) as PGN: tags, an empty line, the moves on one line, an empty line.

        Raises:
          DataError: the engine stopped working.
        """
        import chess.engine

        try:
            return self._play(number)
        except chess.engine.EngineError as error:
            raise DataError(f"Stockfish stopped in game {number} ({error}); the same command goes on there") from None

    def _play(self, number: int) -> str:
        import chess

        config = self._config
        draw = random.Random(f"{config.seed}/{number}")
        level = black_level(draw)
        board = chess.Board()
        moves: list[str] = []
        if draw.random() < config.opening_probability:
            for san in draw.choice(OPENINGS).split():
                moves.append(san)
                board.push_san(san)
        result = None
        while (result := _result(board)) is None and len(moves) < 2 * config.max_moves:
            mover = FULL_STRENGTH if board.turn == chess.WHITE else level
            move = self._move(board, mover, number, draw)
            moves.append(board.san(move))
            board.push(move)
        tags = {
            "Event": f"sparsezoo_jax: {config.recipe}",
            "Site": self.name,
            "Round": str(number),
            "White": f"Stockfish level {FULL_STRENGTH}",
            "Black": f"Stockfish level {level}",
            "Result": result or "*",
        }
        turns = (" ".join([f"{i // 2 + 1}.", *moves[i : i + 2]]) for i in range(0, len(moves), 2))
        lines = [f'[{name} "{value}"]' for name, value in tags.items()]
        return "\n".join([*lines, "", " ".join([*turns, tags["Result"]]), "", ""])

    def _move(self, board: chess.Board, level: int, game: int, draw: random.Random) -> chess.Move:
        import chess.engine

        if level == RANDOM_MOVER:
            return draw.choice(list(board.legal_moves))
        # What a limit of time would vary by itself: or the strongest players would play few different games.
        nodes = max(1, round(self._config.nodes * 2 ** draw.uniform(-0.5, 0.5)))
        engine = self._engines[0 if board.turn == chess.WHITE else 1]
        if level == FULL_STRENGTH:
            limit, candidates = chess.engine.Limit(nodes=nodes), 1
        else:
            # One level below 0: a single node.
            limit = chess.engine.Limit(nodes=nodes if level >= 0 else 1, depth=1 + max(level, 0))
            candidates = _CANDIDATES
        wanted = chess.engine.INFO_SCORE | chess.engine.INFO_PV
        # Another game makes the engine forget the one before, so that no game depends on its place in a process.
        found = engine.analyse(board, limit, multipv=candidates, game=game, info=wanted)
        lines = []
        for info in found:
            score, line = info.get("score"), info.get("pv")
            if score is not None and line:
                lines.append((score.relative.score(mate_score=_MATE), line[0]))
        if not lines:  # a search that was over before its first move
            return draw.choice(list(board.legal_moves))
        return lines[0][1] if level == FULL_STRENGTH else weakened(lines, level, draw)


def black_level(draw: random.Random) -> int:
    """A level for Black: 20, or one of -2 .. 20, the low ones more often."""
    if draw.random() < _FULL_STRENGTH_PROBABILITY:
        return FULL_STRENGTH
    return draw.choices(_LEVELS, [_LEVEL_DECAY**level for level in _LEVELS])[0]


def weakened(lines: list[tuple[int, Any]], level: int, draw: random.Random) -> Any:
    """The move of a weak player among `lines`, (score in centipawns, move), best first.

    Every score gets what it lacks to the best one, times (120 - 2 level) / 128, and a random addition of up to that
    share of the range of scores (Stockfish's Skill Level).
    """
    best = lines[0][0]
    span = min(best - lines[-1][0], _CHANCE)
    weakness = 120 - 2 * max(level, 0)
    pushed = [
        (score + (weakness * (best - score) + span * draw.randrange(weakness)) / 128, -index)
        for index, (score, _) in enumerate(lines)
    ]
    return lines[-max(pushed)[1]][1]


def _result(board: chess.Board) -> str | None:
    """The result if the game is over; draws that a player could claim end it too."""
    if board.is_repetition(3) or board.is_fifty_moves():
        return "1/2-1/2" if not board.is_checkmate() else board.result()
    outcome = board.outcome()
    return None if outcome is None else outcome.result()
