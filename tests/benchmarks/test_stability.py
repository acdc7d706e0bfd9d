"""`benchmarks.stability`: spikes, what logged steps say, the tables."""

import argparse
import json
import math
import sys

import pytest

from benchmarks import stability
from sparsezoo_jax import preset
from sparsezoo_jax.errors import UserError


def test_a_spike_is_far_above_the_steps_before():
    calm = [5.0 + 0.1 * (-1) ** step for step in range(40)]  # standard deviation 0.1
    assert stability.spikes(calm, 8, 4.0) == []
    assert stability.spikes([*calm[:20], 5.39, *calm[20:]], 8, 4.0) == []
    assert stability.spikes([*calm[:20], 5.41, *calm[20:]], 8, 4.0) == [20]
    assert stability.spikes([*calm[:3], 9.0, *calm[3:]], 8, 4.0) == []  # too few steps before it
    assert stability.spikes([*calm[:20], math.nan, *calm[20:]], 8, 4.0) == [20]


def test_logged_steps_count_after_the_warm_up(tmp_path):
    rows = [{"step": step, "loss": 5.0 + 0.1 * (-1) ** step, "grad_norm": 1.0} for step in range(1, 41)]
    rows[2] |= {"loss": 50.0, "grad_norm": 99.0}
    rows[30] |= {"loss": 6.0, "grad_norm": 3.0}
    rows.append({"step": 40, "split": "validation", "loss": 70.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = stability.of_training(tmp_path, warmup=4, window=8, deviations=4.0)
    assert found == {"spikes": 1 / (36 - 8), "largest_gradient": 3.0}
    with pytest.raises(UserError, match="36 steps after the warm-up are no more than --window 36"):
        stability.of_training(tmp_path, warmup=4, window=36, deviations=4.0)


def test_tables_are_of_the_record(tmp_path, monkeypatch, capsys):
    own, record = preset("spark", "tiny").train.schedule.learning_rate, {}
    for factor, loss in zip(stability.FACTORS, (5.5, 5.0, 4.9, 5.2, math.nan), strict=True):
        run = {"loss": loss, "spikes": 0.01 * factor, "largest_gradient": factor}
        if factor == 1.0:
            run["dead"] = {"80": {"neurons": 0.25}, "160": {"neurons": 0.5}}
        record[f"pysource-spark-lr{own * factor:g}-seed0-steps150"] = run
    record["pysource-dense-lr0.001-seed0-steps150"] = run  # not all rates: not shown
    (tmp_path / "stability.json").write_text(json.dumps(record))
    command = ["stability", "--archs", "dense", "spark", "--record", str(tmp_path / "stability.json"), "--table"]
    monkeypatch.setattr(sys, "argv", command)
    stability.main()
    shown = capsys.readouterr().out
    assert f"| spark | {own:g} | +0.600 | +0.100 | 4.900 | +0.300 | +nan | 1.0%; 4.0% | 1.0; 4.0 |" in shown
    assert "| spark, steps 80, 160 | 25.0%, 50.0% | – |" in shown
    assert f'Best rates: {{"spark": {own:g}}}' in shown
    assert "dense" not in shown


def test_what_died_is_measured_once_and_of_the_best_run(tmp_path, monkeypatch):
    options = argparse.Namespace(
        record=tmp_path / "stability.json", runs=tmp_path, dataset="text", seed=0, steps=150, batches=8
    )
    runs, measured = {0.1: {"loss": 5.0}, 0.2: {"loss": 4.0}, 0.4: {"loss": math.nan}}, []
    monkeypatch.setattr(stability, "dead", lambda run, batches: measured.append(run) or {"150": {"neurons": 0.5}})
    for _ in range(2):
        stability.with_death("spark", runs, options)
    assert measured == [tmp_path / "text-spark-lr0.2-seed0-steps150"]
    assert "dead" not in runs[0.1]
    (kept,) = json.loads(options.record.read_text()).values()
    assert (kept["loss"], kept["dead"]) == (4.0, {"150": {"neurons": 0.5}})
