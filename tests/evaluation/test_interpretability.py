"""Detection and fuzzing with judges whose score is known, samples of windows, prompts, and figures of experts."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import evaluate, sae, train
from sparsezoo_jax.errors import ConfigError, DataError, UserError
from sparsezoo_jax.evaluation.features import ffn_features
from sparsezoo_jax.evaluation.interpretability import (
    EndpointJudge,
    InterpretEvaluation,
    Window,
    built_in_judge,
    expert_figures,
    interpret,
)
from sparsezoo_jax.evaluation.interpretability.contexts import token_figures
from sparsezoo_jax.evaluation.interpretability.detection import BUCKETS, estimate, judged
from sparsezoo_jax.evaluation.interpretability.endpoint import parsed_answer
from sparsezoo_jax.evaluation.interpretability.intervals import balanced, bootstrap, wilson
from sparsezoo_jax.evaluation.interpretability.windows import samples_of, windows_of
from sparsezoo_jax.models import Decoder
from tests.models.conftest import CONFIGS
from tests.test_commands import call, flags

VOCAB = 40
SMALL = InterpretEvaluation(features=3, contexts=64, window=8, train_windows=10, test_windows=40, min_windows=50)


def text_batches():
    """64 sequences of 64 tokens at random, two documents in each."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        segments = np.where(np.arange(64) < 40, 1, 2)[None].repeat(8, 0).astype(np.int32)
        yield {"tokens": rng.integers(0, VOCAB, (8, 64)).astype(np.int32), "segment_ids": segments}


def pieces(tokens):
    return [str(token) for token in tokens]


def by_token(tokens_BT, segment_ids_BT):
    """Feature 0 fires on tokens 3 and 7, 1 on the token 5 after 4 or 6, 2 never, 3 always, 4 on token 9."""
    t = np.asarray(tokens_BT)
    before = np.roll(t, 1, axis=1)
    strength = 1 + 0.1 * (np.arange(t.shape[1]) % 7)
    fires = [(t == 3) | (t == 7), (t < 20) & ((before == 4) | (before == 6)), t < 0, t >= 0, t == 9]
    return np.stack([f * strength for f in fires], axis=-1).astype(np.float32)


def interpreted(name, **changes):
    config = dataclasses.replace(SMALL, judge=name, **changes)
    return interpret(by_token, text_batches, built_in_judge(name), config, pieces, layer=1)


@pytest.fixture(scope="module")
def windows():
    tokens = np.concatenate([batch["tokens"] for batch in text_batches()])
    return windows_of(tokens, by_token(tokens, tokens)[..., 0], [pieces(row) for row in tokens], 8)


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples(windows):
    samples = samples_of(windows, train=20, test=100, rng=np.random.default_rng(0))
    assert len(samples.train) == 20
    for shown in (samples.detection, samples.fuzzing):
        np.testing.assert_array_equal(np.bincount([w.bucket for w in shown]), [100, *[10] * 10])
    peaks = {b: [max(w.activations) for w in samples.detection if w.bucket == b] for b in range(11)}
    assert max(peaks[0]) == 0
    assert all(max(peaks[b]) <= min(peaks[b + 1]) for b in range(10))
    trained = {w.tokens for w in samples.train}
    assert not trained & {w.tokens for w in samples.detection}
    assert not any(w.marks for w in samples.detection)
    assert len(samples.others) == 5 * 20
    assert max(max(w.activations) for w in samples.others) == 0
    assert not {w.tokens for w in samples.others} & {w.tokens for w in samples.detection}
    number = np.mean([sum(a > 0 for a in w.activations) for w in samples.detection if w.active])
    for window in samples.fuzzing:
        if window.active:
            assert all(window.activations[i] >= 0.3 * max(window.activations) for i in window.marks)
            assert window.marks
        else:
            assert len(window.marks) == np.ceil(number)
    order = [w.active for w in samples.detection]
    assert order != sorted(order, reverse=True), "the order must not tell"
    again = samples_of(windows, train=20, test=100, rng=np.random.default_rng(0))
    assert again == samples
    assert samples_of(windows[:60], train=20, test=100, rng=np.random.default_rng(0)) is None


def test_text_of_a_window():
    window = Window((1, 2, 3), ("a", " b", " c"), (0.0, 1.0, 0.2), 4, (1,))
    assert window.text == "a<< b>> c"


# ------------------------------------------------------------------------------------------------------------- judges


def test_stub_judges():
    oracle, constant, coin = (interpreted(name) for name in ("oracle", "constant", "coin"))
    assert oracle.accuracy["detection"].mean == oracle.accuracy["fuzzing"].mean == 1
    assert all(bucket.mean == 1 for bucket in oracle.by_bucket["detection"])
    assert constant.accuracy["detection"].mean == 0.5
    assert [bucket.mean for bucket in constant.by_bucket["detection"]] == [0, *[1] * 10]
    # 80 windows of each of 3 features: within 95 % of 0.5 (1.96 sqrt(0.25 / 240)).
    assert abs(coin.accuracy["detection"].mean - 0.5) <= 0.0633
    noisy = interpreted("noisy_oracle").accuracy["detection"]
    assert abs(noisy.mean - 0.8) < 0.06
    assert 0.65 < noisy.low < noisy.mean < noisy.high < 0.95
    for score in oracle.features:
        low, high = score.tasks["detection"].interval
        assert 0.9 < low < high == 1, "40 of 40 right, twice, are no proof of 1"
    assert oracle.judge_kind == "stub"
    assert [score.feature for score in oracle.features] == [0, 1, 4], "neither features that never nor always fire"
    assert oracle.failed == {"detection": 0, "fuzzing": 0}


def test_a_coin_over_the_papers_windows(windows):
    samples = samples_of(windows, train=20, test=100, rng=np.random.default_rng(0))
    score = judged(built_in_judge("coin"), None, samples.detection, 5)
    assert abs(score.accuracy - 0.5) <= 0.0693
    assert score.answered == 200


def test_surrogates_find_what_they_can_see():
    tokens = interpreted("tokens")
    first, second, third = (score.tasks["detection"].accuracy for score in tokens.features)
    assert first == third == 1, "features of single tokens are their tokens"
    assert second < 0.9, "a feature of what went before is not"
    assert tokens.features[0].explanation == "'3', '7'"
    assert tokens.features[0].tasks["fuzzing"].accuracy > 0.9
    assert tokens.judge_kind == "surrogate"
    similarity = interpreted("similarity")
    assert similarity.features[2].tasks["detection"].accuracy > 0.7, "far from chance, but misled by other words"
    grams = interpreted("ngrams", train_windows=40, min_windows=80)
    assert grams.features[0].tasks["detection"].accuracy > 0.9
    assert grams.features[2].tasks["detection"].accuracy > 0.9


def test_answers_that_are_none_count_as_failed(windows):
    samples = samples_of(windows, train=20, test=100, rng=np.random.default_rng(0))

    class Moody:
        kind = "stub"
        asked = 0

        def answer(self, explanation, shown):
            self.asked += 1
            if self.asked % 4 == 0:
                return None
            return [w.active for w in shown] + ([True] if self.asked % 4 == 1 else [])

    score = judged(Moody(), None, samples.detection, 5)
    assert (score.failed, score.answered) == (100, 100)
    assert score.accuracy == 1
    assert len(score.by_bucket) == len(BUCKETS) == 11


def test_estimates():
    assert estimate([None, None]).mean is None
    values = [0.2, 0.4, None, 0.9]
    found = estimate(values)
    assert found.mean == pytest.approx(0.5)
    # Of 27 equally likely means of three the lowest, 0.2, and the highest, 0.9, have a share of 3.7 % each.
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.9))
    assert (estimate([0.3]).mean, estimate([0.3]).low) == (0.3, None)


def test_intervals_of_shares():
    """Wilson's formula as the roots of |p - share| = z sqrt(p (1 - p) / n), and what they come to of two shares."""
    for right, count in ((0, 10), (7, 10), (40, 40), (81, 263)):
        low, high = wilson(right, count)
        share, z2 = right / count, 1.959964**2
        roots = np.sort(np.roots([1 + z2 / count, -2 * share - z2 / count, share**2]).real)
        np.testing.assert_allclose([low, high], roots, atol=1e-6)
    (a, b), (c, d) = wilson(30, 40), wilson(8, 10)
    low, high = balanced([30, 8], [40, 10])
    assert low == pytest.approx(0.775 - np.hypot(0.75 - a, 0.8 - c) / 2)
    assert high == pytest.approx(0.775 + np.hypot(b - 0.75, d - 0.8) / 2)
    assert balanced([5, 5], [5, 5])[1] == 1


def test_bootstrapped_intervals():
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(bootstrap(values), [values.mean() - half, values.mean() + half], atol=5e-4)
    assert bootstrap(values) == bootstrap(values)


def test_figures_without_a_judge():
    result = interpreted("oracle")
    assert result.dead == pytest.approx(1 / 5)
    assert sum(result.density_histogram.values()) == 5
    assert result.zipf is None, "four features fire, no law goes through so few"
    first = result.features[0]
    assert first.token_entropy == pytest.approx(np.log(2), abs=0.02)
    assert first.top_token_share == pytest.approx(0.5, abs=0.1)
    assert first.density == pytest.approx(2 / VOCAB, abs=0.01)
    assert result.l0 == pytest.approx(1 + 2 / VOCAB + 0.5 * 2 / VOCAB + 1 / VOCAB, abs=0.01)
    entropy, top = token_figures(np.array([[1, 2, 2, 5]]), np.array([[1.0, 1.0, 2.0, -1.0]]))
    assert entropy == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))
    assert top == 0.75


def test_too_little_text():
    with pytest.raises(DataError, match=r"no feature is active in at least interpret.min_windows=600"):
        interpreted("oracle", min_windows=600)


# ----------------------------------------------------------------------------------------------------------- endpoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 0,1]", [True, False, True]),
        ("Sure! The list is [0,0,0]. Or [1,1,1]?", [False] * 3),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[yes, no, yes]", None),
        ("1, 0, 1", None),
        ("", None),
    ],
)
def test_answers_of_a_model(text, expected):
    assert parsed_answer(text, 3) == expected


@pytest.fixture
def server():
    """A chat completion server that answers from a list."""

    class Handler(BaseHTTPRequestHandler):
        requests, answers = [], []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.requests.append((self.path, self.headers.get("Authorization"), body))
            status, text = self.answers.pop(0)
            data = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else text
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


def test_the_endpoint(server, monkeypatch):
    handler, url = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("time.sleep", lambda _: None)
    judge = EndpointJudge("some-model", url)
    window = Window((1, 2), ("war", " ends"), (0.0, 2.0), 10, (1,))
    handler.answers += [(503, "busy"), (200, " endings\n"), (200, "[1, 0]"), (200, "I can't say")]
    assert judge.explain([window], []) == "endings"
    path, key, body = handler.requests[-1]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "some-model", 0)
    assert "war<< ends>>" in body["messages"][0]["content"]
    plain = dataclasses.replace(window, marks=())
    assert judge.answer("endings", [plain, plain]) == [True, False]
    asked = handler.requests[-1][2]["messages"][0]["content"]
    assert "endings" in asked
    assert "Passage 2: war ends" in asked
    assert judge.answer("endings", [window]) is None
    assert "between << and >>" in handler.requests[-1][2]["messages"][0]["content"]
    asked = len(handler.requests)
    handler.answers += [(302, f"{url}/elsewhere")]  # which would be told the key
    with pytest.raises(UserError, match=r"chat/completions: 302"):
        judge.explain([window], [])
    assert len(handler.requests) == asked + 1
    handler.answers += [(401, "no")]
    with pytest.raises(UserError, match=r"chat/completions: 401"):
        judge.explain([window], [])
    with pytest.raises(UserError, match="chat/completions: "):
        EndpointJudge("m", "http://127.0.0.1:9/v1", retries=0).explain([window], [])
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for address in (None, "file:///etc/passwd"):
        with pytest.raises(ConfigError, match=r"interpret.base_url="):
            EndpointJudge("m", address)


# ------------------------------------------------------------------------------------------------------------ experts

MOEX = dataclasses.replace(CONFIGS["moex"], layers=2)


@pytest.mark.slow
def test_experts():
    model = Decoder(MOEX, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 3, 20))
    segments = np.ones((3, 20), np.int32)
    segments[:, 16:] = 0
    batches = [{"tokens": t, "segment_ids": segments} for t in tokens]
    found = expert_figures(model, batches, 2)
    records = [model(jnp.asarray(t), segment_ids=jnp.asarray(segments), record=["ffn_scores", "expert_scores", "gate_scores"]).records for t in tokens]  # fmt: skip  # noqa: E501
    pre, weights, scores = (
        np.concatenate([np.asarray(r[name][1])[:, :16].reshape(48, 8, -1) for r in records])
        for name in ("ffn_scores", "expert_scores", "gate_scores")
    )
    l0, chosen = (pre > 0).sum(-1), weights[..., 0] != 0
    np.testing.assert_allclose(found.l0_by_expert, l0.mean(0), rtol=1e-6)
    assert found.l0_chosen == pytest.approx((l0 * chosen).sum(-1).mean())
    assert found.l0_oracle == pytest.approx(np.sort(l0, -1)[:, :2].sum(-1).mean())
    assert found.l0_not_chosen == pytest.approx(l0[~chosen].mean())
    expected = [np.corrcoef(scores[:, e, 0], l0[:, e])[0, 1] for e in range(8)]
    np.testing.assert_allclose(found.correlation, expected, atol=1e-4)
    load = chosen.mean(0) / 2
    np.testing.assert_allclose(found.load, load)
    assert found.load_entropy == pytest.approx(-(load[load > 0] * np.log(load[load > 0])).sum() / np.log(8))
    assert found.oracle_gap >= 0
    assert expert_figures(Decoder(CONFIGS["gpt2"], rngs=nnx.Rngs(0)), batches, 1) is None


@pytest.mark.slow
def test_features_of_a_layer():
    model = Decoder(MOEX, rngs=nnx.Rngs(0))
    tokens, segments = np.full((1, 5), 3), np.array([[1, 1, 1, 2, 2]])
    features = ffn_features(model, 2)(tokens, segments)
    expected = model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments), record=["ffn_gate"]).records["ffn_gate"][1]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"interpret.layer=3: must be from 1 to 2"):
        ffn_features(model, 3, field="interpret.layer")


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command(small_corpus, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train.main([*flags(small_corpus, train__steps=2), "--eval.no-report", "--workdir", str(run)])
    small = [f"--interpret.{k}={v}" for k, v in {"features": 2, "contexts": 32, "window": 4, "train-windows": 5, "test-windows": 10, "min-windows": 15, "layer": 1}.items()]  # fmt: skip  # noqa: E501
    capsys.readouterr()
    assert call(evaluate, [run, "--interpret", *small, "--split", "train", "--json"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["judge"], figures["judge_kind"], figures["layer"]) == ("tokens", "surrogate", 1)
    assert len(figures["features"]) == 2
    assert len(figures["by_bucket"]["detection"]) == 11
    args = [run, "--kind", "topk", "--sae.features", 32, "--sae.k", 4, "--train.steps", 3, "--train.batch-size", 64]
    assert call(sae, [*args, "--batches", 1], monkeypatch) == 0
    dictionary = run / "sae" / "topk-residual-2"
    capsys.readouterr()
    explained = [run, "--interpret", *small, "--interpret.sae", dictionary, "--split", "train"]
    assert call(evaluate, explained, monkeypatch) == 0
    table = capsys.readouterr().out
    assert "surrogate" in table
    assert "balanced accuracy" in table
    for bad, message in (
        (["--interpret.features", 2], "--interpret=False: must be given with --interpret.* flags"),
        (["--interpret", "--interpret.judge", "endpoint"], "interpret.model=None: must be given for judge=endpoint"),
        (["--interpret", "--interpret.layer", 5], "interpret.layer=5: must be from 1 to 2"),
        (["--interpret", "--interpret.test-windows", 15], "interpret.test_windows=15: must be a multiple of 10"),
        (["--interpret", "--interpret.sae", tmp_path], "no autoencoder here"),
    ):
        assert call(evaluate, [run, *bad], monkeypatch) == 2
        assert message in capsys.readouterr().err.replace("│", "")
