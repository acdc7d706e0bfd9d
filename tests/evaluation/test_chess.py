"""Chess evaluation: positions against python-chess and published cases, scores against their definitions."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import chess
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import cli, evaluate, train
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data import DataConfig, build_tokenizer, open_documents
from sparsezoo_jax.data.trained_tokenizers import character_tokenizer
from sparsezoo_jax.errors import ConfigError, DataError, SparsezooWarning
from sparsezoo_jax.evaluation.chess import games_for, score_features
from sparsezoo_jax.evaluation.chess import positions as chess_positions
from sparsezoo_jax.evaluation.chess.positions import (
    CONCEPTS,
    Games,
    Properties,
    board_properties,
    boards,
    choose_games,
    connected_rooks,
    dots,
    pieces,
    plies,
    strategy_properties,
)
from sparsezoo_jax.evaluation.chess.scores import coverage, fit, levels_of, reconstruct, reconstruction
from sparsezoo_jax.evaluation.features import default_layer, ffn_features
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.ffn import PlainFFNConfig
from tests.test_docs import values_of

PGN = Path(__file__).parents[1] / "data" / "games.pgn"
GAME = ";1.e4 e5 2.d3 f6 3.Nd2 Bb4 4.a3"
CONFIG = DataConfig(dataset=str(PGN))


def after(game):
    """The board at the end of a game string."""
    *_, board = boards(game)
    return board


def named(labels_G):
    """Properties by square and piece, as Black's and White's letters."""
    return {chess.square_name(i // 12): "kqrbnpPNBRQK"[i % 12] for i in np.flatnonzero(labels_G)}


def test_boards_at_dots():
    assert dots(GAME) == [2, 10, 18, 28]
    counts = plies(GAME)
    assert [int(counts[i]) for i in dots(GAME)] == [0, 2, 4, 6]
    seen = [board.copy() for board in boards(GAME)]
    at_dots = [seen[counts[i]] for i in dots(GAME)]
    assert all(board.turn == chess.WHITE for board in at_dots)
    labels = board_properties(np.stack([pieces(board) for board in at_dots]), masked=True)
    assert labels.shape == (4, 768)
    assert labels.sum(1).tolist() == [0, 2, 4, 6]
    assert named(labels[3]) == {"d2": "N", "d3": "P", "b4": "b", "e4": "P", "e5": "p", "f6": "p"}
    assert [i for i in range(len(GAME)) if CONCEPTS["pin"](seen[counts[i]])] == [26, 27, 28, 29, 30]
    unmasked = board_properties(np.stack([pieces(board) for board in at_dots]), masked=False)
    assert unmasked.sum(1).tolist() == [32, 32, 32, 32]
    for row, board in zip(unmasked, at_dots, strict=True):
        assert named(row) == {chess.square_name(s): p.symbol() for s, p in board.piece_map().items()}


def test_what_can_never_be_masked_in():
    """32 pieces on their first squares, and pawns on the first and last rank: 704 properties are left."""
    start = board_properties(pieces(chess.Board())[None], masked=False)[0]
    pawns = np.zeros((64, 12), bool)
    pawns[:8, [5, 6]] = pawns[-8:, [5, 6]] = True
    assert not np.any(start & pawns.reshape(-1))
    assert 768 - start.sum() - pawns.sum() == 704


def test_published_cases_of_concepts():
    def concepts(game):
        board = after(game)
        return {name: bool(concept(board)) for name, concept in CONCEPTS.items()}

    start = concepts("")
    assert not start["pin"]
    assert not start["en_passant"]
    assert start["castling_rights"]
    assert start["kingside_rights"]
    assert start["queenside_rights"]
    assert start["has_queen"]
    assert start["bishop_pair"]
    assert not connected_rooks(chess.Board())
    assert connected_rooks(chess.Board("4k3/8/8/8/8/8/8/R3R1K1 w - - 0 1"))
    assert concepts(";1.e4 Nc6 2.e5 f5")["en_passant"]
    assert concepts(";1.e4 f5")["can_check"]
    assert not start["can_check"]
    assert concepts(";1.e4 g6 2.Qh5")["can_capture_queen"]
    assert concepts(";1.e4 f5 2.Qh5")["check"]
    assert concepts(";1.d4 d5 2.Nc3 a6 3.Nf3 a5")["ambiguous_moves"] is False
    assert concepts(";1.Nf3 a6 2.d3 a5")["ambiguous_moves"]  # Nbd2, Nfd2


@pytest.mark.parametrize(
    ("fen", "expected"),
    [
        ("r3k3/2N5/8/8/8/8/8/4K3 w - - 0 1", False),  # a knight on king and rook: two kinds
        ("r3k2r/2N5/8/8/8/8/6N1/4K3 w - - 0 1", False),
        ("4k3/8/1q3q2/3N4/8/8/8/4K3 w - - 0 1", True),  # a knight on two queens
        ("4k3/8/8/1n1n4/2P5/8/8/4K3 w - - 0 1", True),  # a pawn on two knights
        ("4k3/8/8/1p1p4/2P5/8/8/4K3 w - - 0 1", False),  # pawns on pawns do not count
        ("4k3/8/q3N3/8/8/2r5/q7/N3K3 w - - 0 1", False),
        ("4k3/8/8/8/1q5q/8/5N2/4K3 w - - 0 1", False),  # too far
        ("4k3/2q3q1/4N3/8/8/8/8/4K3 w - - 0 1", True),  # pinned to nothing: white's king is elsewhere
        ("4r1k1/2q3q1/4N3/8/8/8/8/4K3 w - - 0 1", False),  # the knight is pinned
        ("3q4/8/4N3/8/8/2N5/8/1q2K2k w - - 0 1", True),  # one queen for each of two knights
    ],
)
def test_forks(fen, expected):
    assert CONCEPTS["fork"](chess.Board(fen)) is expected


def test_square_concepts():
    labels = strategy_properties(chess.Board())
    threatened, targets = labels[12:76], labels[76:]
    assert np.flatnonzero(targets).tolist() == list(range(16, 32))
    # All of the two ranks behind Black's pawns but the corners' outer squares, and the rank before them.
    expected = {s for s in range(64) if chess.Board().is_attacked_by(chess.BLACK, s)}
    assert set(np.flatnonzero(threatened).tolist()) == expected


def test_states_of_games(tmp_path):
    documents = open_documents(CONFIG, "train")
    texts = [documents[i].text for i in range(len(documents))]
    chosen = choose_games(iter([*texts, texts[0]]), 12)
    assert len(chosen) == len(set(chosen)) == 12
    assert all(len(text) <= 256 and text.count(".") >= 20 for text in chosen)
    assert len(choose_games(iter(chosen[:3] * 2), 12)) == 3
    games = Games(chosen, tmp_path)
    labels = games.properties("board").labels_SG
    assert labels.shape == (12 * 20, 768)
    assert not labels[::20].any()  # the first dot of every game
    for number, text in enumerate(chosen):
        board = chess.Board()
        for place in range(20):
            prefix = text[: dots(text)[place]].rpartition(" ")[0] if place else ""
            assert games.places()[number, place] == dots(text)[place]
            row = board_properties(pieces(after(prefix))[None], masked=True)[0]
            np.testing.assert_array_equal(labels[number * 20 + place], row)
    assert board.turn
    strategy = games.properties("strategy")
    assert strategy.labels_SG.shape == (240, 12 + 128)
    assert strategy.weights().sum() == pytest.approx(1)
    assert strategy.weights()[0] == pytest.approx(1 / 14)
    assert strategy.weights()[-64:].sum() == pytest.approx(1 / 14)
    assert len(list((tmp_path / "chess-states").iterdir())) == 2
    with pytest.raises(DataError, match="needs 20 moves in 256 characters"):
        Games([";1.e4 e5"], tmp_path)


def test_games_that_can_not_be_read_are_passed_over(tmp_path):
    path = tmp_path / "games.pgn"
    path.write_bytes(b'[White "Zo\xeb"]\n\n1. e4 Ke9 *\n\n' + PGN.read_bytes())
    with pytest.warns(SparsezooWarning, match=r"chess\.games: 1 of \d+ .*games\.pgn:3: 'Ke9' is no move"):
        learn, _ = games_for(CONFIG, [str(path)], 2)
    assert learn.texts == games_for(CONFIG, [str(PGN)], 2)[0].texts
    with pytest.raises(DataError, match="'Ke9' is no move"):
        games_for(dataclasses.replace(CONFIG, on_bad_document="stop"), [str(path)], 2)


def test_positions_are_found_once(tmp_path, monkeypatch):
    _, games = games_for(CONFIG, [str(PGN)], 2)
    first = Games(games.texts, tmp_path).properties("board").labels_SG
    monkeypatch.setattr(chess_positions, "boards", None)
    np.testing.assert_array_equal(Games(games.texts, tmp_path).properties("board").labels_SG, first)


def test_illegal_moves_are_named(tmp_path):
    text = ";1.e4 e5 2.Ke3 " + " ".join(f"{i}.a a" for i in range(3, 30))
    with pytest.raises(DataError, match="Ke3 is no legal move"):
        Games([text], tmp_path).properties("board")


# -------------------- Scores
F1 = [1, 0.8, 0.6, 0.55, 0.5, 0, 0, 0, 0, 0]
F2 = [0, 0, 0, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0]


def test_coverage_of_the_worked_example():
    features = np.array([F1, F2]).T
    labels = np.zeros((10, 2), bool)
    labels[:5, 0] = labels[3, 1] = True
    found = coverage(fit(levels_of(features, features.max(0)), labels), np.array([0.5, 0.5]))
    expected = [0.6667, 0.6667, 0.6667, 0.7, 0.75, 0.7778, 0.7857, 0.7857, 0.6667, 0.6667]
    assert found.by_threshold == pytest.approx(expected, abs=5e-5)
    assert found.score == pytest.approx(0.7857143, abs=1e-7)
    assert found.threshold == 0.6
    assert found.per_property == pytest.approx(1.0)


def brute_force(features, largest, labels):
    """F1 [T, F, G] and the mask of classifiers by the definitions, one feature and property at a time."""
    f1 = np.zeros((10, features.shape[1], labels.shape[1]))
    classifies = np.zeros(f1.shape, bool)
    for t in range(10):
        for i in range(features.shape[1]):
            fire = features[:, i] > (t / 10) * largest[i]
            for g in range(labels.shape[1]):
                true, on, positives = (fire & labels[:, g]).sum(), fire.sum(), labels[:, g].sum()
                if true:
                    precision, recall = true / on, true / positives
                    f1[t, i, g] = 2 * precision * recall / (precision + recall)
                    classifies[t, i, g] = precision >= 0.95 and true >= 10
    return f1, classifies


def test_scores_against_their_definitions():
    draw = np.random.default_rng(0)
    labels = {name: draw.random((200, 12)) < np.linspace(0.1, 0.9, 12) for name in ("train", "test")}
    noise = {name: draw.random((200, 30)) * (draw.random((200, 30)) < 0.3) for name in labels}
    mixed = {name: np.hstack([noise[name], labels[name] * draw.random((200, 12))]) for name in labels}
    largest = mixed["train"].max(0)
    fitted = fit(levels_of(mixed["train"], largest), labels["train"])
    f1, classifies = brute_force(mixed["train"], largest, labels["train"])
    np.testing.assert_allclose(fitted.f1_TG, f1.max(1), rtol=1e-12)
    np.testing.assert_array_equal(fitted.classifiers_TFG, classifies)
    assert 0 < classifies.sum() < classifies.size

    predicted = reconstruct(levels_of(mixed["test"], largest), fitted)
    expected = np.zeros((11, 200, 12), bool)
    for t in range(10):
        fire = mixed["test"] > (t / 10) * largest
        expected[t] = np.einsum("sf,fg->sg", fire.astype(int), classifies[t]) > 0
    for s in range(200):
        for i in range(42):
            useful = [t for t in range(10) if mixed["test"][s, i] > (t / 10) * largest[i] and classifies[t, i].any()]
            if useful:
                expected[10, s] |= classifies[useful[-1], i]
    np.testing.assert_array_equal(predicted, expected)

    test = Properties(labels["test"], (12,), 3)
    found = reconstruction(predicted, test, fitted)
    pooled = [2 * (p & labels["test"]).sum() / (p.sum() + labels["test"].sum()) for p in expected]
    per_square = []
    for p in expected[:10]:
        true = (p & labels["test"]).reshape(200, 4, 3).sum(2)
        false = (p & ~labels["test"]).reshape(200, 4, 3).sum(2)
        credited = np.where((true == 1) & (false == 1), 0, true).sum()
        recall = credited / (credited + (~p & labels["test"]).sum())
        precision = credited / (credited + false.sum())
        per_square.append(2 * precision * recall / (precision + recall))
    best = int(np.argmax(per_square))
    assert (found.threshold, found.score) == (best / 10, pytest.approx(pooled[best]))
    assert found.last == pytest.approx(pooled[10])
    own = [
        max(2 * (p[s] & labels["test"][s]).sum() / max(p[s].sum() + labels["test"][s].sum(), 1) for p in expected[:10])
        for s in range(200)
        if labels["test"][s].any()
    ]
    assert found.per_board == pytest.approx(np.mean(own))
    concepts = Properties(labels["test"], (4, 8), None)
    by_concept = [
        np.mean([2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in zip(*parts, strict=True)])
        for parts in ((np.split(p, [4], 1), np.split(labels["test"], [4], 1)) for p in expected)
    ]
    found = reconstruction(predicted, concepts, fitted)
    assert found.score == pytest.approx(max(by_concept[:10]))
    assert found.last == pytest.approx(by_concept[10])


def classified(on, true):
    """Whether a feature that fires in `on` states, `true` of them with the property, is a classifier of it."""
    features = np.zeros((40, 1))
    features[:on] = 1
    labels = np.zeros((40, 1), bool)
    labels[:true] = True
    return bool(fit(levels_of(features, np.ones(1)), labels).classifiers_TFG.all())


def test_high_precision_rule():
    assert classified(20, 19)  # 0.95 counts
    assert not classified(9, 9)  # too few
    assert classified(10, 10)
    assert not classified(21, 19)


def test_thresholds_are_compared_in_double_precision():
    largest = np.random.default_rng(2).random(1000, np.float32)
    at_six_tenths = (0.6 * largest.astype(np.float64)).astype(np.float32)[None]
    expected = at_six_tenths.astype(np.float64) > 0.6 * largest.astype(np.float64)
    assert 300 < expected.sum() < 700  # as rounding goes
    np.testing.assert_array_equal(levels_of(at_six_tenths, largest) > 6, expected)


def test_votes_count_at_the_highest_useful_threshold():
    """A feature that means one thing when weak and another when strong, which the weak meaning must not follow."""
    features = np.full((40, 1), 0.15)
    features[:12] = 1
    labels = np.zeros((40, 2), bool)
    labels[2:, 0] = True  # 38 of 40 weakly, but 10 of 12 strongly
    labels[:12, 1] = True
    fitted = fit(levels_of(features, np.ones(1)), labels)
    assert fitted.classifiers_TFG[:, 0].tolist() == [[True, False]] * 2 + [[False, True]] * 8
    *_, last = reconstruct(levels_of(features, np.ones(1)), fitted)
    np.testing.assert_array_equal(last, np.stack([np.arange(40) >= 12, np.arange(40) < 12], axis=1))


def test_the_threshold_that_restores_squares_best_is_reported():
    labels = np.zeros((3, 3), bool)
    labels[:, 0] = True
    predicted = np.zeros((11, 3, 3), bool)
    predicted[0, :, :2] = True  # one right and one wrong piece on each square: no credit, though F1 is 2/3
    predicted[1, 0, 0] = True
    test = Properties(labels, (3,), 3)
    fitted = fit(np.zeros((3, 1), np.uint8), labels)
    found = reconstruction(predicted, test, fitted)
    assert (found.threshold, found.score) == (0.1, pytest.approx(1 / 2))
    predicted[2, 0] = predicted[2, 1, 0] = True  # one right and two wrong pieces: credit stays
    found = reconstruction(predicted, test, fitted)
    assert (found.threshold, found.score) == (0.2, pytest.approx(4 / 7))


def scores_of(features, labels, classes=1):
    fitted = fit(levels_of(features, features.max(0)), labels)
    test = Properties(labels, (labels.shape[1],), classes)
    return reconstruction(reconstruct(levels_of(features, features.max(0)), fitted), test, fitted)


def test_limits_of_reconstruction():
    draw = np.random.default_rng(1)
    labels = draw.random((300, 6)) < 0.3
    perfect = scores_of(labels.astype(float), labels)
    assert (perfect.score, perfect.per_board, perfect.last) == (1, 1, 1)
    assert scores_of(labels.astype(float), np.zeros((300, 6), bool)).score == 0
    silent = scores_of(np.hstack([labels.astype(float), np.zeros((300, 1))]), labels)
    assert silent == perfect
    always = coverage(fit(levels_of(np.ones((300, 1)), np.ones(1)), labels), np.full(6, 1 / 6))
    p = labels.mean(0)
    assert always.score == pytest.approx(np.mean(2 * p / (1 + p)))


# -------------------- Models
@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CONFIG, open_documents(CONFIG, "train"))


def small_model(seed=0, width=512):
    config = dataclasses.replace(
        preset("dense").model,
        vocab_size=32,
        d_model=64,
        layers=2,
        max_seq_len=256,
        ffn=PlainFFNConfig(d_ff=width, activation="gelu"),
    )
    return Decoder(config, rngs=nnx.Rngs(seed))


@pytest.mark.slow
def test_random_weights_are_the_floor(tokenizer):
    """A model that has learnt nothing restores next to nothing, unless the pieces that never moved count."""
    learn, test = games_for(CONFIG, [str(PGN)], 24)
    scores = score_features(
        ffn_features(small_model()), tokenizer, learn, test, properties=("board", "board_unmasked", "strategy")
    )
    board, unmasked = scores.sets["board"], scores.sets["board_unmasked"]
    assert board.reconstruction.score <= 0.02
    assert 0.03 < board.coverage.score < 0.2
    assert unmasked.reconstruction.score > 0.3
    assert unmasked.coverage.score > 1.3 * board.coverage.score
    assert scores.alive == scores.features == 512
    # One property of 768 is 1/768; 64 of them can't occur.
    assert board.coverage.score < board.possible <= 704 / 768
    json.dumps(scores.as_dict())


def test_the_python_of_the_documentation(tokenizer):
    def encode(tokens_BT, segment_ids_BT):
        return np.ones((*np.shape(tokens_BT), 3), np.float32)

    changes = {"games.pgn": str(PGN), "1000": "2"}
    found = values_of("docs/chess.md", changes, config=SimpleNamespace(data=CONFIG), encode=encode, tokenizer=tokenizer)
    assert found["scores"].features == 3


def test_other_features(tokenizer):
    """Any function from tokens to activations is scored: here one that knows the board."""
    learn, test = games_for(CONFIG, [str(PGN)], 24)
    known = {tuple(tokenizer.encode(text)): text for text in [*learn.texts, *test.texts]}

    def knows(tokens_BT, segment_ids_BT):
        activations = np.zeros((*tokens_BT.shape, 769), np.float32)
        for row, (tokens, segments) in enumerate(zip(tokens_BT, segment_ids_BT, strict=True)):
            if not segments.any():
                activations[row] = 9  # padding must not count
                continue
            text = known[tuple(tokens[segments > 0].tolist())]
            activations[row, segments == 0] = 9
            masks = np.stack([pieces(board) for board in boards(text[: dots(text)[19]])])
            labels = board_properties(masks, masked=True)
            for place in dots(text)[:20]:
                activations[row, place, :768] = labels[plies(text)[place]] * (1 + place / 256)
        return activations

    scores = score_features(knows, tokenizer, learn, test, batch_size=7)
    assert scores.sets["board"].coverage.score == pytest.approx(scores.sets["board"].possible)
    labels = learn.properties("board").labels_SG
    assert (scores.features, scores.alive) == (769, labels.any(0).sum())
    assert scores.l0 == pytest.approx(test.properties("board").labels_SG.sum() / 480)
    # What was seen ten times is restored, and little else: pieces that always came together in the games learnt from.
    new = test.properties("board").labels_SG
    restored = (new & (labels.sum(0) >= 10)).sum()
    without_errors = 2 * restored / (restored + new.sum())
    assert 0.95 * without_errors < scores.sets["board"].reconstruction.score <= without_errors


@pytest.mark.slow
def test_layers(tokenizer):
    assert [default_layer(n) for n in (1, 2, 4, 8, 12, 24)] == [1, 2, 3, 6, 9, 18]
    model = small_model(width=16)
    tokens = np.array([tokenizer.encode(GAME)], np.int32)
    for layer in (1, 2):
        out = model(tokens, record={"ffn_gate"})
        found = ffn_features(model, layer)(tokens, np.ones_like(tokens))
        np.testing.assert_allclose(found, out.records["ffn_gate"][layer - 1], atol=1e-5)
    with pytest.raises(ConfigError, match=r"chess\.layer=3: must be from 1 to 2"):
        ffn_features(model, 3, field="chess.layer")
    moe = dataclasses.replace(preset("moe").model, vocab_size=32, d_model=64, layers=1)
    with pytest.raises(ConfigError, match="records no hidden units"):
        ffn_features(Decoder(moe, rngs=nnx.Rngs(0)))(tokens, np.ones_like(tokens))


def test_too_few_games_and_another_tokenizer():
    with pytest.raises(DataError, match=r"chess\.count=1000: .* has \d+; .* at most \d+"):
        games_for(CONFIG, [str(PGN)], 1000)
    learn, test = games_for(CONFIG, [str(PGN)], 2)
    with pytest.raises(DataError, match="not one of chess games"):
        score_features(lambda *_: np.zeros((1, 256, 3)), character_tokenizer("abc"), learn, test)
    tokenizer = build_tokenizer(CONFIG, open_documents(CONFIG, "train"))
    with pytest.raises(DataError, match="no feature of this layer is ever active"):
        score_features(lambda t, _: np.zeros((*t.shape, 3)), tokenizer, learn, test)


def call(command, args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    try:
        cli.run(command.main)
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capsys):
    """Train on games, then score the run as a user does."""
    run = tmp_path / "run"
    sizes = {
        "model.vocab-size": 32,
        "model.d-model": 32,
        "model.layers": 1,
        "model.layer-pattern": "global",
        "model.attention.heads": 1,
        "model.attention.kv-heads": 1,
        "model.attention.head-dim": 16,
        "model.ffn.d-ff": 64,
        "data.dataset": PGN,
        "data.seq-len": 127,
        "data.validation-fraction": 0.5,
        "train.steps": 10,
        "eval.batches": 1,
        "eval.final-batches": 1,
    }
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    assert call(train, ["--arch", "dense", *flags, "--eval.no-report", "--workdir", run], monkeypatch) == 0
    assert json.loads((run / "tokenizer.json").read_text())["model"]["vocab"][";"] == 15
    capsys.readouterr()
    assert call(evaluate, [run, "--chess", "--chess.count", 8, "--json"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["layer"], figures["features"], figures["test_games"]) == (1, 64, 8)
    assert 0 < figures["sets"]["board"]["coverage"]["score"] < figures["sets"]["board"]["possible"]
    args = [run, "--chess", "--chess.games", PGN, "--chess.count", 9, "--chess.random-weights"]
    assert call(evaluate, args, monkeypatch) == 0
    table = capsys.readouterr().out
    assert "9 + 9 games" in " ".join(table.split())
    assert "random weights" in table
    for extra, message in (
        (["--chess"], "chess.count=1000: needs twice as many"),
        (["--chess.layer", 1], "--chess=False: must be given with --chess.* flags"),
        (["--chess", "--chess.layer", 0], "chess.layer=0: must be at least 1"),
        (["--chess", "--chess.layer", 2, "--chess.count", 8], "chess.layer=2: must be from 1 to 1"),
        (["--chess", "--chess.games", "no.pgn"], "no.pgn: no such file"),
    ):
        assert call(evaluate, [run, *extra], monkeypatch) == 2
        assert message in capsys.readouterr().err
