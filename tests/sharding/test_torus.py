"""Rings of the network under a mesh axis, and the gathers that go along them."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest

from sparsezoo_jax.compilation.collectives import find_collectives
from sparsezoo_jax.compilation.hlo import parse
from sparsezoo_jax.compilation.topologies import prepare_environment
from sparsezoo_jax.models.contract import Head
from sparsezoo_jax.models.embedding import Tables, lookup_in_copies, project_on_copies
from sparsezoo_jax.sharding import MeshConfig, build_mesh, gather_copies, named_sharding, use_mesh
from sparsezoo_jax.torus import ring_sizes


def line(*sides):
    """Places of the devices of a torus, row after row."""
    return list(itertools.product(*(range(side) for side in sides)))


@pytest.mark.parametrize(
    ("places", "sizes"),
    [
        (line(4, 4, 4), (4, 4, 4)),
        (line(16, 16), (16, 16)),
        (line(2, 8, 4), (4, 8, 2)),
        (line(8), (8,)),
        ([(0, 0)] * 8, (8,)),
        # A part of a torus that is no grid by itself, and one that goes around a corner.
        (line(4, 4)[:6], (6,)),
        ([(0, 0), (0, 1), (1, 1), (1, 0)], (4,)),
    ],
)
def test_rings_of_a_line_of_devices(places, sizes):
    assert ring_sizes(places) == sizes


@pytest.mark.slow
def test_gathering_ring_by_ring_is_gathering(on_eight_devices):
    found = on_eight_devices("rings")
    assert found["rings"] == [[2, 2, 2], [2, 4], [8]]
    assert found["values"] == [0, 0, 0]
    assert found["gradients"] == [0, 0, 0], "sums of small integers are exact"
    assert found["gathers"] == [3, 2, 1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tied_table_is_gathered_once_and_its_gradient_scattered_on_64_chips():
    """XLA gathers over a mesh axis of 64 chips by an all-reduce of the whole table, and sums its gradient likewise."""
    prepare_environment()
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
    mesh = build_mesh(MeshConfig(fsdp=64), devices)
    place, rows, width, bf16 = named_sharding(mesh), 64 * 256, 512, jnp.dtype(jnp.bfloat16)

    def array(shape, axes, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place(axes, shape))

    def loss(table_VD, tokens_BT):
        tables = Tables(gather_copies(table_VD, ("vocab", "embed"), bf16), None)
        x_BTD, tables = lookup_in_copies(tables, tokens_BT, bf16)
        return jnp.sum(jax.nn.logsumexp(project_on_copies(tables, jnp.sin(x_BTD), Head()), axis=-1))

    table = array((rows, width), ("vocab", "embed"), jnp.float32)
    tokens = array((64, 128), ("batch", "length"), jnp.int32)
    with use_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, tokens).compile()
    whole = rows * width * 2
    # The last of three rings brings the whole table, those before a quarter and a sixteenth of it.
    found = find_collectives(parse(step.as_text()), dict(mesh.shape))
    payloads = {item.kind: item.payload for item in found if item.payload > whole / 64}
    assert set(payloads) == {"all-gather", "reduce-scatter"}
    assert all(payload == pytest.approx(whole * (1 + 1 / 4 + 1 / 16), rel=0.02) for payload in payloads.values())
