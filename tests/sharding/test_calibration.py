"""Runs are sparsified on several devices as they are on one, to rounding."""

from pathlib import Path

import pytest

from sparsezoo_jax import sparsify
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.mesh_flags import MeshFlags
from tests.sharding.calibrate_on_meshes import MESH


@pytest.fixture(scope="module")
def found(on_eight_devices):
    return on_eight_devices("calibrate_on_meshes")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["teal", "rsparse"])
def test_statistics_are_those_of_one_device(found, method):
    """Sums differ by the order of additions; a score that rounding moves over an edge is counted one bin further."""
    figures = found[method]
    assert figures["tokens"] == [7 * 16] * 2
    assert figures["counted"][::2] == figures["counted"][1::2]
    assert figures["moved"] < 0.03
    assert figures["squares"] < 1e-5
    assert figures["cuts"] < 1e-3
    shared = found["teal"]["shares"] if method == "teal" else found["rsparse"]["alphas"]
    assert shared[0] == shared[1]


@pytest.mark.slow
def test_weights_and_neurons_that_go_are_those_of_one_device(found):
    assert found["gblm"]["gradients"] < 1e-5
    assert found["gblm"]["others"] < 1e-3
    assert found["flap"]["widths"][0] == found["flap"]["widths"][1]
    assert found["flap"]["matrices"] < 1e-5


@pytest.mark.slow
def test_devices_share_the_weights(found):
    """Four of the eight devices split the weights; norms lie on all of them."""
    assert found["gblm"]["first_device"] < 1.1 * found["gblm"]["all"] / (MESH.fsdp * MESH.tensor)


@pytest.mark.slow
def test_what_is_cut_off_on_a_mesh_goes_on_there(found):
    assert found["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "blockffn"])
def test_experts_on_two_devices_are_those_of_one(found, kind):
    """What each expert reads of its tokens is counted once, wherever it lies, and so are weights compared."""
    figures = found["experts"][kind]
    assert {"up", "down", "q"} <= set(figures["maps"])
    assert figures["tokens"] == [7 * 16] * 2
    assert figures["counted"][::2] == figures["counted"][1::2]
    assert min(figures["counted"]) > 0
    assert figures["moved"] < 0.03
    assert figures["squares"] < 1e-5
    assert figures["cuts"] < 1e-3
    assert figures["others"] < 1e-3
    assert figures["zeros"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_experts_that_are_cut_off_on_a_mesh_go_on_there(found):
    assert found["experts"]["resumed"]


def test_what_trains_runs_on_one_device(monkeypatch):
    monkeypatch.setattr(MeshFlags, "build_mesh", lambda self: type("Mesh", (), {"size": 2})())
    command = sparsify.Sparsify(directory=Path("run"), out=Path("out"), method="readme")
    with pytest.raises(ConfigError, match="--method=readme: runs on one device, not on a mesh of 2"):
        sparsify.made_run(command)
