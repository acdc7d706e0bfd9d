import json

import jax
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.training.loop import first_device
from sparsezoo_jax.training.replay import parse_window, replay

from .test_loop import run
from .toy import BATCH, LAYERS, LENGTH, ToyData, ToyModel, config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("replay")
    run(directory, steps=8, checkpoint_every=3, keep_last=5)
    return directory


def again(workdir, window, **changes):
    found = []
    path = replay(
        config(steps=8, **changes),
        window,
        build=ToyModel,
        data=ToyData(),
        batch_shape=(BATCH, LENGTH),
        workdir=workdir,
        place=first_device,
        to_device=jax.device_put,
        report=found.append,
    )
    return found, [json.loads(line) for line in path.read_text().splitlines()]


def test_a_window_is_made_again_bitwise_with_norms_of_layers(workdir):
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    log = (workdir / "metrics.jsonl").read_bytes()
    found, written = again(workdir, (5, 7))
    assert [(x.step, x.is_same) for x in found] == [(5, True), (6, True), (7, True)]
    assert [row["step"] for row in written] == [5, 6, 7]
    for kind in ("grad", "param", "update"):
        norms = written[0][f"{kind}_norms_by_layer/up"]
        assert len(norms) == LAYERS
        assert all(norm > 0 for norm in norms)
    by_layer = [np.sum(np.square(x)) for name, x in written[0].items() if name.startswith("grad_norms_by_layer/")]
    assert written[0]["grad_norm"] == pytest.approx(np.sqrt(sum(by_layer)), rel=1e-5)
    assert (workdir / "metrics.jsonl").read_bytes() == log
    assert {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")} == before


def test_steps_that_differ_are_said_to(workdir):
    found, _ = again(workdir, (8, 8), z_loss=0.5)
    assert [(x.step, x.is_same) for x in found] == [(8, False)]


def test_windows_that_cannot_be_replayed(workdir):
    for text in ("5", "7:5", "0:3", "a:b", ":", "-1:2"):
        with pytest.raises(ConfigError, match=r"debug\.replay=.*: must be A:B"):
            parse_window(text)
    assert parse_window("5:7") == (5, 7)
    with pytest.raises(UserError, match=r"no checkpoint before step 2; steps there are: 3, 6, 8"):
        again(workdir, (2, 4))
