"""Every TPU kernel, compiled by the compiler of each generation at the presets' shapes. No TPU is needed."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.shapes import BLOCK_FFN, FFN_SCORES, MOE_FFN, SPARK_ATTENTION, SPARK_FFN, TPUS
from sparsezoo_jax.compilation.topologies import open_topology
from sparsezoo_jax.pallas_kernels import (
    block_ffn_rows,
    block_ffn_union,
    flash_attention,
    ragged,
    spark_attention,
    spark_attention_rows,
    spark_ffn_rows,
    statistical_topk,
)
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, to_blocks
from sparsezoo_jax.pallas_kernels.grouped_linear.rows import from_blocks_rows
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from tests.covering import pairs

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'sparsezoo-jax[aot]'")
pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module", params=list(TPUS))
def compiled(request):
    """Compile a function of arrays of (shape, dtype) for one generation; returns its program's text."""
    sharding = SingleDeviceSharding(open_topology(TPUS[request.param]).devices[0])

    def compile_for(function, *arrays):
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays]
        return jax.jit(function).lower(*args).compile().as_text()

    return compile_for


def both_passes(k, masked):
    def function(x, g, *where):
        y, pull = jax.vjp(
            lambda x: statistical_topk(x, k, where=where[0] if masked else None, implementation="pallas_tpu"), x
        )
        return y, pull(g)[0]

    return function


FLOATS = [jnp.bfloat16, jnp.float32]


# Every generation meets every shape, every type and every size, not every combination of these.
@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "size", "dtype"), pairs(TPUS, FFN_SCORES, FLOATS), indirect=["compiled"])
def test_statistical_topk(compiled, size, dtype):
    d, k = FFN_SCORES[size]
    assert compiled(both_passes(k, False), *[((256, d), dtype)] * 2).count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "shape", "masked"),
    pairs(TPUS, [(1, 40), (3, 129), (37, 8192), (2, 60_000)], [False, True]),
    indirect=["compiled"],
)
def test_statistical_topk_of_odd_shapes(compiled, shape, masked):
    mask = [(shape, jnp.bool_)] * masked
    assert compiled(both_passes(20.0, masked), (shape, jnp.bfloat16), (shape, jnp.bfloat16), *mask)


@pytest.mark.slow
@pytest.mark.parametrize("size", [name for name, (_, _, width) in BLOCK_FFN.items() if width % 128 == 0])
def test_block_ffn_union(compiled, size):
    d, experts, width = BLOCK_FFN[size]
    shapes = [(8, d), (8, experts), (d, experts * width), (experts * width, d)]

    def function(x, scores, up, down):
        return block_ffn_union(x, scores, up, down, expert_width=width, capacity=experts // 4)

    assert "tpu_custom_call" in compiled(function, *[(shape, jnp.bfloat16) for shape in shapes])


# The heads of 2b and 9b are alike for a kernel, which takes the queries of one key/value head at a time; tiny's and
# small's are no multiples of a tile.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "size", "window", "length"),
    [
        ("v5e", "2b", 4096, 1000),
        ("tpu7x", "2b", None, 1000),
        # Gradients of keys take more than VMEM has, of narrow heads whole lanes. They are made in a loop over chunks.
        ("v6e", "small", None, 32_768),
        ("v5p", "small", None, 131_072),
        ("v5p", "2b", None, 32_768),
        ("v6e", "2b", None, 131_072),
    ],
    indirect=["compiled"],
)
def test_spark_attention(compiled, size, window, length):
    heads, kv_heads, width, r, top_k = SPARK_ATTENTION[size]

    def both(q, k, v, segments, g):
        def attention(q, k, v):
            visible = Visibility.of_tokens(segments, window)
            return spark_attention(q, k, v, visible, r=r, top_k=top_k, softcap=50.0, implementation="pallas_tpu")

        y, pull, attended = jax.vjp(attention, q, k, v, has_aux=True)
        return y, attended, pull(g)

    q, k = (((1, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
    text = compiled(both, q, k, k, ((1, length), jnp.int32), q)
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # moments, mix, gradients


# Widths of keys and values, heads of queries and of keys: Gemma-2's, Llama's, a latent's, and one head of keys for all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "heads", "widths", "softcap"),
    [
        ("v5e", (32, 8), (128, 128), None),
        ("v5p", (8, 4), (256, 256), 50.0),
        ("v6e", (4, 4), (192, 128), None),
        ("tpu7x", (8, 1), (128, 128), None),
    ],
    indirect=["compiled"],
)
def test_flash_attention(compiled, heads, widths, softcap):
    def both(q, k, v, segments, g):
        visible = Visibility.of_tokens(segments, 4096)
        attention = partial(flash_attention, mask=visible, softcap=softcap, implementation="pallas_tpu")
        y, pull = jax.vjp(attention, q, k, v)
        return y, pull(g)

    shapes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1]), (heads[0], widths[1])]
    q, k, v, g = (((1, 1000, *shape), jnp.bfloat16) for shape in shapes)
    assert compiled(both, q, k, v, ((1, 1000), jnp.int32), g).count('custom_call_target="tpu_custom_call"') >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "size", "storage"), pairs(TPUS, ["2b", "9b"], [*FLOATS, jnp.int8]), indirect=["compiled"]
)
def test_spark_ffn_rows(compiled, size, storage):
    d, r, neurons, top_k = SPARK_FFN[size]

    def function(x, k1, rows, *scales):
        return spark_ffn_rows(x, k1, rows, top_k=top_k, scales=scales or (None, None))  # type: ignore[arg-type]

    shapes = [((3, d), jnp.bfloat16), ((neurons, r), storage), ((neurons, 2 * d - r), storage)]
    scales = [((neurons,), jnp.float32), ((neurons, 2), jnp.float32)] * (storage == jnp.int8)
    assert "spark_ffn_rows_kernel" in compiled(function, *shapes, *scales)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "storage"),
    [("v5e", jnp.float32), ("v5p", jnp.bfloat16), ("v6e", jnp.float32), ("v6e", jnp.bfloat16), ("tpu7x", jnp.bfloat16)],
    indirect=["compiled"],
)
def test_spark_attention_rows(compiled, storage):
    (heads, kv_heads, width, r, top_k), keys = SPARK_ATTENTION["2b"], 16_384

    def function(q, k1, rest, mask):
        return spark_attention_rows(q, k1, rest, mask, top_k=top_k, softcap_values=30.0)

    cache = [((2, kv_heads, keys, part), storage) for part in (r, 2 * width - r)]
    text = compiled(function, ((2, heads, width), jnp.bfloat16), *cache, ((2, keys), jnp.bool_))
    assert "spark_attention_rows_kernel" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "storage"),
    [
        *(("v6e", each) for each in (*FLOATS, jnp.int8)),
        ("v5e", jnp.float32),
        ("v5p", jnp.int8),
        ("tpu7x", jnp.bfloat16),
    ],
    indirect=["compiled"],
)
def test_block_ffn_rows(compiled, storage):
    d, experts, width = BLOCK_FFN["2_8b"]

    def function(x, scores, up, down, gate, *scales):
        return block_ffn_rows(x, scores, up, down, gate, scales=scales or (None,) * 3, return_active=True)

    shapes = [((8, d), jnp.bfloat16), ((8, experts), jnp.bfloat16), *[((experts, width, d), storage)] * 3]
    scales = [((experts, width), jnp.float32)] * 3 * (storage == jnp.int8)
    assert "block_ffn_rows_kernel" in compiled(function, *shapes, *scales)


@pytest.mark.parametrize("compiled", ["v6e"], indirect=True)
def test_loops_over_blocks_find_the_next_one_at_once(compiled):
    def function(x, routed, w):
        return from_blocks_rows(x, routed, w, Blocks(8, 2))

    text = compiled(function, ((2, 1024), jnp.bfloat16), ((2, 3), jnp.int32), ((1024, 512), jnp.bfloat16))
    assert text.count(" while(") == 1


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["v6e"], indirect=True)
def test_grouped_ffn(compiled):
    """The default is chosen for the target, not for the host: the libraries' products, not the loop over tiles."""
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
    assert text.count('custom_call_target="tpu_custom_call"') >= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("compiled", ["v5e"], indirect=True)  # the smallest VMEM
def test_weight_gradient_by_megablox(compiled, dtype):
    shapes = [((1000, 1024), dtype), ((1000, 2048), dtype), ((8,), jnp.int32)]
    assert "tpu_custom_call" in compiled(ragged.megablox_weight_gradient, *shapes)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["v6e"], indirect=True)
def test_grouped_linear(compiled):
    blocks = Blocks(8, 2)

    def function(x, routed, inner):
        return jax.grad(lambda w: jnp.sum(to_blocks(x, routed, w, blocks).astype(jnp.float32)))(inner)

    text = compiled(function, ((200, 1024), jnp.bfloat16), ((200, 3), jnp.int32), ((1024, 512), jnp.bfloat16))
    assert "tpu_custom_call" in text
