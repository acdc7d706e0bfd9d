"""Maps of a few tokens from and to active blocks against their definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import from_blocks_rows, to_blocks_rows
from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, active_blocks, reference
from sparsezoo_jax.pallas_kernels.rows import dequantised
from tests.kernels.few_rows import STORAGE, Draw, close, implementation, rounds

MAPS = {"from": from_blocks_rows, "to": to_blocks_rows}


def definition(name, x, routed, w, blocks, scale):
    wide, weights = x.astype(jnp.float32), dequantised(w, scale)
    if name == "from":
        return reference.from_blocks(wide, routed, weights, blocks, None).astype(x.dtype)
    return reference.to_blocks(wide, routed, weights.T, blocks, None).astype(x.dtype)


def inputs(draw, name, m, blocks, routed, size, other):
    d = blocks.count * size
    w, scale = draw.weights(d, other)
    free = blocks.count - blocks.shared
    chosen = np.stack([draw.rng.permutation(free)[:routed] + blocks.shared for _ in range(m)])
    return draw.tokens(m, d if name == "from" else other), jnp.asarray(chosen, jnp.int32), w, scale


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", ["xla", "native"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("m", "blocks", "routed", "size", "other"),
    [
        (1, Blocks(8, 2), 2, 5, 33),
        (3, Blocks(8, 2), 2, 5, 33),
        (8, Blocks(16, 0), 1, 3, 70),
        (2, Blocks(4, 4), 0, 6, 2050),
    ],
)
def test_is_the_definition(request, name, form, storage, m, blocks, routed, size, other):
    x, chosen, w, scale = inputs(Draw(storage), name, m, blocks, routed, size, other)
    call = jax.jit(partial(MAPS[name], blocks=blocks, implementation=implementation(form)))
    close(call(x, chosen, w, scale=scale), definition(name, x, chosen, w, blocks, scale), rounds(request, storage))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", ["xla", "native"])
def test_only_active_blocks_are_read(name, form):
    blocks = Blocks(8, 1)
    x, chosen, w, _ = inputs(Draw("float32"), name, 2, blocks, 2, 5, 33)
    call = jax.jit(partial(MAPS[name], blocks=blocks, implementation=implementation(form)))
    unused = jnp.repeat(~active_blocks(chosen, blocks).any(axis=0), 5)
    assert unused.any()
    np.testing.assert_array_equal(call(x, chosen, jnp.where(unused[:, None], jnp.nan, w)), call(x, chosen, w))


@pytest.mark.parametrize("name", MAPS)
def test_a_row_does_not_depend_on_the_others(name):
    blocks = Blocks(8, 2)
    x, chosen, w, _ = inputs(Draw("bfloat16"), name, 9, blocks, 2, 7, 500)
    call = jax.jit(partial(MAPS[name], blocks=blocks, implementation=implementation("native")))
    together = call(x, chosen, w)
    for i in range(9):
        np.testing.assert_array_equal(call(x[i : i + 1], chosen[i : i + 1], w)[0], together[i])


def test_result_may_be_wider_than_the_tokens():
    x, chosen, w, _ = inputs(Draw("bfloat16"), "from", 1, Blocks(8, 2), 2, 5, 33)
    for form in ("xla", implementation("native")):
        y = from_blocks_rows(x, chosen, w, Blocks(8, 2), dtype=jnp.float32, implementation=form)
        assert y.dtype == jnp.float32


def test_bad_input():
    x, chosen, w, _ = inputs(Draw("float32"), "from", 1, Blocks(8, 2), 2, 5, 33)
    with pytest.raises(ConfigError, match=r"from_blocks_rows.w=\(40, 33\): must have 39 inputs"):
        from_blocks_rows(x[:, 1:], chosen, w, Blocks(8, 2))
    with pytest.raises(ConfigError, match=r"to_blocks_rows.blocks=7: must divide the width of 40"):
        to_blocks_rows(jnp.ones((1, 33)), chosen, w, Blocks(7, 2))
