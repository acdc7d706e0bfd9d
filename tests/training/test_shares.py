"""The measured shares of a mixture's corpora."""

import pytest

from sparsezoo_jax.training import shares
from sparsezoo_jax.training.loop import fit

from .test_loop import Recorder
from .toy import BATCH, LENGTH, ToyData, ToyModel, config


def test_shares_are_those_of_the_steps_since_the_last_row(tmp_path):
    data, recorder = ToyData(), Recorder()
    fit(
        config(steps=4, log_every=2),
        build=ToyModel,
        data=data,
        batch_shape=(BATCH, LENGTH),
        workdir=tmp_path,
        writers=[recorder],
        tokens_by_corpus=lambda: {"a": data.n, "b": 10 - data.n, "c": 0},
    )
    rows = {step: metrics for step, split, metrics in recorder.rows if split is None}
    # Batch n has n tokens of ten of corpus a. The batch of step 3 is drawn before step 2 is logged.
    assert {step: row["shares/a"] for step, row in rows.items()} == pytest.approx({2: 3 / 20, 4: 7 / 20})
    assert {step: row["shares/b"] for step, row in rows.items()} == pytest.approx({2: 17 / 20, 4: 13 / 20})
    assert all(row["shares/c"] == 0 for row in rows.values())


def test_shares_are_those_of_all_processes(monkeypatch):
    monkeypatch.setattr(shares, "gather", lambda mine: [mine, {"a": 30, "b": 0}])
    measured = shares.TokenShares()
    assert measured.take() == {}
    measured.add({"a": 10, "b": 40})
    measured.add({"a": 20, "b": 0})
    assert measured.take() == {"shares/a": 0.6, "shares/b": 0.4}
    assert measured.take() == {}
