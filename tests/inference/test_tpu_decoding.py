"""A token of a packed model as a TPU would decode it: compiled for one, kernels in it, caches changed in place."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from sparsezoo_jax.compilation.report import compile_report
from sparsezoo_jax.compilation.topologies import open_topology
from sparsezoo_jax.configs import preset
from sparsezoo_jax.inference import Sampling, packed
from sparsezoo_jax.inference.generation import next_token
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.pallas_kernels import without_kernels
from sparsezoo_jax.sharding import MeshConfig

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install 'sparsezoo-jax[aot]'")
pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def compiled():
    """Compile a function of abstract arrays, of which it may overwrite the second, for a chip of v6e."""
    sharding = SingleDeviceSharding(open_topology("v6e:1x1").devices[0])

    def compile_for(function, *trees):
        at = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trees)
        return jax.jit(function, donate_argnums=1).lower(*at).compile()

    return compile_for


def decode_step(arch, size, layers=2, context=4096):
    """`next_token` of one token after a context, and its abstract arguments."""
    config = dataclasses.replace(
        preset(arch, size).model, layers=layers, dtype="bfloat16", param_dtype="bfloat16", max_seq_len=context
    )
    model = nnx.eval_shape(lambda: packed(Decoder(config, rngs=nnx.Rngs(0))))
    cache = nnx.eval_shape(lambda: packed(Decoder(config, rngs=nnx.Rngs(0))).init_cache(1, context))
    graphdef, state = nnx.split(model)
    token, last = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return partial(next_token, Sampling(temperature=0), graphdef), state, cache, token, token, last, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "kernels"),
    [("spark", "2b", 4), ("blockffn", "2_8b", 2), ("moe", "xlarge", 2), ("moex", "medium", 2), ("lazy", "t5_base", 2)],
)
def test_a_token_of_a_packed_model(compiled, arch, size, kernels):
    program = compiled(*decode_step(arch, size))
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert " while(" not in text
    # Nothing is laid out anew: not a weight, and not a cache, which a CPU changes as integers.
    assert program.memory_analysis().temp_size_in_bytes < 20e6
    assert "u16[" not in text


def test_without_kernels_rows_are_looked_up_in_a_loop(compiled):
    with without_kernels():
        text = compiled(*decode_step("blockffn", "2_8b", layers=1)).as_text()
    assert "tpu_custom_call" not in text
    assert " while(" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "kernel", "rows", "width"),
    [
        ("spark", "2b", "spark_ffn_rows_kernel", 13824, 2304 - 1024 + 2304),
        ("blockffn", "2_8b", "block_ffn_rows_kernel", 128 * 128, 2 * 2048),
    ],
)
def test_a_token_on_a_mesh(arch, size, kernel, rows, width):
    """Four chips that split heads and neurons: the kernels run on each, over its quarter of the rows."""
    run = preset(arch, size)
    config = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, layers=1, dtype="bfloat16", layer_pattern=("global",)),
        mesh=MeshConfig(tensor=4),
        data=dataclasses.replace(run.data, batch_size=8),
    )
    report = compile_report(config, open_topology("v5p:2x2x1"), "decode", 1024)
    kernels = {found["name"]: found for found in report.kernels}
    assert len(kernels) == (2 if arch == "spark" else 1)
    assert kernels[kernel]["flops"] == 2 * 8 * rows / 4 * width
    assert report.unknown_loops == []
    assert not any(found["kind"] == "all-to-all" for found in report.collectives)
