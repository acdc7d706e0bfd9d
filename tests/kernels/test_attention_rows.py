"""Attention of one query per sequence against its definition, and against the form that is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import attention_rows
from sparsezoo_jax.pallas_kernels.attention import dense_attention
from sparsezoo_jax.pallas_kernels.attention.rows import reference
from tests.kernels.few_rows import Draw, close, compiled, implementation

definition = jax.jit(reference, static_argnames=("scale", "softcap"))


@pytest.fixture(params=["xla", "native"])
def apply(request):
    return compiled(attention_rows, implementation(request.param))


def inputs(storage, batch=2, heads=4, kv_heads=2, keys=45, width=12):
    """Queries, caches, and a mask with holes in it and an end that nobody sees; the last sequence sees nothing."""
    draw = Draw(storage)
    mask = draw.rng.random((batch, keys)) > 0.2
    mask[:, -3:] = False
    mask[-1] = False
    caches = [draw.tokens(batch, kv_heads, keys, width) for _ in range(2)]
    return draw.tokens(batch, heads, width), *caches, jnp.asarray(mask)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"softcap": None},
        {"kv_heads": 4, "softcap": 2.0, "scale": 0.5},
        {"batch": 3, "heads": 6, "kv_heads": 1, "keys": 1100, "width": 37, "softcap": 30.0},
        {"batch": 2, "heads": 1, "kv_heads": 1, "keys": 5, "width": 1, "softcap": None},
    ],
)
def test_is_the_definition(apply, storage, shape):
    options = {name: shape[name] for name in ("softcap", "scale") if name in shape}
    arrays = inputs(storage, **{name: value for name, value in shape.items() if name not in options})
    y = apply(*arrays, **options)
    close(y, definition(*arrays, **options))
    np.testing.assert_array_equal(y[-1], 0)


def test_is_the_form_that_is_trained(apply):
    q, k, v, mask = inputs("float32")
    expected = dense_attention(
        q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None], scale=12**-0.5, softcap=5.0
    )
    close(apply(q, k, v, mask, softcap=5.0), expected[:, 0])


@pytest.mark.parametrize("window", [1, 17, 600])
def test_windows(apply, window):
    q, k, v, _ = inputs("float32", batch=1, keys=1300)
    position = 1250
    s = jnp.arange(1300)
    mask = ((s <= position) & (s > position - window))[None]
    inside = slice(position - window + 1, position + 1)
    y = apply(q, k, v, mask)
    close(y, definition(q, k[:, :, inside], v[:, :, inside], mask[:, inside]))
    # What lies outside of the window is not read, or does not matter: not even NaN.
    outside = ~mask[:, None, :, None]
    if apply is compiled(attention_rows, "native"):
        y_poisoned = apply(q, jnp.where(outside, jnp.nan, k), jnp.where(outside, jnp.nan, v), mask)
        np.testing.assert_array_equal(y_poisoned, y)


def test_a_sequence_does_not_depend_on_the_others():
    q, k, v, mask = inputs("bfloat16", batch=3, keys=700)
    apply = jax.jit(partial(attention_rows, implementation=implementation("native")))
    together = apply(q, k, v, mask)
    for b in range(3):
        alone = apply(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask[b : b + 1])
        np.testing.assert_array_equal(alone[0], together[b])


def test_large_scores_and_not_a_number(apply):
    q, k, v, mask = inputs("float32", batch=4, keys=600)
    mask = jnp.ones_like(mask)
    q = q.at[0].multiply(1e4).at[1, 0, 0].set(jnp.nan).at[2].multiply(-1e4)
    close(apply(q, k, v, mask), definition(q, k, v, mask))


def test_bad_input():
    q, k, v, mask = inputs("float32")
    with pytest.raises(ConfigError, match=r"attention_rows.mask=\(2, 44\): must be \(2, 45\)"):
        attention_rows(q, k, v, mask[:, 1:])
    with pytest.raises(ConfigError, match=r"attention_rows.k=.*: its heads must divide the 3 of q"):
        attention_rows(q[:, :3], k, v, mask)
    with pytest.raises(ConfigError, match=r"attention_rows.v=int8: must be float32 or bfloat16"):
        attention_rows(q, k, v.astype(jnp.int8), mask)
    with pytest.raises(ConfigError, match=r"attention_rows.mask=int32: must be booleans"):
        attention_rows(q, k, v, mask.astype(jnp.int32))
