"""The table of logical axes: what is split over what, and that nothing large is left out."""

import math
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sparsezoo_jax.configs import PRESETS, preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder, build_model
from sparsezoo_jax.sharding import (
    AXES,
    MeshConfig,
    check_batch,
    check_neurons,
    constrain,
    gather_axis,
    narrow_columns,
    num_replicas,
    partition_spec,
    undivided,
)
from sparsezoo_jax.training.state import ModelTemplate, Variable


def mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("embed", "ffn"), (64, 256), {"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 64, 8, 16), {"fsdp": 4, "tensor": 2},
         (None, "fsdp", "tensor", None)),
        (("batch", "length", "embed"), (16, 32, 64), {"data": 2, "fsdp": 4, "context": 2},
         (("data", "fsdp"), "context", None)),
        # Experts take their axis before the width does, wherever they stand.
        (("embed", "experts"), (64, 8), {"fsdp": 2, "expert": 4}, ("fsdp", "expert")),
        (("embed", "vocab"), (64, 512), {"fsdp": 2, "expert": 4}, (None, ("fsdp", "expert"))),
        # An axis that does not divide the dimension is left out, with those after it.
        (("embed", "kv_heads"), (64, 4), {"tensor": 8}, (None, None)),
        (("embed",), (6,), {"fsdp": 2, "expert": 4}, ("fsdp",)),
    ],
)  # fmt: skip
def test_partition(axes, shape, sizes, expected):
    assert partition_spec(axes, shape, mesh(**sizes)) == PartitionSpec(*expected)


def test_undivided_names_the_dimension_and_the_axes_left():
    assert undivided(("embed", "kv_heads"), (64, 4), mesh(tensor=8)) == {"kv_heads": ("tensor",)}
    assert undivided(("embed", "kv_heads"), (64, 8), mesh(tensor=8, fsdp=2)) == {}


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match="logical axis=width"):
        partition_spec(("width",), (8,), mesh())


LARGE = 2**17


def one_layer(variable):
    """Shape of a parameter of a single layer."""
    return variable.shape[len(variable.shape) - len(variable.axes or variable.shape) :]


PRESET_NAMES = [(arch, size) for arch, sizes in PRESETS.items() for size in sizes]


@pytest.fixture(scope="module")
def parameters_of():
    found = {}

    def describe(arch, size):
        if (arch, size) not in found:
            model = PRESETS[arch][size].model
            found[arch, size] = ModelTemplate(lambda rngs: build_model(model, rngs=rngs)).parameters
        return found[arch, size]

    return describe


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}], ids=str
)
@pytest.mark.parametrize(("arch", "size"), PRESET_NAMES)
def test_no_large_parameter_is_repeated_within_a_model_copy(parameters_of, arch, size, sizes):
    repeated = {
        name: num_replicas(variable.full_axes, variable.shape, mesh(**sizes))
        for name, variable in parameters_of(arch, size).items()
        if math.prod(one_layer(variable)) >= LARGE
    }
    # Some vocabularies are odd (GPT-2's 50,257, MiniCPM's 122,753): tensor parallelism can't split them.
    # So are the positions of a chess game (1,023).
    model, tensor = PRESETS[arch][size].model, sizes.get("tensor", 1)
    allowed = {"embedding_VD", "output_DV"} if model.vocab_size % tensor != 0 else set()
    allowed |= {"positions_PD"} if model.max_seq_len % tensor != 0 else set()
    # A tensor axis splits no scores of a router, which are few, but its weights are many with 256 experts.
    allowed |= {name for name in repeated if name.endswith("ffn/router_DE") and tensor > 1}
    # Nor pixels of a patch, and the step to a narrower decoder of images.
    allowed |= {name for name in repeated if name.endswith(("patches_PD", "pixels_EP", "enter_DE")) and tensor > 1}
    # The smallest models of images have no large ones.
    assert repeated or (model.images.patch is not None and model.d_model < 128)
    assert {name for name, count in repeated.items() if count > 1} <= allowed


def test_a_parameter_without_names_would_be_found():
    assert num_replicas((None, None), (512, 512), mesh(fsdp=8)) == 8


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 4, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=4), 8, (1, 2, 1, 1, 4)),
        (MeshConfig(fsdp=4, slices=2), 8, (2, 4, 1, 1, 1)),
    ],
)
def test_mesh_shapes(config, devices, shape):
    assert tuple(config.shape(devices).values()) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "mesh.data=3: doesn't use all 8 devices"),
        (MeshConfig(fsdp=3), "can't be chosen: mesh.fsdp=3"),
        (MeshConfig(fsdp=8, slices=2), "mesh.slices=2: must divide the data axis of 1"),
    ],
)
def test_impossible_meshes(config, message):
    with pytest.raises(ConfigError, match=message):
        config.shape(8)


def test_impossible_mesh_fields():
    with pytest.raises(ConfigError, match=r"mesh\.tensor=0: must be above 0"):
        MeshConfig(tensor=0)
    with pytest.raises(ConfigError, match=r"mesh\.data=3: must be a multiple of mesh\.slices=2"):
        MeshConfig(data=3, slices=2)


def test_batches_that_do_not_split():
    check_batch((8, 32), mesh(data=2, fsdp=4), accumulation=1)
    with pytest.raises(ConfigError, match=r"data\.batch_size=8: must be a multiple of mesh\.data=2 \* mesh\.fsdp=4 \*"):
        check_batch((8, 32), mesh(data=2, fsdp=4), accumulation=2)
    with pytest.raises(ConfigError, match=r"data\.seq_len=33: must be a multiple of mesh\.context=2"):
        check_batch((8, 33), mesh(context=2))


def test_neurons_that_do_not_split():
    parameters = {"ffn/up_EDW": Variable((2, 3, 8, 12), ("experts", "embed", "ffn"))}
    check_neurons(parameters, mesh(tensor=4, fsdp=8))
    with pytest.raises(ConfigError, match=r"mesh\.tensor=8: must divide the 12 neurons or experts of ffn/up_EDW"):
        check_neurons(parameters, mesh(tensor=8))


def test_narrow_columns_name_a_mesh_that_avoids_them():
    config = preset("spark", "2b").model
    parameters = ModelTemplate(lambda rngs: Decoder(config, rngs=rngs)).parameters
    line = narrow_columns(parameters, mesh(fsdp=64))
    assert line is not None
    assert "--mesh.fsdp 64 leaves 36 columns of" in line
    assert line.endswith("--mesh.fsdp 16 --mesh.data 4 avoids it"), "2,304 / 16 = 144"
    assert narrow_columns(parameters, mesh(fsdp=16, data=4)) is None
    # Columns of a vocabulary or of neurons that tensor cuts are not changed by another fsdp.
    small = {"w": SimpleNamespace(full_axes=("embed", "ffn"), shape=(512, 256))}
    assert narrow_columns(small, mesh(tensor=4)) == (
        "--mesh.tensor 4 leaves 64 columns of w to a device, where a TPU's tiles have 128"
    )
    assert narrow_columns({"w": SimpleNamespace(full_axes=("embed", "ffn"), shape=(512, 64))}, mesh(tensor=4)) is None


def test_gathered_axes_leave_the_others_and_the_gradient_as_they_are():
    w = jax.numpy.ones((8, 4))
    gathered = lambda w: gather_axis(w, 0)  # noqa: E731
    assert "sharding_constraint" not in str(jax.make_jaxpr(gathered)(w)), "no mesh"
    with jax.sharding.use_abstract_mesh(mesh(fsdp=4, tensor=2)):
        forward = str(jax.make_jaxpr(gathered)(w))
        both = str(jax.make_jaxpr(jax.grad(lambda w: jax.numpy.sum(gathered(w) ** 2)))(w))
    assert forward.count("sharding_constraint") == both.count("sharding_constraint") == 1
    assert "UNCONSTRAINED" in forward.replace("unconstrained", "UNCONSTRAINED")


def test_constraints_do_nothing_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, ("batch", "no such name")) is x
