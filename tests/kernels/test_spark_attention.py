"""The contract of Spark attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.spark_attention import select_keys, spark_attention
from sparsezoo_jax.pallas_kernels.statistical_topk import row_statistics

IMPLEMENTATIONS = ["xla"]
R, WIDTH = 4, 12


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request):
    def apply(*arrays, **kwargs):
        return jax.jit(partial(spark_attention, implementation=request.param, **kwargs))(*arrays)

    return apply


def inputs(batch=2, queries=40, heads=4, kv_heads=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, queries, heads, WIDTH), dtype)
    k, v = (jax.random.normal(key, (batch, queries, kv_heads, WIDTH), dtype) for key in keys[1:])
    return q, k, v, jnp.broadcast_to(jnp.tril(jnp.ones((queries, queries), bool)), (batch, queries, queries))


def loops(q, k, v, mask, r, top_k, ddof=1, softcap=None):
    """The definition one head and one query at a time, in float64: output and number of attended keys."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    counts = np.zeros(q.shape[:3], int)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        visible = np.flatnonzero(mask[b, t])
        keys, values = k[b, visible, h // group], v[b, visible, h // group]
        scores = keys[:, :r] @ q[b, t, h, :r] / np.sqrt(r)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        n = len(visible)
        keep = np.ones(n, bool)
        if n > top_k:
            keep = scores >= scores.mean() + scores.std(ddof=ddof) * norm.ppf(1 - top_k / n)
            keep[scores.argmax()] = True
        weights = np.where(keep, np.exp(scores - scores[keep].max()), 0)
        weights /= weights.sum()
        weights *= np.log1p(np.exp(keys[:, r:] @ q[b, t, h, r:] / np.sqrt(WIDTH - r)))
        out[b, t, h], counts[b, t, h] = weights @ values, keep.sum()
    return out, counts


def test_golden_row():
    scores = jnp.array([0.2, 1.1, -0.4, 2.3, 0.6])
    visible = jnp.ones(5, bool)
    theta = float(row_statistics(scores, 2, where=visible).threshold[0])
    assert theta == pytest.approx(1.0187367370861655, abs=1e-6)
    np.testing.assert_array_equal(select_keys(scores, visible, 2), [False, True, False, True, False])
    # One head of width 2: predictor scores and value scores are q * k with q = 1 and r = 1; values are unit vectors.
    q = jnp.ones((1, 1, 1, 2))
    k = jnp.stack([scores, jnp.array([0, 1, -1, 0.5, 2.0])], axis=-1)[None, :, None]
    weights = []
    attend = jax.jit(lambda v: spark_attention(q, k, v, visible[None, None], r=1, top_k=2)[0][0, 0, 0, 0])
    for j in range(5):
        weights.append(float(attend(jnp.zeros((1, 5, 1, 2)).at[0, j].set(1.0))))
    np.testing.assert_allclose(weights, [0, 0.3039875334, 0, 0.7486023034, 0], atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_definition_in_loops(attention, kv_heads, softcap):
    q, k, v, mask = inputs(kv_heads=kv_heads)
    y, attended = attention(q, k, v, mask, r=R, top_k=8, softcap=softcap)
    expected, counts = loops(q, k, v, mask, R, 8, softcap=softcap)
    np.testing.assert_array_equal(attended, counts)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_every_query_head_selects_its_own_keys(attention):
    q, k, v, mask = inputs()
    selected = np.stack([loops(q[:, :, h : h + 1], k[:, :, :1], v[:, :, :1], mask, R, 8)[1] for h in (0, 1)])
    assert (selected[0] != selected[1]).any()
    repeated = attention(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), mask, r=R, top_k=8)
    for ours, theirs in zip(attention(q, k, v, mask, r=R, top_k=8), repeated, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_threshold_has_no_gradient(attention):
    q, k, _, mask = inputs()
    scores = jnp.where(mask[:, None], jnp.einsum("btnh,bsnh->bnts", q[..., :R], jnp.repeat(k, 2, 2)[..., :R]), 0)
    grad = jax.grad(lambda s: jnp.sum(select_keys(s, mask[:, None], 8) * 1.0))(scores)
    np.testing.assert_array_equal(grad, 0)
    # Subtracting the threshold from the survivors changes nothing: softmax is invariant to it.
    keep = select_keys(scores, mask[:, None], 8)
    theta = row_statistics(scores, 8, where=mask[:, None]).threshold
    plain = jax.nn.softmax(jnp.where(keep, scores, -1e30), axis=-1)
    shifted = jax.nn.softmax(jnp.where(keep, scores - theta, -1e30), axis=-1)
    np.testing.assert_allclose(plain, shifted, atol=1e-6)


def test_few_keys_are_all_attended(attention):
    q, k, v, mask = inputs(queries=12)
    y, attended = attention(q, k, v, mask, r=R, top_k=12)
    np.testing.assert_array_equal(attended, np.broadcast_to(np.arange(1, 13)[None, :, None], (2, 12, 4)))
    everything = attention(q, k, v, mask, r=R, top_k=12, selection="none")[0]
    np.testing.assert_allclose(y, everything, atol=1e-6)
    for n in (1, 8, 9):  # one key, k keys, k + 1 keys
        out, count = attention(q[:, :1], k[:, :n], v[:, :n], jnp.ones((2, 1, n), bool), r=R, top_k=8)
        assert np.isfinite(out).all()
        assert (np.asarray(count) == n).all() if n <= 8 else (np.asarray(count) >= 1).all()


@pytest.mark.parametrize("position", [5, 25, 39])
def test_causality_and_padding(attention, position):
    q, k, v, mask = inputs()
    y = attention(q, k, v, mask, r=R, top_k=8)[0]
    later = jnp.arange(40)[None, :, None, None] > position
    changed = attention(q, jnp.where(later, 9.0, k), jnp.where(later, -9.0, v), mask, r=R, top_k=8)[0]
    np.testing.assert_array_equal(changed[:, : position + 1], y[:, : position + 1])
    # More masked-out keys behind: the same numbers.
    pad = ((0, 0), (0, 7), (0, 0), (0, 0))
    padded_mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 7)))
    padded = attention(q, jnp.pad(k, pad, constant_values=5.0), jnp.pad(v, pad), padded_mask, r=R, top_k=8)[0]
    np.testing.assert_allclose(padded, y, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "deviation"), [(257, 0.9), (300, 3.7), (512, 6.8), (1024, 7.6), (2048, 9.3), (8192, 11.7)]
)
def test_attended_keys_of_gaussian_scores(n, deviation):
    scores = jax.random.normal(jax.random.key(n), (600, n))
    counts = np.asarray(jax.jit(lambda s: select_keys(s, jnp.ones_like(s, bool), 256).sum(-1))(scores))
    assert counts.mean() == pytest.approx(256, abs=1.5)  # 600 rows: standard error up to 0.5
    assert counts.std() == pytest.approx(deviation, rel=0.15)


@pytest.mark.parametrize("kind", ["two-point", "constant", "no visible key"])
def test_odd_rows_make_no_nan(attention, kind):
    q, k, v, mask = inputs(batch=1, queries=64, heads=1, kv_heads=1)
    q = jnp.ones_like(q)
    k = jnp.where(jnp.arange(64)[None, :, None, None] % 2 == 0, 1.0, -1.0 if kind == "two-point" else 1.0)
    k = jnp.broadcast_to(k, q.shape)
    if kind == "no visible key":
        mask = jnp.zeros_like(mask)

    def total(q, k, v):
        y, attended = attention(q, k, v, mask, r=R, top_k=3)
        return jnp.sum(y), attended

    (value, attended), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
    if kind == "no visible key":
        assert float(value) == 0
        np.testing.assert_array_equal(attended, 0)
    elif kind == "constant":
        np.testing.assert_array_equal(attended[0, :, 0], np.arange(1, 65))
    else:
        assert (np.asarray(attended) >= 1).all()


def test_sanity_configuration_is_plain_attention(attention):
    q, k, v, mask = inputs()
    y = attention(q, k, v, mask, r=WIDTH, top_k=40, weighting="none")[0]
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2)) / jnp.sqrt(WIDTH)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    np.testing.assert_allclose(y, jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, 2)), atol=1e-5)


def test_gradients_by_finite_differences(attention):
    with jax.enable_x64(True):
        q, k, v, mask = inputs(batch=1, queries=9, heads=2, kv_heads=1, dtype=jnp.float64)
        g = jax.random.normal(jax.random.key(5), q.shape, jnp.float64)
        directions = [jax.random.normal(jax.random.key(i), x.shape, jnp.float64) for i, x in enumerate((q, k, v))]

        def total(step):
            arrays = [x + step * d for x, d in zip((q, k, v), directions, strict=True)]
            return jnp.sum(g * attention(*arrays, mask, r=R, top_k=3)[0])

        numeric = (total(1e-6) - total(-1e-6)) / 2e-6
        assert float(jax.grad(total)(0.0)) == pytest.approx(float(numeric), rel=1e-7)


def test_bfloat16(attention):
    q, k, v, mask = inputs(dtype=jnp.bfloat16)
    y, _ = attention(q, k, v, mask, r=R, top_k=8)
    expected, _ = loops(q, k, v, mask, R, 8)
    assert y.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 2e-2


def test_bad_input():
    q, k, v, mask = inputs()
    with pytest.raises(ConfigError, match=r"spark_attention.r=12: must be between 1 and 11"):
        spark_attention(q, k, v, mask, r=12, top_k=8)
    with pytest.raises(ConfigError, match=r"head count must divide"):
        spark_attention(q, jnp.tile(k, (1, 1, 3, 1))[:, :, :3], v, mask, r=4, top_k=8)
