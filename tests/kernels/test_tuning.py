"""The table of tiles: which line holds, and that kernels keep to it and to the memory of what they are for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import flash_attention, spark_attention, spark_ffn_rows
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.tuning import (
    TABLE,
    Key,
    Launch,
    compiling_for,
    fitting,
    launch_of,
    shared_bytes,
    target,
    trying,
)


def card(capability, shared):
    return SimpleNamespace(platform="gpu", compute_capability=capability, shared_memory_per_block_optin=shared)


def test_the_line_that_says_most_holds(monkeypatch):
    for key, tile in {
        Key("k"): 1,
        Key("k", bytes=2): 2,
        Key("k", columns=64): 3,
        Key("k", target="8.9"): 4,
        Key("k", target="8.9", bytes=2, columns=64): 5,
    }.items():
        monkeypatch.setitem(TABLE, key, Launch((tile,)))
    found = [launch_of("k", itemsize=n, columns=c).tiles[0] for n, c in [(4, None), (2, None), (2, 64)]]
    with compiling_for(card("8.9", 101_376)):
        found += [launch_of("k", itemsize=n, columns=c).tiles[0] for n, c in [(4, None), (2, 64), (2, 128)]]
    with compiling_for(card("9.0", 232_448)):
        found.append(launch_of("k", itemsize=4).tiles[0])
    assert found == [1, 2, 3, 4, 5, 4, 1]


def test_every_kernel_has_tiles_for_unknown_targets():
    for kernel in {key.kernel for key in TABLE}:
        assert Key(kernel) in TABLE


def test_tiles_shrink_until_they_fit():
    big = Launch((128, 32), 8, 3)
    with compiling_for(card("9.0", 232_448)):
        assert fitting(big, 512, 1024) == big, "164 kB"
    with compiling_for(card("8.9", 101_376)):
        small = fitting(big, 512, 1024)
        assert small is not None
        assert small.stages == 1, "stages go before tiles"
        assert shared_bytes(small, 512, 1024) <= 101_376
        assert fitting(big, 8192, 8192) is None, "even 16 rows of each are too many"


def grids(function, *arrays):
    return [e.params["grid_mapping"].grid for e in kernels_of(jax.make_jaxpr(function)(*arrays).jaxpr)]


def kernels_of(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from kernels_of(inner)


def attention(q, k, v):
    visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
    return spark_attention(q, k, v, visible, r=128, top_k=8, implementation="pallas_gpu_interpret")[0]


def test_kernels_are_traced_again_for_another_target():
    """The same function of the same arrays, which jax would otherwise take from its cache."""
    x = jnp.zeros((1, 256, 2, 256), jnp.bfloat16)
    function = jax.jit(attention)
    at_home = grids(function, x, x, x)
    with compiling_for(card("8.9", 101_376)):
        elsewhere = grids(function, x, x, x)
    assert at_home == [(4,), (4,)], "two tiles of 128 queries for each of two heads"
    assert elsewhere[0] == (4,), "one part of the heads fits"
    assert elsewhere[1] > (4,)


def test_attention_is_xla_s_where_no_tiles_fit():
    x = jnp.zeros((1, 256, 2, 256))
    visible = Visibility.of_tokens(jnp.ones((1, 256), jnp.int32))

    def programs():
        return len(grids(lambda x: flash_attention(x, x, x, visible), x))

    with compiling_for(card("8.9", 101_376)):
        assert programs() == 2, "the kernel of a TPU and that of a GPU"
    with compiling_for(card("7.5", 65_536)):
        assert programs() == 1
        with pytest.raises(ConfigError, match="has no tiles of 256 columns that fit into shared memory"):
            flash_attention(x, x, x, visible, implementation="pallas_gpu")


def test_tried_launches_come_before_the_table():
    x, k1, rows = (jnp.zeros(shape) for shape in ((1, 64), (256, 32), (256, 96)))

    def ffn(*arrays):
        return spark_ffn_rows(*arrays, top_k=8, implementation="pallas_gpu_interpret")

    assert grids(ffn, x, k1, rows) == [(16,), (1, 16)]
    with trying(spark_ffn_rows_hidden=Launch((32, 64)), spark_ffn_rows_sum=Launch((32, 32, 4))):
        assert grids(ffn, x, k1, rows) == [(8,), (2, 4)]


def test_without_an_accelerator_no_target_is_known():
    assert target().name is None


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [(64, 32), (16, 64)])
def test_tiles_do_not_change_results(tiles):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 96, 2, 48)) for key in keys)

    def attend(q, k, v):
        visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
        return spark_attention(q, k, v, visible, r=16, top_k=8, implementation="pallas_gpu_interpret")[0]

    with trying(spark_attention_moments=Launch(tiles), spark_attention_mix=Launch(tiles)):
        tried = attend(q, k, v)
    assert jnp.allclose(tried, attend(q, k, v), atol=1e-5)
