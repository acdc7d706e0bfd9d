"""The leaderboard of made-up results: what it shows, and how it says what is missing."""

import json
import re

import pytest

from benchmarks import interpretability, leaderboard, zoo
from sparsezoo_jax.errors import UserError


def run(loss, **changes):
    return {"loss": loss, "parameters": 1_500_000.0, "density": 0.25, "flops": 2e6, "dense_flops": 3e6} | changes


RUNS = {
    "dense-lr0.008-seed0-steps300": run(5.0, density=1.0, flops=3e6),
    "dense-lr0.008-seed1-steps300": run(5.2),
    "dense-lr0.008-seed2-steps300": run(4.8),
    "dense-lr0.004-seed0-steps300": run(5.5),
    "dense-lr0.004-seed1-steps300": run(4.0),
    "dense-lr0.016-seed0-steps300": run(5.3),
    # The best rate is the first seed's; another rate's second seed and other lengths don't count.
    "spark-lr0.016-seed0-steps300": run(4.9),
    "spark-lr0.016-seed1-steps300": run(5.1),
    "spark-lr1e-05-seed1-steps300": run(1.0),
    "spark-lr0.008-seed0-steps900": run(3.0),
}


def explained(mean, l0):
    score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.05}
    return {"accuracy": {"detection": score, "fuzzing": score}, "l0": l0, "judge_kind": "surrogate"}


SCORES = {
    "spark-steps300-tokens": explained(0.75, 41.2),
    "dense-topk-at-spark-steps300-tokens": explained(0.65, 41.0),
    "moex-steps300-endpoint": explained(0.9, 12.0),
}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "zoo.json").write_text(json.dumps(RUNS))
    (tmp_path / "results" / "interpretability.json").write_text(json.dumps(SCORES))
    return tmp_path / "results"


def made(results, capsys, *flags):
    out = results.parent / "out"
    leaderboard.main(["--results", str(results), "--out", str(out), *flags])
    return (out / "leaderboard.md").read_text(), (out / "leaderboard.html").read_text(), capsys.readouterr().out


def cells(text, name):
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    return row.split(" | ")


def test_best_runs():
    best = zoo.best_runs(RUNS, 300)
    assert set(best) == {"dense", "spark"}
    assert (best["dense"].first, best["dense"].losses) == ("dense-lr0.008-seed0-steps300", [5.0, 5.2, 4.8])
    assert (best["spark"].first, best["spark"].losses) == ("spark-lr0.016-seed0-steps300", [4.9, 5.1])
    assert zoo.best_runs(RUNS, 900)["spark"].losses == [3.0]
    assert [best[arch].searched for arch in ("dense", "spark")] == [True, False]
    many = {f"deco-lr{2**i}-seed0-steps300": run(i) for i in range(6)}
    assert zoo.best_runs(many, 300)["deco"].searched, "the search goes no further"


def test_the_table(results, capsys):
    text, html, printed = made(results, capsys)
    assert cells(text, "dense")[:7] == ["1,500,000", "5.0000 (0.4000)", "3 of 3", "+0.00%", "100.0%", "3.00", "1.00"]
    scores = ["41.2", "0.750 (0.650 .. 0.800)", "0.750 (0.650 .. 0.800)"]
    spark = ["1,500,000", "5.0000 (0.2000) †", "2 of 3", "+0.00%", "25.0%", "2.00", "1.50", *scores]
    assert cells(text, "spark") == spark
    assert cells(text, "dense, topk at spark's L0")[-3:] == ["41.0", *["0.650 (0.550 .. 0.700)"] * 2]
    assert cells(text, "dense, topk at spark's L0")[:7] == ["–"] * 7
    assert cells(text, "moex") == ["missing"] * 10, "another judge's scores are not shown as this one's"
    assert cells(text, "deco") == [*["missing"] * 7, *["–"] * 3]
    for name in zoo.ARCHS:
        assert cells(text, name)
    assert "vit" not in text
    assert "- deco: loss: `python -m benchmarks.zoo --archs deco --steps 300 --only-train`" in text
    for what in ("seeds, 1 of 3", "learning rates beyond the best so far"):
        assert f"- spark: {what}: `python -m benchmarks.zoo --archs spark" in text
        assert f"dense: {what}" not in text
    command = "python -m benchmarks.interpretability --archs moex --steps 300 --judge tokens"
    assert f"- moex: detection and fuzzing: `{command}`" in text
    assert f"missing: moex: detection and fuzzing: {command}" in printed
    assert "judge tokens (surrogate)" in text
    assert "spark: detection" not in printed
    # The page has the same cells and is whole by itself.
    for cell in (*spark, command, "dense, topk at spark&#x27;s L0"):
        assert f">{cell}</td>" in html
    assert len(re.findall("<svg", html)) == 3
    assert not re.search(r"(src|href)\s*=", html)
    assert "<title>spark, 300 steps: 2</title>" in html
    figures = json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)[1])
    assert figures["spark"]["autoencoder"]["detection"]["mean"] == 0.65


def test_without_results_all_is_missing(tmp_path, capsys):
    text, html, printed = made(tmp_path, capsys)
    assert cells(text, "dense") == [*["missing"] * 7, *["–"] * 3]
    assert printed.count("missing: ") == len(zoo.ARCHS) + 6
    assert "no data" in html


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "zoo.json: must hold an object of runs by name"),
        ("{", "zoo.json: not JSON"),
        (
            '{"dense-lr1-seed0-steps300": {"loss": 1.0}}',
            "seed0-steps300: lacks parameters, density, flops, dense_flops",
        ),
    ],
)
def test_files_that_hold_something_else(results, capsys, content, message):
    (results / "zoo.json").write_text(content)
    with pytest.raises(UserError, match=message):
        made(results, capsys)
    assert not (results.parent / "out").exists()
    with pytest.raises(UserError, match=r"--results=.*none: no such directory"):
        leaderboard.main(["--results", str(results / "none")])


def test_autoencoders_have_the_l0_of_the_sparse_model(results, tmp_path, monkeypatch, capsys):
    """Each is trained on the dense run with as many features as the sparse run's FFN has, and measured there."""
    runs, asked, trained, again = tmp_path / "runs", [], [], {}
    monkeypatch.setattr(interpretability.zoo, "figures_of", lambda run, arch, flags: again.update({run: (arch, flags)}))

    def interpret(command):
        asked.append((command.directory.name, command.interpret.sae))
        found = explained(0.7, 41.7 if command.interpret.sae is None else 42.0)
        more = {"judge": "tokens", "layer": 3, "dead": 0.0, "zipf": None, "tokens": 9, "failed": {}, "features": [1, 2]}
        return {**found, **more}

    monkeypatch.setattr(interpretability.evaluate, "interpret", interpret)
    monkeypatch.setattr(interpretability.sae, "train", trained.append)
    (results / "interpretability.json").unlink()
    args = ["--runs", str(runs), "--zoo", str(results / "zoo.json"), "--archs", "spark"]
    args += ["--record", str(results / "interpretability.json")]
    interpretability.main(args)
    place = runs / "topk-at-spark-steps300"
    # Both runs are there, or are trained again as they were.
    assert list(again) == [runs / "dense-lr0.008-seed0-steps300", runs / "spark-lr0.016-seed0-steps300"]
    arch, flags = again[runs / "spark-lr0.016-seed0-steps300"]
    assert (arch, flags["train.schedule.learning-rate"], flags["train.steps"]) == ("spark", "0.016", "300")
    assert asked == [("spark-lr0.016-seed0-steps300", None), ("dense-lr0.008-seed0-steps300", str(place))]
    assert [(t.sae.k, t.directory.name, t.workdir) for t in trained] == [(42, asked[1][0], place)]
    assert "| dense, topk at spark's L0 | 42.0 | 0.700 (0.600 .. 0.750) |" in capsys.readouterr().out
    interpretability.main(args)
    assert len(asked) == 2, "figures in the record are not measured again"
    assert cells(made(results, capsys)[0], "spark")[-3] == "41.7"
    with pytest.raises(
        UserError, match=r"no run of moex; python -m benchmarks.zoo --archs moex --steps 300 --only-train"
    ):
        interpretability.main([*args[:-3], "moex", *args[-2:]])
