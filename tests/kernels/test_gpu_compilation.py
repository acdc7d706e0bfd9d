"""GPU kernels and what stands in for them, compiled for an H100 at the presets' shapes. No GPU is needed."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_kernels import cases
from benchmarks.shapes import BLOCK_FFN, FFN_SCORES, MOE_FFN
from sparsezoo_jax.compilation.ptx import kernels
from sparsezoo_jax.compilation.topologies import lowering_for, open_topology
from sparsezoo_jax.pallas_kernels import block_ffn_union, spark_attention_rows, spark_ffn_rows, statistical_topk
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn

pytest.importorskip("jax_cuda12_plugin", reason="compiling for GPUs needs jax's CUDA plugin: 'sparsezoo-jax[aot]'")

TRITON = "__gpu$xla.gpu.triton"


@pytest.fixture(scope="module", autouse=True)
def _without_cache():
    """A compiler without a device can write to the persistent cache, but not read from it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def compiled(function, *arrays):
    """The text of the program of a function of arrays of (shape, dtype)."""
    device = open_topology("h100:1x1x1").devices[0]
    sharding = SingleDeviceSharding(device)
    with lowering_for(device):
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays]
        return jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", list(FFN_SCORES))
def test_statistical_topk(size, dtype):
    d, k = FFN_SCORES[size]

    def both(x, g):
        y, pull = jax.vjp(lambda x: statistical_topk(x, k), x)
        return y, pull(g)[0]

    assert compiled(both, *[((256, d), dtype)] * 2).count(TRITON) == 2, "by default, there and back"


@pytest.mark.parametrize("shape", [(1, 40), (37, 8192)])
def test_masked_rows(shape):
    def both(x, g, where):
        y, pull = jax.vjp(lambda x: statistical_topk(x, 20, where=where, implementation="pallas_gpu"), x)
        return y, pull(g)[0]

    assert compiled(both, (shape, jnp.bfloat16), (shape, jnp.bfloat16), (shape, jnp.bool_)).count(TRITON) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", list(BLOCK_FFN))
def test_block_ffn_union(size, dtype):
    d, experts, width = BLOCK_FFN[size]
    shapes = [(8, d), (8, experts), (d, experts * width), (experts * width, d)]

    def function(x, scores, up, down):
        return block_ffn_union(x, scores, up, down, expert_width=width, capacity=experts // 4)

    assert compiled(function, *[(shape, dtype) for shape in shapes]).count(TRITON) == 2


@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_spark_ffn_rows(storage):
    d, r, neurons = 2304, 1024, 13_824
    shapes = [((2, d), jnp.bfloat16), ((neurons, r), storage), ((neurons, 2 * d - r), storage)]
    scales = [((neurons,), jnp.float32), ((neurons, 2), jnp.float32)] if storage == jnp.int8 else []

    def function(x, k1, rows, *scales):
        return spark_ffn_rows(x, k1, rows, top_k=1106, scales=scales or (None, None))

    assert compiled(function, *shapes, *scales).count(TRITON) == 2


@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32])
def test_spark_attention_rows(storage):
    heads, kv_heads, width, r, keys = 8, 4, 256, 128, 8192
    cache = (2, kv_heads, keys)
    shapes = [(2, heads, width), (*cache, r), (*cache, 2 * width - r)]

    def function(q, k1, rest, mask):
        return spark_attention_rows(q, k1, rest, mask, top_k=256)

    text = compiled(function, *[(shape, storage) for shape in shapes], ((2, keys), jnp.bool_))
    assert text.count(TRITON) == 1


def test_grouped_ffn():
    """The libraries' product where kernels are not taken: no loop over tiles, which is for CPUs."""
    d, experts, width, k = MOE_FFN["moex_chess"]
    shapes = [(100, d), (experts, d, width), (experts, width, d)]

    def function(x, up, down, chosen, weights):
        def loss(x, up, down):
            return jnp.sum(grouped_ffn(x, chosen, weights, up, down).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(x, up, down)

    text = compiled(
        function, *[(shape, jnp.bfloat16) for shape in shapes], ((100, k), jnp.int32), ((100, k), jnp.float32)
    )
    assert "ragged_dot" in text


@pytest.mark.parametrize("name", ["and its gradient 8192 x 13824", "block_ffn_union 8 tokens, 19 experts"])
def test_registers_suffice(name):
    (index,) = (i for i, case in enumerate(cases()) if case.name == f"{name}, pallas_gpu")
    found = kernels([sys.executable, "-m", "benchmarks.gpu_kernels", "--compile-only", str(index)])
    ours = [kernel for kernel in found if kernel.name.endswith("_kernel")]
    assert len(ours) == 2
    for kernel in ours:
        assert kernel.spills == 0
        assert kernel.occupancy >= 0.5
