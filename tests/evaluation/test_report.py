"""The report: a page that can be parsed, needs nothing else and shows the run's numbers."""

import dataclasses
import itertools
import json
import os
import re
from xml.etree import ElementTree

import pytest

from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.evaluation import cost_table
from sparsezoo_jax.evaluation.expert_meters import ExpertMeters
from sparsezoo_jax.evaluation.history import Course, History
from sparsezoo_jax.evaluation.meters import (
    Activity,
    Attention,
    Count,
    LayerMeters,
    Meters,
    ScoreDistribution,
    SelectionQuality,
)
from sparsezoo_jax.evaluation.report import RunFigures, render, write_report
from sparsezoo_jax.evaluation.report.figures import written
from sparsezoo_jax.evaluation.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, bar_plot, line_plot
from sparsezoo_jax.evaluation_tables import print_experts
from sparsezoo_jax.training.objectives import FixedObjective

COUNT = Count(55.5, 6.25, {"5": 46, "25": 51, "50": 55, "75": 60, "95": 66})
QUALITY = SelectionQuality(100, 0.875, 0.8125, 0.84, 0.75, 0.07, 0.08)
SCORES = ScoreDistribution(1000, 0.125, 0.625, [-1.0, 0.0, 1.0], [-1.1, 0.0, 1.2])
ACTIVITY = Activity(768, COUNT, 61, 0.0723, 0.008, 2, [0.5, 0.25, 0.0])
LAYER = LayerMeters(
    ACTIVITY, QUALITY, SCORES, Attention(COUNT, 32, [1, 64, 128], [1.0, 31.5, 30.25], 30.5), QUALITY, SCORES
)
DENSE_LAYER = LayerMeters(
    dataclasses.replace(ACTIVITY, target=None, density=1.0, dead=0),
    None,
    None,
    Attention(COUNT, None, [1, 128], [1.0, 128.0], None),
    None,
    None,
)
CLS = {"1": 0.8054, "2": 0.78, "4": 0.75, "8": 0.7138, "16": 0.68, "32": 0.65, "64": None}
EXPERTS = ExpertMeters(
    4, 1, Count(1.25, 0.5, COUNT.percentiles), [0.0, 0.75, 0.25, 0, 0], 0.8054, CLS, {**CLS, "8": 0.7041}, 0.9028, 1,
    1.875, [0.5, 0.0, 0.25]
)  # fmt: skip
EXPERT_LAYER = dataclasses.replace(DENSE_LAYER, experts=EXPERTS)
TRAIN = Course(
    [10, 20],
    [7.5, None],
    {"ffn_density": [[0.08, 0.09], [0.07, None]], "attended_keys": [[30.0, 31.0], [29.0, 30.0]]},
)
NOTHING = Course([], [], {"ffn_density": [], "attended_keys": []})


def run(name="tiny", layer=LAYER, arch="spark", history=None, **configuration):
    config = preset(arch).model
    return RunFigures(
        name=name,
        configuration={"model.layers": 2, **configuration},
        parameters=1_509_504,
        evaluation={"loss": 4.7289, "step": 300, "perplexity": float("nan")},
        history=history or History(TRAIN, NOTHING, 0),
        meters=Meters(16_384, 8, (layer, layer), layer.experts),
        costs=cost_table(config, (512, 8192), None),
    )


def parsed(page):
    """The document as XML: every element is closed and every attribute quoted."""
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def test_page_stands_alone():
    page = render([run()])
    document = parsed(page)
    assert not re.search(r"https?://|//cdn|url\(|@import", page)
    assert not [e for e in document.iter() if e.tag in ("link", "img", "iframe", "object")]
    assert [e.get("type") for e in document.iter("script")] == ["application/json"]
    assert "prefers-color-scheme: dark" in page


def test_page_shows_the_numbers():
    text = text_of(parsed(render([run()])).find("body"))
    for shown in ("1,509,504", "4.7289", "7.23%", "0.812", "0.875", "4 of 1,536", "16,384 tokens", "0.125", "0.625"):
        assert shown in text, shown
    titles = [text_of(e) for e in parsed(render([run()])).iter("figcaption")]
    assert titles == [
        "Loss over training",
        "FFN density over training",
        "Attended keys over training",
        "Attended keys",
        "FFN: quantiles of scores",
        "FFN: selection against exact top-k, by layer",
        "Attention: quantiles of scores",
        "Attention: selection against exact top-k, by layer",
        "How often neurons are active",
        "FLOPs per token by context, mean position",
        "Bytes read per token by context, last position",
    ]


def test_figures_are_in_the_page():
    script = next(parsed(render([run("<a> & </script>")])).iter("script"))
    (figures,) = json.loads(script.text)
    assert figures["name"] == "<a> & </script>"
    assert figures["meters"]["layers"][0]["ffn"]["dead"] == 2
    assert figures["evaluation"] == {"loss": 4.7289, "step": 300, "perplexity": None}


def test_names_are_escaped():
    document = parsed(render([run("<b>x</b> & y"), run("z")]))
    assert [text_of(e) for e in document.iter("h2") if "&" in text_of(e)] == ["<b>x</b> & y"]


def test_dense_model():
    text = text_of(parsed(render([run("dense", DENSE_LAYER, "dense")])).find("body"))
    assert "100.00%" in text
    assert "selection against" not in text
    assert "FLOPs per token by context" in text


def test_experts():
    page = parsed(render([run("experts", EXPERT_LAYER, "blockffn")]))
    tables = {
        row[0]: row for table in page.iter("table") for row in [[text_of(c) for c in r] for r in table.iter("tr")]
    }
    assert tables["experts: TLS"][1] == "80.54%"
    assert tables["experts: CLS_8"][1] == "71.38%"
    assert tables["experts: CLS_8, chunks of the stream"][1] == "70.41%"
    assert tables["dead experts"][1] == "1 of 3"
    assert tables["all, chunks of the stream"][4] == "70.41%"
    assert tables["all"][-3:] == ["90.28%", "1", "1.88"]
    titles = [text_of(e) for e in page.iter("figcaption")]
    assert titles[-5:-2] == ["Experts: chunk-level sparsity", "Active experts of a token", "Load of experts"]
    assert "Experts: chunk-level sparsity" in render([run("a", EXPERT_LAYER), run("b")])
    assert "Experts: " not in text_of(parsed(render([run()])).find("body"))


def test_printed_experts(capsys):
    print_experts(Meters(16_384, 8, (EXPERT_LAYER, DENSE_LAYER, EXPERT_LAYER), EXPERTS).as_dict())
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").replace("┃", " ").splitlines()]
    shares = ["80.54%", "78.00%", "75.00%", "71.38%", "68.00%", "65.00%", "-"]
    assert [row for row in rows if row[1:] == shares] == [["0", *shares], ["2", *shares], ["all", *shares]]
    assert ["stream", *shares[:3], "70.41%", *shares[4:]] in rows
    assert ["all", "1.25", "46", "51", "55", "60", "66", "90.28%", "1", "1.88"] in rows
    print_experts(Meters(16_384, 8, (DENSE_LAYER,)).as_dict())
    assert capsys.readouterr().out == ""


def test_no_history():
    page = render([run(history=History(NOTHING, NOTHING, 3))])
    text = text_of(parsed(page).find("body"))
    assert "no metrics.jsonl" in text
    assert "3 lines of metrics.jsonl are no metrics" in text


def test_several_runs():
    evaluated = History(TRAIN, dataclasses.replace(TRAIN, loss=[6.0, 5.5]), 0)
    runs = [run("a", data="x"), run("b", DENSE_LAYER, "dense", data="y"), run("c", data="x", history=evaluated)]
    document = parsed(render(runs))
    assert [text_of(e) for e in document.iter("h2")] == ["Differences of configuration", "a", "b", "c"]
    tables = list(document.iter("table"))
    headline, differences = ([[text_of(c) for c in row] for row in table.iter("tr")] for table in tables[:2])
    assert headline[0] == ["", "a", "b", "c"]
    assert ["FFN density", "7.23%", "100.00%", "7.23%"] in headline
    assert differences == [["", "a", "b", "c"], ["data", "x", "y", "x"]]
    lines = next(document.iter("svg"))
    styles = [e.get("style") for e in lines.iter("path") if e.get("class") == "line" and e.get("d")]
    assert styles == [
        "stroke:var(--c0)",
        "stroke:var(--c1)",
        "stroke:var(--c2)",
        "stroke:var(--c2);stroke-dasharray:5 3",
    ]
    assert [text_of(e) for e in next(document.iter("ul")).iter("li")] == ["a", "b", "c"]


def test_a_run_has_one_colour_in_all_plots():
    nothing = History(NOTHING, NOTHING, 0)
    runs = [run("a", history=nothing), run("b", EXPERT_LAYER, "moe"), run("c", EXPERT_LAYER, "moe")]
    seen = {}
    for legend in itertools.islice(parsed(render(runs)).iter("ul"), 7):
        for item in legend.iter("li"):
            seen.setdefault(text_of(item), set()).add(item.find("span").get("style"))
    assert seen == {name: {f"background:var(--c{i})"} for i, name in enumerate("abc")}


def test_values_are_written_as_in_a_configuration():
    objectives = (FixedObjective(loss="l1", weight=0.5),)
    assert json.loads(written(objectives))[0] == {**dataclasses.asdict(objectives[0]), "kind": "fixed"}
    assert [written(value) for value in ("gelu", None, True, ("local", "global"), 1e-6)] == [
        "gelu",
        "null",
        "true",
        '["local", "global"]',
        "1e-06",
    ]


def test_density_of_mixtures():
    layers = (DENSE_LAYER, dataclasses.replace(EXPERT_LAYER, ffn=None))
    mixture = dataclasses.replace(run(), meters=Meters(1, 1, layers, EXPERTS))
    assert mixture.headline()["FFN density"] == f"{(1 + 0.1946) / 2:.2%}"


def test_tokens_of_a_step():
    assert run(**{"data.batch_size": "8", "data.seq_len": "256"}).headline()["tokens of a step (rows x length)"] == (
        "2,048 (8 x 256)"
    )
    assert run().headline()["tokens of a step (rows x length)"] == "–"


@pytest.mark.parametrize("width", [420, 1280])
def test_layout_in_a_browser(width, tmp_path):
    """Nothing is wider than the screen, and the first values of the first table are on it."""
    playwright = pytest.importorskip("playwright.sync_api")
    values = {f"field_{i}": "a_long_value_" * 20 for i in range(3)}
    page = render([run("a" * 40, **values), run("b", EXPERT_LAYER, "moe"), run("c")])
    (tmp_path / "report.html").write_text(page)
    flags = ["--no-sandbox", "--no-zygote", "--single-process"]
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=flags)
        except playwright.Error:
            pytest.skip("no Chromium: name one in $CHROMIUM")
        shown = browser.new_page(viewport={"width": width, "height": 900})
        shown.goto(f"file://{tmp_path}/report.html")
        found = shown.evaluate("""() => ({
          page: document.documentElement.scrollWidth, screen: innerWidth,
          cell: document.querySelector("td:nth-child(2)").getBoundingClientRect().right })""")
        shown.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)
        browser.close()
    assert found["screen"] == width
    assert found["page"] <= width
    assert found["cell"] <= width


# ---------------------------------------------------------------------------------------------------------------- Plots


def points(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]


def test_lines_are_where_their_axis_says():
    figure = ElementTree.fromstring(line_plot("t", "x", "y", [Series("s", [0, 5, 10], [0.0, 50.0, 100.0])]))
    (line,) = [e for e in figure.iter("path") if e.get("class") == "line"]
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    assert points(line.get("d")) == [(left, bottom), ((left + right) / 2, (TOP + bottom) / 2), (right, TOP)]
    ticks = {e.text: (float(e.get("x")), float(e.get("y"))) for e in figure.iter("text") if e.get("class") == "tick"}
    assert ticks["100"][1] == TOP + 4
    assert ticks["10"][0] == right
    tooltips = [e.find("title").text for e in figure.iter("circle")]
    assert tooltips == ["s at 0: 0", "s at 5: 50", "s at 10: 100"]


def test_logarithmic_axis_and_gaps():
    series = Series("s", [0, 1, 2, 3, 4], [1.0, 0.01, 0.0, None, 0.0001])
    figure = ElementTree.fromstring(line_plot("t", "x", "y", [series], log_y=True))
    (line,) = [e.get("d") for e in figure.iter("path") if e.get("class") == "line"]
    assert line.count("M") == 2, "a zero and a missing value leave a gap"
    bottom = HEIGHT - BOTTOM
    assert [y for _, y in points(line)] == pytest.approx([TOP, (TOP + bottom) / 2, bottom], abs=0.1)


def test_bars_are_where_their_axis_says():
    figure = ElementTree.fromstring(bar_plot("t", "y", ["a", "b"], [("s", [1.0, 4.0]), ("u", [2.0, None])]))
    bars = [(e.find("title").text, float(e.get("height"))) for e in figure.iter("rect")]
    full = HEIGHT - BOTTOM - TOP
    assert bars == [("s, a: 1", pytest.approx(full / 4)), ("u, a: 2", pytest.approx(full / 2)), ("s, b: 4", full)]


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.0, 0.0], [-2.0, -2.0], [1e-30, 2e-30], [1e12, 3e12], [0.95, 0.951]])
def test_axes_hold_all_values(values):
    figure = ElementTree.fromstring(line_plot("t", "x", "y", [Series("s", [1, 2], values)]))
    (line,) = [e for e in figure.iter("path") if e.get("class") == "line"]
    assert all(TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for _, y in points(line.get("d")))
    ticks = [float(e.get("y")) for e in figure.iter("text") if e.get("text-anchor") == "end"]
    assert 2 <= len(ticks) <= 9
    assert all(a - b >= 14 for a, b in itertools.pairwise(ticks)), "labels do not overlap"


def test_no_data():
    assert "no data" in line_plot("t", "x", "y", [Series("s", [1], [None])])
    assert "no data" in bar_plot("t", "y", ["a"], [("s", [None])])


# -------------------------------------------------------------------------------------------------------------- Writing


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, [run()])
    before = path.read_text()
    assert before == render([run()])
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(path / "report.html", [run()])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report(path, [run("other")])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_links_in_a_directory_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("report.html", ".report.html.partial"):
        (tmp_path / name).symlink_to(precious)
    write_report(tmp_path / "report.html", [run()])
    assert precious.read_text() == "precious"
    assert not (tmp_path / "report.html").is_symlink()
