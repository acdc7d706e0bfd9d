"""Training on eight devices gives what one device gives."""

import pytest

from sparsezoo_jax.configs import PRESETS
from tests.sharding.train_on_meshes import COVERED, INITIALISED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def differences(on_eight_devices):
    return on_eight_devices("train_on_meshes")


CASES = [(arch, mesh) for arch, meshes in COVERED.items() for mesh in meshes]


def test_every_architecture_trains_on_a_mesh():
    of_images = {arch for arch, sizes in PRESETS.items() if sizes["tiny"].model.images.patch is not None}
    assert set(COVERED) - {"adapters", "altup", "lemo", "readme"} == set(PRESETS) - of_images  # see test_vision


# Sums over devices are taken in another order, so float32 results differ by rounding, 6e-8 an operation. Distances are
# relative, in the 2-norm, of the worst parameter.
@pytest.mark.parametrize(("arch", "mesh"), CASES)
def test_meshes_agree_with_one_device(differences, arch, mesh):
    found = differences[arch][mesh]
    assert found["loss"] < 1e-5
    assert found["grad_norm"] < 1e-4
    assert found["gradients"] < 3e-5
    assert found["parameters"] < 3e-5


@pytest.mark.parametrize(("arch", "mesh"), sorted(INITIALISED))
def test_a_state_made_on_a_mesh_is_that_of_one_device(differences, arch, mesh):
    """Random numbers are those of the seed on any mesh; what is computed from them is rounded, 6e-8 an operation."""
    assert differences[arch][mesh]["initial"] < 1e-6


@pytest.mark.parametrize(("arch", "mesh"), CASES)
def test_only_vectors_and_routers_are_repeated_within_a_model_copy(differences, arch, mesh):
    """Each device routes its own tokens over all experts, so that columns of a mixture's router are not split.

    One side of an adapter is a rank, which is not split either, and coefficients of AltUp are few.
    """
    repeated = ("/scale", "/norm_scale_W", "/router_DE", "/router_scale_E", "/lora_a", "/lora_b")
    repeated += ("/router_DS", "/prediction_SC", "/correction_SS", "/input_step", "/hidden_step")
    assert all(name.endswith(repeated) for name in differences[arch][mesh]["held"])
