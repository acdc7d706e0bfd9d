"""Spark attention of one query per sequence against the form that is trained, which computes all keys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import attention_rows, spark_attention, spark_attention_rows
from tests.kernels.few_rows import close, compiled, implementation
from tests.kernels.test_attention_rows import inputs


@pytest.fixture(params=["xla", "native", "pallas_gpu_interpret", "pallas_tpu_interpret"])
def apply(request):
    return compiled(spark_attention_rows, implementation(request.param))


def split(q, k, v, mask, r):
    return q, k[..., :r], jnp.concatenate([k[..., r:], v], axis=-1), mask


def trained(q, k, v, mask, **options):
    """The definition in float32, in the dtype of q."""
    wide = [a.astype(jnp.float32) for a in (q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2))]
    y, attended = jax.jit(partial(spark_attention, **options))(*wide, mask[:, None])
    return y[:, 0].astype(q.dtype), attended[:, 0]


# Every setting in float32; in bfloat16 where heads share keys or do not, and where keys are many or few.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "shape", "options"),
    [
        ("float32", {}, {"r": 4, "top_k": 8}),
        ("bfloat16", {}, {"r": 4, "top_k": 8}),
        ("float32", {"kv_heads": 4}, {"r": 5, "top_k": 8, "softcap": 2.0, "softcap_values": 1.5, "ddof": 0}),
        ("bfloat16", {"kv_heads": 4}, {"r": 5, "top_k": 8}),
        ("float32", {"batch": 3, "heads": 6, "kv_heads": 1, "keys": 600, "width": 37}, {"r": 32, "top_k": 40}),
        ("bfloat16", {"batch": 3, "heads": 6, "kv_heads": 1, "keys": 600, "width": 37}, {"r": 32, "top_k": 40}),
        ("float32", {"keys": 300}, {"r": 8, "top_k": 10, "predictor_scale": 1.0, "value_scale": 0.1}),
        ("float32", {}, {"r": 4, "top_k": 8, "weighting": "none"}),
        ("float32", {}, {"r": 4, "top_k": 100}),
        ("float32", {}, {"r": 4, "top_k": 3, "selection": "none"}),
        ("bfloat16", {"batch": 2, "heads": 1, "kv_heads": 1, "keys": 5, "width": 2}, {"r": 1, "top_k": 1}),
    ],
)
def test_is_the_form_that_is_trained(apply, storage, shape, options):
    arrays = inputs(storage, **shape)
    y, attended = apply(*split(*arrays, options["r"]), **{name: o for name, o in options.items() if name != "r"})
    expected, expected_attended = trained(*arrays, **options)
    np.testing.assert_array_equal(attended, expected_attended)
    close(y, expected)
    np.testing.assert_array_equal(y[-1], 0)


def test_exact_selection_has_a_plain_form_only():
    arrays = inputs("float32")
    y, attended = spark_attention_rows(*split(*arrays, 4), top_k=7, selection="exact")
    expected, expected_attended = trained(*arrays, r=4, top_k=7, selection="exact")
    close(y, expected)
    np.testing.assert_array_equal(attended, expected_attended)
    form = implementation("native")
    with pytest.raises(ConfigError, match='selection="exact" has no native form; use "xla"'):
        spark_attention_rows(*split(*arrays, 4), top_k=7, selection="exact", implementation=form)


@pytest.mark.slow
def test_all_keys_by_softmax_alone_is_dense_attention(apply):
    q, k, v, mask = inputs("float32")
    y, attended = apply(*split(q, k, v, mask, 12), top_k=45, weighting="none")
    close(y, attention_rows(q, k, v, mask, implementation="xla"))
    np.testing.assert_array_equal(attended, jnp.broadcast_to(mask.sum(-1)[:, None], (2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["xla", "native", "pallas_gpu_interpret"])  # a TPU's tiles: test_weighted_rows
def test_only_attended_rows_are_read(form):
    q, k, v, mask = inputs("float32", batch=1, heads=2, kv_heads=2, keys=400)
    mask = jnp.ones_like(mask)
    q, k1, rest, _ = split(q, k, v, mask, 4)
    call = jax.jit(partial(spark_attention_rows, top_k=12, implementation=implementation(form)))
    expected, attended = call(q, k1, rest, mask)
    from sparsezoo_jax.pallas_kernels.spark_attention import predicted_keys

    _, selected = predicted_keys(q[:, None], k.swapaxes(1, 2), mask[:, None], r=4, top_k=12)
    selected = selected[:, :, 0]  # [B, N, S], and each key/value head has one query head
    np.testing.assert_array_equal(selected.sum(-1), attended)
    y, _ = call(q, k1, jnp.where(selected[..., None], rest, jnp.nan), mask)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.slow
def test_windows_keep_statistics_to_what_is_visible(apply):
    q, k, v, _ = inputs("float32", batch=1, keys=1300)
    inside = slice(600, 1251)
    mask = jnp.zeros((1, 1300), bool).at[:, inside].set(True)
    y, attended = apply(*split(q, k, v, mask, 4), top_k=30)
    expected, expected_attended = trained(q, k[:, :, inside], v[:, :, inside], mask[:, inside], r=4, top_k=30)
    close(y, expected)
    np.testing.assert_array_equal(attended, expected_attended)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two-point", "constant"])
def test_odd_rows_make_no_nan(apply, kind):
    q, k, v, mask = inputs("float32", batch=1, keys=64)
    mask = jnp.ones_like(mask)
    even = jnp.arange(64)[:, None] % 2 == 0
    k = jnp.broadcast_to(jnp.where(even, 1.0, -1.0 if kind == "two-point" else 1.0), k.shape)
    q = jnp.ones_like(q)
    y, attended = apply(*split(q, k, v, mask, 4), top_k=3)
    expected, expected_attended = trained(q, k, v, mask, r=4, top_k=3)
    np.testing.assert_array_equal(attended, expected_attended)
    close(y, expected)


@pytest.mark.slow
def test_not_a_number_stays_in_its_sequence(apply):
    q, k, v, mask = inputs("float32", batch=3, keys=100)
    mask = jnp.ones_like(mask)
    q = q.at[1, :, 0].set(jnp.nan)
    y, _ = apply(*split(q, k, v, mask, 4), top_k=9)
    expected, _ = trained(q, k, v, mask, r=4, top_k=9)
    assert not np.isfinite(y[1]).any()
    close(y[::2], expected[::2])


def test_bad_input():
    arrays = inputs("float32")
    q, k1, rest, mask = split(*arrays, 4)
    with pytest.raises(ConfigError, match=r"spark_attention_rows.rest=\(2, 2, 45, 19\): must be \(2, 2, 45, 20\)"):
        spark_attention_rows(q, k1, rest[..., 1:], mask, top_k=3)
    with pytest.raises(ConfigError, match="must be from 1 to 11 wide, for q"):
        spark_attention_rows(q, arrays[1], rest, mask, top_k=3)
    with pytest.raises(ConfigError, match=r"spark_attention_rows.top_k=0: must be above 0"):
        spark_attention_rows(q, k1, rest, mask, top_k=0)
