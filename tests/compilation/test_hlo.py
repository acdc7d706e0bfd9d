"""Reading compiled modules: handwritten texts with known numbers, and real programs whose communication is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsezoo_jax.compilation.collectives import find_collectives
from sparsezoo_jax.compilation.hlo import parse, shape_bytes
from sparsezoo_jax.compilation.topologies import open_topology

# Eight devices, mesh data=2 x tensor=4. A loop of 5 trips sums f32[16] over tensor and gathers bf16[8] over data.
LOOP = """HloModule made_up, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[16], bf16[8])) -> (s32[], f32[16], bf16[8]) {
  %p = (s32[], f32[16]{0:T(128)}, bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %y = bf16[8]{0} get-tuple-element(%p), index=2
  %reduced = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %start = (bf16[8]{0}, bf16[16]{0}) all-gather-start(%y), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %done = bf16[16]{0} all-gather-done(%start)
  %part = bf16[8]{0} slice(%done), slice={[0:8]}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[16]{0}, bf16[8]{0}) tuple(%next, %reduced, %part)
}

%cond (p.1: (s32[], f32[16], bf16[8])) -> pred[] {
  %limit = s32[] constant(5)
  %p.1 = (s32[], f32[16]{0}, bf16[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%all-reduce-scatter.1 (q: f32[64]) -> f32[16] {
  %q = f32[64]{0} parameter(0)
  %all = f32[64]{0} all-reduce(%q), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  ROOT %own = f32[16]{0} slice(%all), slice={[0:16]}
}

ENTRY %main (x.2: f32[16], y.2: bf16[8], q.2: f32[64]) -> f32[16] {
  %x.2 = f32[16]{0} parameter(0)
  %y.2 = bf16[8]{0} parameter(1)
  %q.2 = f32[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16]{0}, bf16[8]{0}) tuple(%zero, %x.2, /*index=2*/%y.2)
  %loop = (s32[], f32[16]{0}, bf16[8]{0}) while(%init), condition=%cond, body=%body
  %scattered = f32[16]{0} fusion(%q.2), kind=kCustom, calls=%all-reduce-scatter.1
  %zeros = f32[16]{0} broadcast(%zero), dimensions={}
  %piece = f32[16]{0} dynamic-update-slice(%zeros, %scattered, %zero)
  %whole = f32[16]{0} all-reduce(%piece), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %moved = f32[16]{0} collective-permute(%whole), source_target_pairs={{0,1},{1,0}}
  ROOT %r = f32[16]{0} get-tuple-element(%loop), index=1
}
"""
MESH = {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[2,3]{1,0:T(8,128)}", [24]),
        ("(bf16[4]{0}, /*index=1*/pred[3], s32[])", [8, 3, 4]),
        ("u32[]{:S(2)}", [4]),
        ("f8e4m3fn[10]", [10]),
    ],
)
def test_shape_bytes(shape, sizes):
    assert shape_bytes(shape) == sizes


def test_trip_counts_multiply_collectives():
    module = parse(LOOP)
    runs, unknown = module.runs()
    assert runs["body"] == 5
    assert not unknown
    found = {(item.kind, item.axes): item for item in find_collectives(module, MESH)}
    assert found.keys() == {
        ("all-reduce", "tensor"),
        ("all-gather", "data"),
        ("reduce-scatter", "tensor"),
        ("all-gather by all-reduce", "data+tensor"),
        ("collective-permute", "tensor"),
    }
    reduced = found["all-reduce", "tensor"]
    assert (reduced.count, reduced.payload, reduced.moved) == (5, 5 * 64, 5 * 64 * 2 * 3 / 4)
    gathered = found["all-gather", "data"]  # the start counts, the end does not
    assert (gathered.count, gathered.payload, gathered.moved) == (5, 5 * 32, 5 * 16)
    scattered = found["reduce-scatter", "tensor"]
    assert (scattered.count, scattered.payload, scattered.moved) == (1, 256, 192)
    assert found["all-gather by all-reduce", "data+tensor"].moved == 64 * 2 * 7 / 8
    assert found["collective-permute", "tensor"].moved == 64


def test_noted_trip_count_and_unknown_bound():
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert parse(noted).runs()[0]["body"] == 7
    unknown = parse(LOOP.replace("constant(5)", "parameter(1)"))
    assert unknown.runs()[1] == ["loop"]
    assert unknown.runs()[0]["body"] == 1


def test_metadata_of_a_kernel_takes_lines_of_its_own():
    text = """HloModule one

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"tiling":"{\\"rows\\": 128}"
}}, backend_config={"cost_estimate":{"bytes_accessed":"640"}}
  ROOT %z = f32[8]{0} add(%y, %y)
}
"""
    instructions = parse(text).computations["main"].instructions
    assert list(instructions) == ["x", "y", "z"]
    assert '"bytes_accessed":"640"' in instructions["y"].attributes


def test_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("nothing")


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:1x1x4"])
def test_scanned_products_move_known_bytes(topology):
    """Three layers whose [1024, 1024] weights are split over four devices: each is gathered once, as are no others."""
    mesh = Mesh(np.array(open_topology(topology).devices).reshape(2, 2), ("data", "fsdp"))

    def layers(x, weights):
        def body(x, w):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(body, x, weights)[0]

    rows = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    weights = jax.ShapeDtypeStruct((3, 1024, 1024), jnp.float32, sharding=split)
    text = jax.jit(layers, out_shardings=rows.sharding).lower(rows, weights).compile().as_text()
    found = find_collectives(parse(text), dict(mesh.shape))
    gathered = [item for item in found if item.kind.startswith("all-gather") and item.axes == "fsdp"]
    assert sum(item.payload for item in gathered) in (3 * 2**22, 3 * 2**21)  # bfloat16 where the product rounds to it
    assert all(item.payload < 2**20 for item in found if item not in gathered)


@pytest.mark.parametrize(
    ("groups", "axes", "moved"),
    [
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=1,'axis_3'=4], device_ids=([2,4]) {'axis_1'}", "data", 64),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "tensor", 96),
        ("mesh['a'=8] {'a'}", "data+tensor", 112),
        ("[2,4]<=[8]", "tensor", 96),
        ("{{0,5},{1,4}}", "?", 64),  # differs along both axes, but is not their product
        ("a form of the future", "?", 112),
    ],
)
def test_replica_groups(groups, axes, moved):
    line = "%reduced = f32[16]{0} all-reduce(%x), replica_groups=" + groups
    text = "ENTRY %main (x: f32[16]) -> f32[16] {\n  %x = f32[16]{0} parameter(0)\n  ROOT " + line + "\n}\n"
    (found,) = find_collectives(parse(text), MESH)
    assert (found.axes, found.moved) == (axes, moved)


def test_transfer_between_slices():
    """Own text in the compiler's form: 1 KiB summed over two slices, by the hosts."""
    attributes = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    text = (
        "ENTRY %main (x: f32[256]) -> token[] {\n  %x = f32[256]{0} parameter(0)\n  %t = token[] after-all()\n"
        f"  %send = (f32[256]{{0}}, u32[], token[]) send(%x, %t), frontend_attributes={{{attributes}}}\n"
        "  ROOT %end = token[] send-done(%send)\n}\n"
    )
    (found,) = find_collectives(parse(text), MESH)
    assert (found.kind, found.axes, found.count) == ("all-reduce between slices", "data", 1)
    assert (found.payload, found.moved) == (1024, 1024)
