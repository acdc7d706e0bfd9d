"""What the plain JAX forms of operations on a few rows leave alone when they are compiled for a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from sparsezoo_jax.pallas_kernels import (
    block_ffn_rows,
    from_blocks_rows,
    spark_attention_rows,
    spark_ffn_rows,
    to_blocks_rows,
)
from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks

pytestmark = pytest.mark.usefixtures("optimised")


def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


EXPERTS, SLABS, KEYS = of(24, 16, 64), of(512, 48), of(1, 2, 640, 112)
CUT, CHOSEN = Blocks(16, 2), of(1, 3, dtype=jnp.int32)
OPERATIONS = {
    "spark_ffn": (partial(spark_ffn_rows, top_k=60), [of(1, 64), of(736, 24), of(736, 40 + 64)]),
    "block_ffn": (block_ffn_rows, [of(1, 64), of(1, 24), EXPERTS, EXPERTS, EXPERTS]),
    "spark_attention": (
        partial(spark_attention_rows, top_k=60),
        [of(1, 4, 64), of(1, 2, 640, 16), KEYS, of(1, 640, dtype=jnp.bool_)],
    ),
    "from_blocks": (partial(from_blocks_rows, blocks=CUT), [of(1, 512), CHOSEN, SLABS]),
    "to_blocks": (partial(to_blocks_rows, blocks=CUT), [of(1, 48), CHOSEN, SLABS]),
}
#: What the loop of each reads in part.
READ = {
    "spark_ffn": "736,104",
    "block_ffn": "24,16,64",
    "spark_attention": "1280,112",
    "from_blocks": "512,48",
    "to_blocks": "512,48",
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_bfloat16_weights_are_not_converted_as_a_whole(name):
    operation, arrays = OPERATIONS[name]
    call = jax.jit(partial(operation, implementation="xla"), backend="cpu")
    # As users compile it: the tests have their own way (see the top conftest.py).
    text = call.lower(*arrays).compile({"xla_cpu_use_fusion_emitters": True}).as_text()
    entry = text[text.index("\nENTRY") :]
    assert f"bf16[{READ[name]}]" in text
    assert f"f32[{READ[name]}]" not in entry
