"""Runs are evaluated and generate on several devices as they do on one."""

import pytest

from sparsezoo_jax import evaluate
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.mesh_flags import MeshFlags
from sparsezoo_jax.sharding import MeshConfig
from tests.sharding.inference_on_meshes import MESHES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(on_eight_devices, tmp_path_factory):
    return on_eight_devices("inference_on_meshes", str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("arch", MESHES)
def test_figures_are_those_of_one_device(found, arch):
    mesh, one = found[arch]["mesh"], found[arch]["one"]
    assert mesh["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert mesh["density"] == pytest.approx(one["density"], rel=1e-5)
    assert mesh["accuracy"] == one["accuracy"]
    assert mesh["active"] == pytest.approx(one["active"], rel=1e-5)
    assert mesh["packed"] == (one["packed"] and pytest.approx(one["packed"], rel=1e-4))  # in bfloat16


@pytest.mark.parametrize("arch", MESHES)
def test_texts_are_those_of_one_device(found, arch):
    mesh, one = found[arch]["mesh"], found[arch]["one"]
    assert mesh["rows"] == one["rows"]
    assert mesh["drafted"] == one["drafted"]


@pytest.mark.parametrize(("arch", "devices"), [("spark", 4), ("moe", 2)])
def test_devices_share_the_weights(found, arch, devices):
    mesh = found[arch]["mesh"]
    assert mesh["loaded"] < 1.1 * mesh["all"] / devices
    assert mesh["laid_out"] < 1.1 * mesh["all_laid_out"] / devices


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match=r"mesh=\{'tensor': 4096\}: needs 4096 devices, there are 1"):
        MeshFlags(mesh=MeshConfig(data=1, tensor=4096)).build_mesh()


def test_tasks_run_on_one_device(monkeypatch, tmp_path):
    monkeypatch.setattr(MeshFlags, "build_mesh", lambda self: type("Mesh", (), {"size": 2})())
    with pytest.raises(ConfigError, match="--tasks=a: are run on one device, not on a mesh of 2"):
        evaluate.evaluate_tasks(evaluate.Evaluate(directory=tmp_path, tasks="a"))
