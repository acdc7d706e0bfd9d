"""Writing slots of a cache against the update of a slice, and that it is in place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import put_slots
from tests.kernels.few_rows import implementation


@pytest.fixture(params=["xla", "native", None])
def apply(request):
    form = implementation(request.param)
    return lambda *arrays, axis: jax.jit(partial(put_slots, axis=axis, implementation=form))(*arrays)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("count", "slot"), [(1, 0), (1, 4), (3, 1), (5, 0), (2, 9)])
def test_is_the_update_of_a_slice(apply, dtype, axis, count, slot):
    rng = np.random.default_rng(0)
    shape, start = [3, 2, 7], [0, 0, 0]
    shape[axis], start[axis] = 5, slot
    kept = jnp.asarray(rng.standard_normal(shape), dtype).at[(0,) * 3].set(jnp.nan)
    shape[axis] = count
    new = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    ours = apply(kept, new, jnp.int32(slot), axis=axis)
    assert ours.dtype == kept.dtype
    np.testing.assert_array_equal(
        ours.astype(jnp.float32), jax.lax.dynamic_update_slice(kept, new.astype(dtype), start).astype(jnp.float32)
    )


@pytest.mark.parametrize("donated", [True, False])
def test_in_place_only_where_the_cache_is_given_away(donated):
    form = implementation("native")
    put = jax.jit(partial(put_slots, axis=1, implementation=form), donate_argnums=0 if donated else ())
    kept, new = jnp.zeros((2, 64, 8), jnp.bfloat16), jnp.ones((2, 1, 8), jnp.bfloat16)
    place = kept.unsafe_buffer_pointer()
    result = put(kept, new, 3)
    assert (result.unsafe_buffer_pointer() == place) == donated
    np.testing.assert_array_equal(result[:, :5].sum((0, 2)), [0, 0, 0, 16, 0])
    if not donated:
        np.testing.assert_array_equal(kept, 0)


def test_shapes_that_do_not_fit():
    kept = jnp.zeros((2, 4, 3))
    for shape in ((2, 5, 3), (2, 1, 4), (2, 1)):
        with pytest.raises(ConfigError, match=r"put_slots\.new"):
            put_slots(kept, jnp.zeros(shape), 0, axis=1)
