"""GPU kernels and what stands in for them, compiled for an H100 at the presets' shapes. No GPU is needed."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_kernels import attention, cases, compile_case
from benchmarks.shapes import BLOCK_FFN, FFN_SCORES, MOE_FFN, SPARK_ATTENTION
from sparsezoo_jax.compilation.ptx import kernels
from sparsezoo_jax.compilation.topologies import lowering_for, open_topology
from sparsezoo_jax.compilation.traffic import hbm_bytes
from sparsezoo_jax.pallas_kernels import (
    block_ffn_rows,
    block_ffn_union,
    flash_attention,
    spark_attention,
    spark_attention_rows,
    spark_ffn_rows,
    statistical_topk,
)
from sparsezoo_jax.pallas_kernels.activations import ACTIVATIONS
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.relu_ffn import relu_ffn
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.tuning import compiling_for
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh

pytest.importorskip("jax_cuda12_plugin", reason="compiling for GPUs needs jax's CUDA plugin: 'sparsezoo-jax[aot]'")
pytestmark = pytest.mark.usefixtures("optimised")

TRITON = "__gpu$xla.gpu.triton"


def compiled(function, *arrays, topology="h100:1x1x1"):
    """The text of the program of a function of arrays of (shape, dtype)."""
    device = open_topology(topology).devices[0]
    sharding = SingleDeviceSharding(device)
    with lowering_for(device):
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays]
        return jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", list(BLOCK_FFN))
def test_block_ffn_union(size, dtype):
    d, experts, width = BLOCK_FFN[size]
    shapes = [(8, d), (8, experts), (d, experts * width), (experts * width, d)]

    def function(x, scores, up, down):
        return block_ffn_union(x, scores, up, down, expert_width=width, capacity=experts // 4)

    assert compiled(function, *[(shape, dtype) for shape in shapes]).count(TRITON) == 2


@pytest.mark.slow
@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_spark_ffn_rows(storage):
    d, r, neurons = 2304, 1024, 13_824
    shapes = [((2, d), jnp.bfloat16), ((neurons, r), storage), ((neurons, 2 * d - r), storage)]
    scales = [((neurons,), jnp.float32), ((neurons, 2), jnp.float32)] if storage == jnp.int8 else []

    def function(x, k1, rows, *scales):
        return spark_ffn_rows(x, k1, rows, top_k=1106, scales=scales or (None, None))

    assert compiled(function, *shapes, *scales).count(TRITON) == 2


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_block_ffn_rows(storage, gated):
    d, experts, width = BLOCK_FFN["2_8b"]
    count = 2 + gated
    shapes = [((2, d), jnp.bfloat16), ((2, experts), jnp.float32)] + [((experts, width, d), storage)] * count
    scales = [((experts, width), jnp.float32)] * count if storage == jnp.int8 else []

    def function(x, scores, *arrays):
        up, down, gate, *_ = (*arrays[:count], None)
        factors = [*arrays[count:], None, None, None][:3]
        return block_ffn_rows(x, scores, up, down, gate, scales=tuple(factors), return_active=True)

    assert compiled(function, *shapes, *scales).count(TRITON) == 2, "by default"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_of_block_ffn_rows(activation):
    shapes = [(2, 64), (2, 4), (4, 24, 64), (4, 24, 64)]
    text = compiled(partial(block_ffn_rows, activation=activation), *[(shape, jnp.bfloat16) for shape in shapes])
    assert text.count(TRITON) == (0 if activation == "gelu" else 2), "Triton has no error function"


@pytest.mark.slow
@pytest.mark.parametrize("storage", [jnp.bfloat16, jnp.float32])
def test_spark_attention_rows(storage):
    heads, kv_heads, width, r, keys = 8, 4, 256, 128, 8192
    cache = (2, kv_heads, keys)
    shapes = [(2, heads, width), (*cache, r), (*cache, 2 * width - r)]

    def function(q, k1, rest, mask):
        return spark_attention_rows(q, k1, rest, mask, top_k=256)

    text = compiled(function, *[(shape, storage) for shape in shapes], ((2, keys), jnp.bool_))
    assert text.count(TRITON) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_grouped_ffn(dtype):
    """The kernels' products, not XLA's of all rows for every expert, nor the loop over tiles, which is for CPUs."""
    d, experts, width, k = MOE_FFN["moex_chess"]
    shapes = [(100, d), (experts, d, width), (experts, width, d)]

    def function(x, up, down, chosen, weights):
        def loss(x, up, down):
            return jnp.sum(grouped_ffn(x, chosen, weights, up, down).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(x, up, down)

    text = compiled(function, *[(shape, dtype) for shape in shapes], ((100, k), jnp.int32), ((100, k), jnp.float32))
    # Hidden layer and its gradient, gradients of the rows and of both weights; the last product has no reader.
    assert text.count(TRITON) == 5
    assert "ragged_dot" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("gated", "dtype"), [(True, jnp.bfloat16), (False, jnp.float32)])
def test_unions_of_sparselm(gated, dtype):
    d, neurons = 2048, 5632 if gated else 8192
    shapes = [(1, 300, d), (d, neurons), (neurons, d), *[(d, neurons)] * gated]

    def function(x, up, down, gate=None):
        def loss(x, up, down, gate):
            out = relu_ffn(x, gate, up, down, jnp.ones(x.shape[:2], bool), implementation="pallas_gpu")
            return jnp.sum(out.y.astype(jnp.float32)) + jnp.sum(out.l1)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3) if gated else (0, 1, 2))(x, up, down, gate)

    text = compiled(function, *[(shape, dtype) for shape in shapes])
    # Forward two; backward those of hidden units, of the input, of the maps to hidden units, and of the map from them.
    assert text.count(TRITON) == 6


@pytest.mark.parametrize("moved", ["weights", "tokens"])
def test_experts_on_a_mesh(moved):
    """Each device multiplies its sorted tokens by the kernel; those sent to it too, in a branch of their own."""
    devices = open_topology("h100:1x1x4").devices
    mesh = build_mesh(MeshConfig(data=2, expert=2), devices)
    place = named_sharding(mesh)
    tokens, columns, rows = ("batch", "length", None), ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
    shapes = {"x": (8, 32, 64), "weights": (8, 32, 2), "up": (8, 64, 32), "down": (8, 32, 64)}
    names = (tokens, tokens, columns, rows)
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place(name, shape))
        for shape, name in zip(shapes.values(), names, strict=True)
    ]
    chosen = jax.ShapeDtypeStruct((8, 32, 2), jnp.int32, sharding=place(tokens, (8, 32, 2)))

    def loss(x, weights, up, down, chosen):
        return jnp.sum(grouped_ffn(x, chosen, weights, up, down, moved=moved).astype(jnp.float32))

    with use_mesh(mesh), compiling_for(devices[0]):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays, chosen).as_text()
    assert text.count("gpu.triton") == (10 if moved == "tokens" else 5)
    assert "ragged_dot" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "dtype", "window", "options"),
    [("small", jnp.bfloat16, None, {}), ("2b", jnp.float32, 4096, {"softcap": 50.0})],
)
def test_spark_attention(size, dtype, window, options):
    heads, kv_heads, width, r, top_k = SPARK_ATTENTION[size]

    def both(q, k, v, segments, g):
        def attention(q, k, v):
            visible = Visibility.of_tokens(segments, window)
            return spark_attention(q, k, v, visible, r=r, top_k=top_k, implementation="pallas_gpu", **options)

        y, pull, attended = jax.vjp(attention, q, k, v, has_aux=True)
        return y, attended, pull(g)

    q, k = (((1, 1000, n, width), dtype) for n in (heads, kv_heads))
    assert compiled(both, q, k, k, ((1, 1000), jnp.int32), q).count(TRITON) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shared_memory_suffices_for_the_widest_heads(dtype):
    """Of 256 columns, in parts of 160 and 96 that fill up to 256 and 128: the compiler refuses what a multiprocessor
    has no memory for.
    """

    def both(q, k, v, g):
        visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
        attention = lambda *x: spark_attention(*x, visible, r=160, top_k=64, implementation="pallas_gpu")[0]  # noqa: E731
        y, pull = jax.vjp(attention, q, k, v)
        return y, pull(g)

    assert compiled(both, *[((1, 300, 1, 256), dtype)] * 4).count(TRITON) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "selects", "dtype"),
    [
        ("l40s:1x1x1", False, jnp.float32),
        ("l40s:1x1x1", True, jnp.float32),
        ("l40s:1x1x1", True, jnp.bfloat16),
        ("a100:1x1x1", False, jnp.float32),
    ],
)
def test_cards_with_less_shared_memory(topology, selects, dtype):
    """Heads of 256 by default, on cards with 99 kB and 163 kB for a block.

    In bfloat16 without selection, `test_registers_of_older_cards_suffice` compiles them.
    """

    def both(q, k, v, g):
        visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))

        def attention(q, k, v):
            if selects:
                return spark_attention(q, k, v, visible, r=128, top_k=64, softcap=50.0)[0]
            return flash_attention(q, k, v, visible, softcap=50.0)

        y, pull = jax.vjp(attention, q, k, v)
        return y, pull(g)

    arrays = [((1, 300, heads, 256), dtype) for heads in (2, 1, 1, 2)]
    assert compiled(both, *arrays, topology=topology).count(TRITON) == (4 if selects else 3)


@pytest.mark.slow
def test_default_of_attention_holds_no_scores():
    """Also where the choice is left open until the program is lowered, whose other forms keep them for the gradient.

    Memory is linear in the length.
    """
    programs = [compile_case(attention(None, True, length)) for length in (8192, 32_768)]
    assert [program.as_text().count(TRITON) for program in programs] == [4, 4]
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert temporaries[0] < 1e9 / 4.1
    assert temporaries[1] < 4.1 * temporaries[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "gradient", "made", "queries", "keys"),
    [
        (256, False, False, 2, 2),
        (256, True, False, 9, 8),
        (128, False, False, 4, 2),
        (128, False, True, 4, 2),
        (128, True, False, 11, 8),
    ],
)
def test_attention_moves_each_array_as_often_as_kernels_need_it(width, gradient, made, queries, keys):
    """In the model's layout: of the arrays of so many heads, forward two and two, backward seven and six.

    Queries are read and written once more where their scale is no power of two, unless something `made` them.
    """
    heads, kv_heads, length = 8, 4, 2048

    def forward(q, k, v):
        visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
        return flash_attention(jnp.cos(q) if made else q, k, v, visible)

    def both(q, k, v, g):
        y, pull = jax.vjp(forward, q, k, v)
        return y, pull(g)

    shapes = [((1, length, n, width), jnp.bfloat16) for n in (heads, kv_heads, kv_heads, heads)]
    moved = hbm_bytes(compiled(both, *shapes) if gradient else compiled(forward, *shapes[:3]))
    assert moved < 1.02 * 2 * length * width * (queries * heads + keys * kv_heads)


#: Programs of `benchmarks.gpu_kernels` with the number of our kernels in each and the least occupancy of any of them.
ASSEMBLED = {
    "and its gradient 8192 x 13824": (2, 0.5),
    "block_ffn_union 8 tokens, 19 experts": (2, 0.5),
    "spark_ffn_rows 1 token, 1106 neurons active": (2, 0.5),
    "block_ffn_rows 1 token, 19 experts": (2, 0.5),
    "grouped_ffn 4096 tokens, 10 of 56 experts of 128 and its gradient": (6, 0.25),
    "spark_attention_rows 1 query, 8192 keys, 256 a head selected": (1, 0.25),
    # A tile's sums take the registers of half a multiprocessor or more.
    "spark_attention 8192 tokens and its gradient": (4, 0.125),
    "flash_attention 8192 tokens and its gradient": (3, 0.125),
    "flash_attention 8192 tokens of 32 heads of 128 and its gradient": (3, 0.125),
}


@pytest.fixture(scope="module")
def on_h100():
    return dict(zip(ASSEMBLED, assembled(ASSEMBLED, "h100:1x1x1"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ASSEMBLED)
def test_registers_suffice(on_h100, name):
    count, occupancy = ASSEMBLED[name]
    assert len(on_h100[name]) == count
    for kernel in on_h100[name]:
        assert kernel.spills == 0
        assert kernel.occupancy >= occupancy


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["a100:1x1x1", "l40s:1x1x1"])
def test_registers_of_older_cards_suffice(topology):
    """By their own assembler: heads of 256, whose tiles shrink to the shared memory of the card."""
    (ours,) = assembled(["flash_attention 8192 tokens and its gradient"], topology)
    assert [kernel.spills for kernel in ours] == [0, 0, 0]


def assembled(names, topology):
    """Our kernels in each case of these names, as the assembler of the topology's devices sees them."""
    index = {case.name.removesuffix(", pallas_gpu"): str(i) for i, case in enumerate(cases())}
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--topology", topology, "--compile-only"]
    programs = kernels([*command, *(index[name] for name in names)])
    return [[kernel for kernel in program if re.search(r"_kernel(__\d+)?$", kernel.name)] for program in programs]
