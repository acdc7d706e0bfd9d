"""Checkpoints on the machines' own disks: gone on from where newer, passed over where they can't be used."""

import shutil

import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.parameters import saved_steps

from .test_loop import rows, run
from .test_step import assert_equal
from .toy import config


@pytest.fixture
def local(tmp_path):
    return tmp_path / "local"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final state of a run that nothing happened to."""
    return run(tmp_path_factory.mktemp("whole"), writers=[]).state


def stopped(workdir, local, **changes):
    """A run of 6 steps that stopped after step 5, which it did not save: in its directory 3, on the local disk 2, 4."""
    places = {"local_checkpoints": str(local), "local_checkpoint_every": 2}
    run(workdir, checkpoint_every=3, stop_at=5, keep_last=9, **places, **changes)
    shutil.rmtree(workdir / "checkpoints" / "5")  # as if it had been killed
    return places


def test_the_newest_is_the_local_one(tmp_path, local, whole, capsys):
    places = stopped(tmp_path / "run", local)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [3]
    resumed = run(tmp_path / "run", **places)
    assert resumed.resumed_from == 4
    assert_equal(resumed.state, whole)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["lost", "cut", "empty", "described wrongly", "no directory"])
def test_without_a_local_step_the_run_directory_has_one(tmp_path, local, whole, harm, capsys):
    places = stopped(tmp_path / "run", local)
    (own,) = local.glob("*/0-of-1")
    newest = own / "4"
    match harm:
        case "lost":
            shutil.rmtree(local)
        case "cut":
            for path in newest.glob("model/**/d/*"):
                path.write_bytes(path.read_bytes()[:10])
        case "empty":
            shutil.rmtree(newest / "model")
        case "described wrongly":
            (newest / "_CHECKPOINT_METADATA").write_text("[]")
        case "no directory":
            shutil.rmtree(local)
            local.write_text("a file")
    resumed = run(tmp_path / "run", **places)
    assert resumed.resumed_from == 3
    assert_equal(resumed.state, whole)
    said = capsys.readouterr().err
    assert ("warning: local checkpoints: " in said) == (harm in ("cut", "empty", "no directory")), said


def test_local_steps_after_the_one_gone_on_from_are_forgotten(tmp_path, local):
    places = stopped(tmp_path / "run", local)
    (own,) = local.glob("*/0-of-1")
    shutil.rmtree(own / "4" / "model")
    run(tmp_path / "run", stop_at=4, **places)
    assert [path.name for path in own.iterdir()] == ["2"]


def test_steps_of_another_run_are_not_taken(tmp_path, local):
    places = stopped(tmp_path / "run", local)
    shutil.rmtree(tmp_path / "run")
    assert run(tmp_path / "run", stop_at=1, **places).resumed_from == 0


def test_a_full_local_disk_is_said_and_the_run_goes_on(tmp_path, local, whole, monkeypatch, capsys):
    from sparsezoo_jax.training import local_checkpoints

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_checkpoints, "write_meta", full)
    result = run(tmp_path / "run", local_checkpoints=str(local), local_checkpoint_every=2)
    assert_equal(result.state, whole)
    assert "local checkpoints: saving step 2 in " in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"local_checkpoint_every": 3},
        {"local_checkpoints": " "},
        {"local_checkpoints": "/x", "local_checkpoint_every": 0},
    ],
)
def test_bad_settings(changes):
    with pytest.raises(ConfigError, match=r"train\.local_checkpoint"):
        config(**changes)
    assert config(local_checkpoints="/x", checkpoint_every=50).local_every() == 5
