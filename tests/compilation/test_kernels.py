"""Kernels and scheduled cycles of compiled steps."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from sparsezoo_jax.compilation.flops import KernelCall
from sparsezoo_jax.compilation.hlo import parse
from sparsezoo_jax.compilation.kernels import Kernel, find_kernels, scheduled_cycles
from sparsezoo_jax.compilation.topologies import open_topology
from sparsezoo_jax.pallas_kernels import statistical_topk, without_kernels

# A loop of 3 trips over a kernel with a name, an unnamed one without an estimate, and another library's call.
LOOP = """HloModule made_up, is_scheduled=true

%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %a.1 = f32[16]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/while/body/transpose(jvp(shrink))/pallas_call"}, backend_config={"custom_call_config":{"body":"e30=","cost_estimate":{"flops":"40","transcendentals":"0","bytes_accessed":"128"}}}
  %b.1 = f32[16]{0} custom-call(%a.1), custom_call_target="tpu_custom_call"
  %c.1 = f32[16]{0} custom-call(%b.1), custom_call_target="Sharding"
  %d.1 = f32[16]{0} negate(%c.1), backend_config={"estimated_cycles":"70"}
  ROOT %out = (s32[], f32[16]{0}) tuple(%i, %d.1)
}

%cond (p.1: (s32[], f32[16])) -> pred[] {
  %p.1 = (s32[], f32[16]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x.2: f32[16]) -> f32[16] {
  %x.2 = f32[16]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16]{0}) tuple(%zero, %x.2)
  %loop = (s32[], f32[16]{0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[16]{0} get-tuple-element(%loop), index=1
  ROOT %r = f32[16]{0} negate(%y), backend_config={"estimated_cycles":"5"}
}
"""  # noqa: E501


def test_trips_of_loops_multiply_kernels_and_cycles():
    module = parse(LOOP)
    traced = {"b.1": KernelCall(2.5, 10.0), "shrink": KernelCall(1.0, 1.0)}
    assert find_kernels(module, traced) == [Kernel("b.1", 3, 7.5, 30), Kernel("shrink", 3, 120, 384)]
    assert find_kernels(module, {})[0] == Kernel("b.1", 3, 0, 0)
    assert scheduled_cycles(module) == 3 * 70 + 5


@pytest.mark.usefixtures("optimised")
def test_kernels_of_a_scanned_program():
    pytest.importorskip("libtpu")

    def loss(x, scales):
        return jax.lax.scan(lambda x, scale: (statistical_topk(x * scale, 40), None), x, scales)[0].sum()

    sharding = SingleDeviceSharding(open_topology("v6e:1x1").devices[0])
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in ((16, 512), (7,))]
    step = jax.jit(jax.grad(loss))

    def found():
        return find_kernels(parse(step.lower(*arguments).compile().as_text()), {})

    kernels = {kernel.name: kernel for kernel in found()}
    assert {name: kernel.count for name, kernel in kernels.items()} == {
        "statistical_topk_forward": 7,
        "statistical_topk_backward": 7,
    }
    array = 16 * 512 * 4
    assert kernels["statistical_topk_forward"].bytes == 7 * (2 * array + 16 * 2 * 4)
    with without_kernels():
        assert not found()
