"""Chess games: notation, tokenizer, blocks, and games that Stockfish plays.

`games.pgn` was made by `python -m sparsezoo_jax.chess generate --games 60 --seed 7 --nodes 50 --out games.pgn` with
Stockfish 15.1.
"""

import dataclasses
import io
import itertools
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import chess
import chess.pgn
import numpy as np
import pytest

from sparsezoo_jax import chess as command
from sparsezoo_jax import cli
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data import DataConfig, build_tokenizer, find_tokenizer, open_documents, prepare
from sparsezoo_jax.data.batches import batch_from_records
from sparsezoo_jax.data.chess import games as chess_games
from sparsezoo_jax.data.chess.config import ChessConfig
from sparsezoo_jax.data.chess.games import black_level, weakened
from sparsezoo_jax.data.chess.generation import generate_games
from sparsezoo_jax.data.chess.openings import OPENINGS
from sparsezoo_jax.data.chess.pgn import OTHER_START, VARIANT, find_games, game_string, moves_of
from sparsezoo_jax.data.documents import BadDocumentError, Skipped, read_all, readable
from sparsezoo_jax.data.local_files import texts
from sparsezoo_jax.data.pipeline import RecordReader
from sparsezoo_jax.errors import ConfigError, DataError, UserError

GAMES = Path(__file__).with_name("games.pgn")
START = b"rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR"
FEW = ChessConfig(games=7, seed=3, nodes=8, max_moves=12, processes=1)

try:
    chess_games.find_stockfish(None)
    has_stockfish = True
except DataError:
    has_stockfish = False
needs_stockfish = pytest.mark.skipif(not has_stockfish, reason="Stockfish is not installed")

# As Lichess writes games, and the worst that PGN allows.
ODD = """\
[Event "Rated Blitz game"]
[Site "https://lichess.org/abcdefgh"]
[Result "1-0"]

1. e4 { [%eval 0.17] [%clk 0:03:00] } 1... e5?! { [%clk 0:03:00] } 2. Nf3 $1 (2. f4 {King's (Gambit)} exf4
(2... d5) 3. Nf3) 2... Nc6!? ; a comment (to the end { of the line
% an escaped line }
3.Bc4 Nf6 4.0-0
{ a comment
[Event in it]
} Nxe4 1-0

[Event "From a position"]
[FEN "4k3/8/8/8/8/8/4P3/4K3 w - - 0 1"]
[SetUp "1"]

1. e4 *

[Event "Never begun"]
[Result "0-1"]

0-1
[Event "No empty lines"]
1 d4 Nf6 2 c4 e6++ 3. a8Q bxa1=N# 4. exd6 e.p. 1/2-1/2

[Event "Chess960"]
[Variant "Chess960"]

1. O-O *
[Event "Last"]
[Variant "Standard"]

1... e4
"""


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.pgn"
    path.write_text(ODD, encoding="utf-8", newline="\r\n")
    return path


def test_lichess_like_file(odd):
    documents = open_documents(DataConfig(dataset=str(odd), validation_fraction=0), "train")
    assert list(readable(read_all(documents))) == [
        ("odd.pgn:1", ";1.e4 e5 2.Nf3 Nc6 3.Bc4 Nf6 4.O-O Nxe4"),
        ("odd.pgn:19", ""),
        ("odd.pgn:23", ";1.d4 Nf6 2.c4 e6+ 3.a8=Q bxa1=N# 4.exd6"),
        ("odd.pgn:30", ";1.e4"),
    ]
    skipped = [item for item in read_all(documents) if isinstance(item, Skipped)]
    assert [(item.where, item.reason) for item in skipped] == [(f"{odd}:13", OTHER_START), (f"{odd}:26", VARIANT)]


@pytest.mark.parametrize(
    ("moves", "line", "message"),
    [
        ("1. e4 Ke9", 7, "'Ke9' is no move"),
        ("1. e4\na8", 8, "'a8' is no move"),
        ("1. e4 a7=Q", 7, "'a7=Q' is no move"),
        ("1. e4 e5\n2. d4 \u265e", 8, r"'\u265e' is no move"),
        ("1. e4\n{open\n\n", 8, r"a '\{' without a '\}'"),
        ("1. e4\n(1. d4 (\n1. c4) e5", 8, r"a '\(' without a '\)'"),
        ("1. e4 (\n1. d4 {open) e5", 8, r"a '\{' without a '\}'"),
        ("1. e4 ) e5", 7, r"a '\)' without a '\('"),
        ("1. e4 1-0\n\n1. d4 0-1", 9, "moves after the result"),
        ("1. e4 --", 7, "a null move"),
        ("1. e4\nZ0 2. d4", 8, "a null move"),
    ],
)
def test_bad_notation_costs_the_game_and_names_the_line(tmp_path, moves, line, message):
    path = tmp_path / "bad.pgn"
    text = f'[Event "first"]\n\n1. e4 *\n\n[Event "second"]\n\n{moves}\n\n[Event "third"]\n\n1. d4 *\n'
    path.write_text(text, encoding="utf-8")
    documents = open_documents(DataConfig(dataset=str(path), validation_fraction=0), "train")
    assert [document.text for document in documents] == [";1.e4", ";1.d4"]
    with pytest.raises(BadDocumentError, match=rf"bad\.pgn:{line}: {message}"):
        _ = documents[1].text


@pytest.mark.parametrize(
    ("game", "expected"),
    [
        (b'[White "Zo\xeb"]\n\n1. e4 {caf\xe9} e5', ";1.e4 e5"),
        (b"1. e4 e5 (1... -- 2. Z0 ({)} 2. ?? Qx9)) 2. d4", ";1.e4 e5 2.d4"),
        (b"1. e4 (; a comment )\n1. d4) 1... e5", ";1.e4 e5"),
        (b"1. e4 +/- e5 = 2. a8=q+ *", ";1.e4 e5 2.a8=Q+"),
        (
            b'[Event "?"]\n[White ]\n%% escaped\n[FEN "%b w KQkq - 0 1"]\n\n1. e4' % START,
            ";1.e4",
        ),
        (b'[Variant "Chess960"]\n[FEN "%b w KQkq -"]\n\n1. e4' % START, VARIANT),
        (b'[FEN "%b b KQkq - 0 1"]\n\n1. e4' % START, OTHER_START),
    ],
)
def test_what_games_may_hold(game, expected):
    (found,) = find_games(numbered(game))
    assert (found.left_out or game_string(found.content)) == expected


def test_games_word_by_word_are_those_by_tokens(monkeypatch):
    """The way most games take gives what the whole notation gives."""
    games = [game.content for game in find_games(numbered(GAMES.read_bytes()))][:5]
    games += [
        b"1. e4{a}e5 2.d4! $1 *",
        b"1 e4 e5 1/2-1/2",
        b"1. e4 1-0 2. d4",
        b"e4 -- e5",
        b"1. e4 {",
        b"1 . e4",
        b"*",
    ]
    games += [b"1. e4 1-0 {the end} $3", b"1. e4\n% d5\n e5", b"1.e4 e5 2.exd6e.p. a8=Q+!?", b"1. e4 0-1 1-0 *", b""]
    games += [b"1. e4 ; {\n e5 } d4", b"1. e4 ({) } d4) e5", b"1. e4 {(;} e5", b"1.e4e5", b"%{\ne4 {}"]

    def outcome(game):
        try:
            return game_string(game)
        except DataError as error:
            return str(error), error.line, error.reason

    quick = [outcome(game) for game in games]
    assert sum(isinstance(found, str) for found in quick) > 10
    monkeypatch.setattr("sparsezoo_jax.data.chess.pgn._plain_moves", lambda content: None)
    assert [outcome(game) for game in games] == quick


def numbered(content):
    """Number, offset and content of lines."""
    lines = content.splitlines(keepends=True)
    return [(number, sum(map(len, lines[: number - 1])), line) for number, line in enumerate(lines, 1)]


def test_games_of_pieces_are_those_of_the_file(odd, monkeypatch):
    """Wherever a file is cut, each game is read once, whole, and under the number of its line."""
    odd.write_bytes(odd.read_bytes() + b"\n" * 40 + GAMES.read_bytes()[:3000])
    file = texts.GamesFile(odd, "odd.pgn", "text")
    whole = list(file.entries(0))
    assert len(whole) > 8
    for size in (7, 64, 100, 1000):
        monkeypatch.setattr(texts, "PART_BYTES", size)
        file = texts.GamesFile(odd, "odd.pgn", "text")
        pieces = [list(file.entries(piece)) for piece in range(len(file.pieces()))]
        assert list(itertools.chain.from_iterable(pieces)) == whole
        assert all(size * i <= entry.place < size * (i + 1) for i, entries in enumerate(pieces) for entry in entries)


def test_game_strings_are_what_python_chess_reads():
    """Another parser, which plays the moves: the games are legal, complete and end as their tags say."""
    content = GAMES.read_bytes()
    games = list(find_games(numbered(content)))
    assert len(games) == 60
    stream = io.StringIO(content.decode())
    for found in games[:20]:
        game = chess.pgn.read_game(stream)
        text = game_string(found.content)
        board = chess.Board()
        for move in game.mainline_moves():
            board.push(move)
        assert not game.errors
        assert [m.san() for m in game.mainline()] == moves_of(text)
        assert text == ";" + chess.Board().variation_san(game.mainline_moves()).replace(". ", ".")
        assert game.headers["Result"] == board.result(claim_draw=True)
    assert moves_of(";1.e4 e5 2.Nf3 N") == ["e4", "e5", "Nf3", "N"]
    for cut in (";1.e4 e5 2.", ";1.e4 e5 2", ";1.e4 e5 "):
        assert moves_of(cut) == ["e4", "e5"]


def test_tokenizer(tmp_path):
    config = DataConfig(dataset=str(GAMES))
    tokenizer = build_tokenizer(config, open_documents(config, "train"))
    assert tokenizer.vocab_size == 32
    assert "".join(tokenizer.decode([i]) for i in range(32)) == " #+-.0123456789;=BKNOQRabcdefghx"
    assert tokenizer.encode(";1.e4 e5 2.Nf3") == [15, 6, 4, 27, 9, 0, 27, 10, 0, 7, 4, 19, 28, 8]
    assert tokenizer.encode_prompt(";1.e4") == [15, 6, 4, 27, 9]
    with pytest.raises(DataError, match="can't represent 'z'"):
        tokenizer.encode_prompt(";1.z4")
    tokenizer.save(tmp_path)
    loaded = find_tokenizer(tmp_path)
    documents = open_documents(config, "train")
    for i in range(len(documents)):
        text = documents[i].text
        assert loaded.decode(tokenizer.encode(text)) == text
    assert loaded.fingerprint == tokenizer.fingerprint
    named = DataConfig(tokenizer="chess")
    assert build_tokenizer(named, documents).fingerprint == tokenizer.fingerprint


def test_blocks():
    config = DataConfig(dataset=str(GAMES), seq_len=1023, batch_size=2)
    documents = open_documents(config, "train")
    tokenizer = build_tokenizer(config, documents)
    prepared = prepare(config, "train", tokenizer)
    records = RecordReader(prepared).read(list(range(prepared.num_records)))
    assert records.tokens.shape == (prepared.num_records, 1024)
    assert records.tokens[:, :3].tolist() == [[15, 6, 4]] * prepared.num_records
    texts = [tokenizer.decode(row) for row in records.tokens]
    games = [documents[i].text for i in range(len(documents))]
    read = 0
    for number, text in enumerate(texts):
        expected = ""
        while len(expected) < 1024 and read < len(games):
            expected += games[read]
            read += 1
        padding = "" if number < len(texts) - 1 else " " * (1024 - len(expected))
        assert text == (expected + padding)[:1024]
    assert read == len(games)
    batch = batch_from_records(records)
    starts = (batch["tokens"] == 15) & (batch["segment_ids"] > 0)
    assert np.all(batch["positions"][starts] == 0)
    assert starts.sum() > len(texts)  # several games in a block
    assert not np.any(batch["mask"] & (batch["targets"] == 15))  # no game predicts another
    assert prepared.num_bytes == (records.segment_ids > 0).sum()


def test_packing_follows_from_the_corpus():
    assert not DataConfig().in_blocks
    assert DataConfig(dataset="chess").in_blocks
    assert DataConfig(dataset="games/*.pgn").in_blocks
    assert DataConfig(packing="blocks").in_blocks
    assert not DataConfig(dataset="chess", packing="stream", mode="streaming").in_blocks
    with pytest.raises(ConfigError, match=r"data\.packing=blocks: needs data\.mode=prepared"):
        DataConfig(dataset="chess", mode="streaming")
    model = dataclasses.replace(preset("dense").model, vocab_size=32)
    RunConfig(arch="dense", model=model, data=DataConfig(dataset="chess"))
    with pytest.raises(ConfigError, match=r"data\.bpe_vocab_size"):
        RunConfig(arch="dense", model=model)


@pytest.mark.parametrize("field", ["games", "nodes", "opening_probability", "max_moves", "processes"])
def test_bad_recipes(field):
    with pytest.raises(ConfigError, match=rf"data\.chess\.{field}=-1(\.0)?: must be"):
        ChessConfig(**{field: -1})


def test_openings_are_legal_and_different():
    for line in OPENINGS:
        board = chess.Board()
        for san in line.split():
            assert san == board.san(board.parse_san(san))
            board.push_san(san)
    assert len(set(OPENINGS)) == len(OPENINGS) > 50


def test_levels():
    draw = random.Random(0)
    counts = Counter(black_level(draw) for _ in range(20_000))
    weights = {level: 0.93**level for level in range(-2, 21)}
    share = 0.85 / sum(weights.values())
    expected = {level: weight * share + 0.15 * (level == 20) for level, weight in weights.items()}
    # Four standard deviations of the counts.
    assert all(abs(counts[n] / 20_000 - p) < 4 * (p * (1 - p) / 20_000) ** 0.5 for n, p in expected.items())


def test_weak_players_choose_worse_moves():
    lines = [(50, "best"), (30, "good"), (0, "poor"), (-500, "blunder")]
    draw = random.Random(0)
    chosen = {level: Counter(weakened(lines, level, draw) for _ in range(2000)) for level in (0, 10, 19)}
    best = {level: counts["best"] for level, counts in chosen.items()}
    assert best[0] < best[10] < best[19] < 2000
    assert chosen[0]["blunder"] > 0 == chosen[19]["blunder"]
    assert weakened([(10, "only")], 0, draw) == "only"


@needs_stockfish
def test_a_seed_gives_the_same_games_whatever_the_processes(tmp_path):
    one = generate_games(FEW, tmp_path / "one.pgn")
    assert (one.games, one.played) == (7, 7)
    two = generate_games(dataclasses.replace(FEW, processes=2), tmp_path / "two.pgn")
    content = one.path.read_bytes()
    assert two.path.read_bytes() == content
    assert content.count(b"[Event ") == 7
    other = generate_games(dataclasses.replace(FEW, seed=4), tmp_path / "other.pgn")
    moves = {path.name: path.read_text().split("\n\n")[1::2] for path in (one.path, other.path)}
    assert set(moves["one.pgn"]).isdisjoint(moves["other.pgn"])
    assert len(set(moves["one.pgn"])) == 7


@needs_stockfish
def test_interrupted_games_go_on(tmp_path, capsys):
    whole = generate_games(FEW, tmp_path / "whole.pgn").path.read_bytes()
    for cut, left in ((0, 7), (1, 7), (len(whole) // 2, 4), (len(whole) - 1, 1), (len(whole), 0)):
        path = tmp_path / "again.pgn"
        path.with_name("again.pgn.partial").write_bytes(whole[:cut])
        assert generate_games(FEW, path).played == pytest.approx(left, abs=1 if 1 < cut < len(whole) - 1 else 0)
        assert path.read_bytes() == whole
        assert not path.with_name("again.pgn.partial").exists()
        assert generate_games(FEW, path).played == 0  # finished
        path.unlink()
    assert "going on after 6 of 7 games" in capsys.readouterr().err
    # More games than before begin with the same ones.
    path.with_name("again.pgn.partial").write_bytes(whole)
    generate_games(dataclasses.replace(FEW, games=8), path)
    assert path.read_bytes().startswith(whole)


@needs_stockfish
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_killed_command_leaves_no_processes_and_goes_on(tmp_path):
    out = tmp_path / "games.pgn"
    command = [sys.executable, "-m", "sparsezoo_jax.chess", "generate", "--games", "100000", "--nodes", "8"]
    group = subprocess.Popen([*command, "--processes", "2", "--out", str(out)], start_new_session=True)
    partial = out.with_name("games.pgn.partial")
    try:
        wait_for(lambda: partial.exists() and partial.stat().st_size > 2000, 300)
        children = children_of(group.pid)
        assert len(children) >= 4  # two that play, and the engines
        group.kill()
        group.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in children), 120)
    finally:
        group.kill()
    games = partial.read_bytes().count(b"[Event ")
    made = generate_games(ChessConfig(games=games + 1, nodes=8, processes=1), out)
    assert made.played <= 3  # the rest was kept


def children_of(pid):
    """Ids of the processes below one."""
    try:
        direct = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except FileNotFoundError:
        return []
    return [child for d in direct for child in (d, *children_of(d))]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@needs_stockfish
def test_other_games_are_left_alone(tmp_path, monkeypatch, capsys):
    path = generate_games(FEW, tmp_path / "games.pgn").path
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"holds other games \(Event .*seed 3.*not .*seed 5"):
        generate_games(dataclasses.replace(FEW, seed=5), path)
    with pytest.raises(UserError, match="holds 7 games already, not 9"):
        generate_games(dataclasses.replace(FEW, games=9), path)
    assert path.read_bytes() == content
    path.with_name("games.pgn.partial").write_bytes(content.replace(b"Stockfish 1", b"Stockfish 9"))
    path.unlink()
    with pytest.raises(UserError, match=r"holds other games .*Site"):
        generate_games(FEW, path)
    args = ["generate", "--games", 7, "--seed", 3, "--nodes", 8, "--max-moves", 12, "--processes", 1]
    assert call([*args, "--out", tmp_path / "new.pgn"], monkeypatch) == 0
    assert (tmp_path / "new.pgn").read_bytes() == content
    assert "7 games, 7 of them played now" in capsys.readouterr().out
    foreign = tmp_path / "foreign.pgn"
    shutil.copyfile(GAMES, foreign)
    foreign.write_bytes(b'[White "A"]\n\n1. e4 *\n\n')
    assert call([*args, "--out", foreign], monkeypatch) == 2
    assert "games that this command did not make" in capsys.readouterr().err


@needs_stockfish
def test_the_corpus_chess(tmp_path):
    config = DataConfig(dataset="chess", cache_dir=str(tmp_path), chess=FEW)
    splits = {split: open_documents(config, split) for split in ("train", "validation")}
    assert (len(splits["train"]), len(splits["validation"])) == (6, 1)
    assert splits["validation"][0].id == "6"
    (pgn,) = (tmp_path / "chess").glob("*.pgn")
    files = open_documents(DataConfig(dataset=str(pgn), validation_fraction=0), "train")
    texts = [splits["train"][i].text for i in range(6)] + [splits["validation"][0].text]
    assert [files[i].text for i in range(7)] == texts
    # Another recipe is another corpus, and one that is prepared needs no engine.
    again = dataclasses.replace(config, chess=dataclasses.replace(FEW, stockfish="no-such-program"))
    assert open_documents(again, "train").fingerprint == splits["train"].fingerprint
    with pytest.raises(DataError, match="stockfish=no-such-program: is no program"):
        open_documents(dataclasses.replace(again, chess=dataclasses.replace(again.chess, seed=9)), "train")


def call(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    try:
        cli.run(command.main)
    except SystemExit as error:
        return error.code
    return 0


def test_without_stockfish(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(chess_games, "_FALLBACK_DIRECTORY", str(tmp_path))
    out = tmp_path / "games.pgn"
    assert call(["generate", "--out", out], monkeypatch) == 2
    error = capsys.readouterr().err
    assert "install the package 'stockfish'" in error
    assert error.count("\n") == 1
    with pytest.raises(DataError, match="install the package 'stockfish'"):
        open_documents(DataConfig(dataset="chess", cache_dir=str(tmp_path / "cache")), "train")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bad_programs(tmp_path, monkeypatch, capsys):
    for program, message in ((shutil.which("true"), "is no UCI chess engine"), ("/no/such", "is no program")):
        args = ["generate", "--stockfish", program, "--out", tmp_path / "x.pgn"]
        assert call(args, monkeypatch) == 2
        assert message in capsys.readouterr().err
    assert call(["play", "--out", tmp_path / "x.pgn"], monkeypatch) == 2
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "chess", None)
    with pytest.raises(DataError, match=r"pip install 'sparsezoo-jax\[chess\]'"):
        chess_games.chess_package()
