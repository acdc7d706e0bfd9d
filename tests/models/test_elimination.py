"""Blocks of tokens that layers leave out: formulas, and what a decoder computes with and without them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.elimination import (
    BLOCK_INPUTS,
    BLOCK_SCORES,
    FFN_IMPORTANCE,
    Elimination,
    Network,
    attention_scores,
    block_means,
    chosen_blocks,
    context_of_blocks,
    ffn_importance,
    pairs_of_blocks,
    predicted_importance,
    predicted_scores,
    put,
    taken,
)
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from tests.models.conftest import CONFIGS, build

BATCH, LENGTH, BLOCK = 2, 24, 4
BLOCKS = LENGTH // BLOCK
SEGMENTS = np.array([[1] * 7 + [2] * 12 + [0] * 5, [1] * 15 + [2] * 1 + [3] * 8])


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def visible_pairs(pairs, window=None):
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS > 0)[:, :, None]
    if pairs == "visible":
        seen &= i >= j
        seen &= True if window is None else i - j < window
    return seen


@pytest.mark.parametrize(("pairs", "window"), [("visible", None), ("visible", 5), ("all", None)])
def test_scores_of_blocks(pairs, window):
    """max over a block of mean_h max(q k, 0), LeMo's I(B_mn)."""
    q, k = drawn(BATCH, LENGTH, 6, 8), drawn(BATCH, LENGTH, 2, 8, seed=1)
    rule = Visibility.of_tokens(jnp.asarray(SEGMENTS), window)
    found = attention_scores(q, k, rule, jnp.asarray(SEGMENTS > 0), block=BLOCK, scale=0.3, pairs=pairs)
    products = 0.3 * np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 3, axis=2))
    scores = np.where(visible_pairs(pairs, window), np.maximum(products, 0).mean(axis=1), 0)
    expected = scores.reshape(BATCH, BLOCKS, BLOCK, BLOCKS, BLOCK).max(axis=(2, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_importance_to_a_feed_forward_network():
    hidden = drawn(BATCH, LENGTH, 10)
    found = ffn_importance(jnp.asarray(hidden), jnp.asarray(SEGMENTS > 0), BLOCK)
    magnitude = np.abs(hidden) * (SEGMENTS > 0)[..., None]
    np.testing.assert_allclose(found, magnitude.reshape(BATCH, BLOCKS, BLOCK, 10).max(2).sum(-1), rtol=1e-6)


def test_means_of_blocks_are_over_tokens():
    x = drawn(BATCH, LENGTH, 3)
    found = np.asarray(block_means(jnp.asarray(x), jnp.asarray(SEGMENTS > 0), BLOCK))
    np.testing.assert_allclose(found[0, 4], x[0, 16:19].mean(0), rtol=1e-5)  # its last token is padding
    np.testing.assert_allclose(found[1, 2], x[1, 8:12].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(found[0, 5], 0)


@pytest.mark.parametrize("pairs", ["visible", "all"])
def test_blocks_that_may_see_each_other(pairs):
    expected = visible_pairs(pairs).reshape(BATCH, BLOCKS, BLOCK, BLOCKS, BLOCK).any(axis=(2, 4))
    np.testing.assert_array_equal(pairs_of_blocks(jnp.asarray(SEGMENTS), BLOCK, pairs), expected)


def test_blocks_are_chosen_by_importance_and_padding_comes_last():
    importance = np.array([[-3, -1, 0, -2, -1, 9], [1, 5, 5, 5, 0, 2]], np.float32)
    found = chosen_blocks(jnp.asarray(importance), jnp.asarray(SEGMENTS > 0), 3)
    np.testing.assert_array_equal(found, [[1, 2, 4], [1, 2, 3]])
    assert 5 in chosen_blocks(jnp.asarray(importance), jnp.asarray(SEGMENTS > 0), 6)[0]


def test_blocks_are_taken_and_put_back():
    x, places = drawn(BATCH, LENGTH, 3), np.array([[0, 3], [2, 5]])
    rows = (places[..., None] * BLOCK + np.arange(BLOCK)).reshape(BATCH, -1)
    expected = np.take_along_axis(x, rows[..., None], axis=1)
    np.testing.assert_array_equal(taken(jnp.asarray(x), jnp.asarray(places), BLOCK), expected)
    found = put(jnp.asarray(x), jnp.asarray(places), jnp.asarray(-expected), BLOCK)
    kept = np.stack([np.isin(np.arange(LENGTH), own) for own in rows])[..., None]
    np.testing.assert_array_equal(found, np.where(kept, -x, x))


def test_kept_tokens_keep_positions_and_see_kept_keys_alone():
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in ([7, 12, 5], [15, 1, 8])])
    everywhere = Visibility.of_tokens(jnp.asarray(SEGMENTS))
    rules = {"global": everywhere, "local": everywhere.within(6)}
    ctx = CallContext(jnp.asarray(positions), jnp.asarray(SEGMENTS), rules)
    places = np.array([[0, 2, 4], [1, 2, 4]])
    found = context_of_blocks(ctx, jnp.asarray(places), BLOCK)
    rows = (places[..., None] * BLOCK + np.arange(BLOCK)).reshape(BATCH, -1)
    np.testing.assert_array_equal(found.positions_BT, np.take_along_axis(positions, rows, 1))
    np.testing.assert_array_equal(found.valid_BT, np.take_along_axis(SEGMENTS > 0, rows, 1))
    for name, window in (("global", None), ("local", 6)):
        whole = np.asarray(everywhere.within(window).mask)
        expected = np.stack([whole[b][rows[b]][:, rows[b]] for b in range(BATCH)])
        np.testing.assert_array_equal(found.visible[name].mask, expected)
        counts = expected.sum(-1)[np.take_along_axis(SEGMENTS > 0, rows, 1)]
        np.testing.assert_allclose(found.keys_seen[name], counts.mean(), rtol=1e-6)


def network(width, rank, outputs, seed):
    shapes = [(width, rank), (rank, width), (width, outputs)]
    return Network(*(jnp.asarray(drawn(*shape, seed=seed + i)) for i, shape in enumerate(shapes)))


def test_predictors():
    """Three matrices with ReLU between; scores are the product of two such networks, importance its column sums."""
    means = drawn(BATCH, BLOCKS, 5)
    pair = {"query": network(5, 3, 4, 1), "key": network(5, 3, 4, 7)}

    def of(net):
        return np.maximum(np.maximum(means @ net.inner, 0) @ net.middle, 0) @ net.outer

    scores = of(pair["query"]) @ np.swapaxes(of(pair["key"]), 1, 2)
    np.testing.assert_allclose(predicted_scores(pair, means), scores, rtol=1e-4, atol=1e-4)
    may = np.asarray(pairs_of_blocks(jnp.asarray(SEGMENTS), BLOCK, "visible"))
    found = predicted_importance(pair, "attention", means, jnp.asarray(SEGMENTS), BLOCK, "visible")
    np.testing.assert_allclose(found, np.where(may, scores, 0).sum(1), rtol=1e-4, atol=1e-4)
    single = network(5, 3, 1, 20)
    found = predicted_importance(single, "ffn", means, jnp.asarray(SEGMENTS), BLOCK, "visible")
    np.testing.assert_allclose(found, of(single)[..., 0], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- the decoder


def one_layer(**changes):
    return dataclasses.replace(CONFIGS["llama"], layers=1, **changes)


def tokens_of(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 61, (BATCH, LENGTH)), jnp.int32)


SEGMENT_IDS = jnp.asarray(SEGMENTS, jnp.int32)


def without(model, path):
    """The model with a matrix of its one layer set to 0."""
    graphdef, state = nnx.split(model)
    found = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    part = found.segments[0].blocks[0]
    for name in path.split("/")[:-1]:
        part = getattr(part, name)
    weight = getattr(part, path.split("/")[-1])
    weight[...] = jnp.zeros_like(weight[...])
    return found


@pytest.fixture(scope="module")
def single():
    return build(one_layer())


def hidden_of(model, **kwargs):
    graphdef, state = nnx.split(model)
    given = {"segment_ids": SEGMENT_IDS, "logits": False, **kwargs}
    return jax.jit(lambda state: nnx.merge(graphdef, state)(tokens_of(), **given))(state)


@pytest.fixture(scope="module")
def seen(single):
    """What the blocks of the one layer are to attention and FFN."""
    rule = Elimination(block=BLOCK, kept={}, observes=True)
    return {name: np.asarray(x[0]) for name, x in hidden_of(single, eliminate=rule).records.items()}


def rows_of(importance, kept):
    importance = np.where(SEGMENTS.reshape(BATCH, BLOCKS, BLOCK).any(-1), importance, -1)
    places = np.sort(np.argsort(-importance, axis=-1, kind="stable")[:, :kept], axis=-1)
    return (places[..., None] * BLOCK + np.arange(BLOCK)).reshape(BATCH, -1)


def test_attention_of_kept_blocks_is_that_of_the_shorter_sequence(single, seen):
    """Positions stay; what is left out has no attention, but its FFN."""
    rows = rows_of(seen[BLOCK_SCORES].sum(1), 3)
    out = hidden_of(single, eliminate=Elimination(block=BLOCK, kept={"attention": (3,)}))
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in ([7, 12, 5], [15, 1, 8])])

    def cut(x):
        return jnp.asarray(np.take_along_axis(np.asarray(x), rows, axis=1))

    short = single(cut(tokens_of()), segment_ids=cut(SEGMENT_IDS), positions=cut(positions), logits=False)
    bare = np.asarray(hidden_of(without(single, "attention/projections/o_NHD")).hidden)
    expected = np.array(bare)
    for b in range(BATCH):
        expected[b, rows[b]] = short.hidden[b]
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(out.hidden)[real], expected[real], atol=2e-5)
    assert np.abs(bare - np.asarray(hidden_of(single).hidden))[real].max() > 0.01
    np.testing.assert_allclose(out.stats["attended_keys"], short.stats["attended_keys"], rtol=1e-6)


def test_a_network_of_kept_blocks_leaves_the_others_as_they_are(single, seen):
    rows = rows_of(seen[FFN_IMPORTANCE], 2)
    out = np.asarray(hidden_of(single, eliminate=Elimination(block=BLOCK, kept={"ffn": (2,)})).hidden)
    kept = np.stack([np.isin(np.arange(LENGTH), own) for own in rows])[..., None]
    whole, bare = hidden_of(single).hidden, hidden_of(without(single, "ffn/down_FD")).hidden
    np.testing.assert_allclose(out, np.where(kept, whole, bare), atol=2e-5)


def test_observing_leaves_nothing_out(single, seen):
    rule = Elimination(block=BLOCK, kept={"attention": (1,), "ffn": (1,)}, observes=True)
    out = hidden_of(single, eliminate=rule)
    np.testing.assert_array_equal(out.hidden, hidden_of(single).hidden)
    block = nnx.merge(*nnx.split(single)).segments[0].blocks[0]
    x = np.asarray(single.embedding_VD[...])[np.asarray(tokens_of())]
    scale = np.asarray(block.attention_residual.pre.scale[...])[0]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    expected = block_means(jnp.asarray(normed), jnp.asarray(SEGMENTS > 0), BLOCK)
    np.testing.assert_allclose(seen[BLOCK_INPUTS][0], expected, atol=1e-5)


def test_thresholds_do_by_masks_what_capacities_do_by_gathering(single, seen):
    """With thresholds between the third and the fourth block, where both sequences have that many."""
    importance = np.sort(seen[BLOCK_SCORES].sum(1), axis=-1)
    between = (importance[0, -3] + importance[0, -4]) / 2
    rule = Elimination(block=BLOCK, kept={}, thresholds={"attention": jnp.array([between]), "ffn": jnp.array([-1.0])})
    masked = np.asarray(hidden_of(single, eliminate=rule).hidden)[0]
    gathered = np.asarray(hidden_of(single, eliminate=Elimination(block=BLOCK, kept={"attention": (3,)})).hidden)[0]
    real = SEGMENTS[0] > 0
    np.testing.assert_allclose(masked[real], gathered[real], atol=2e-5)


def test_gradients_pass_through_kept_blocks_alone(single, seen):
    rows = rows_of(seen[FFN_IMPORTANCE], 2)
    rule = Elimination(block=BLOCK, kept={"ffn": (2,)})
    kept = np.stack([np.isin(np.arange(LENGTH), own) for own in rows])
    graphdef, params, rest = nnx.split(single, nnx.Param, ...)

    @jax.jit
    def gradients(weight_BT):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            out = model(tokens_of(), segment_ids=SEGMENT_IDS, logits=False, eliminate=rule)
            return jnp.sum(weight_BT[..., None] * jnp.sin(out.hidden))

        found = jax.grad(loss)(params)
        return {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(found)}

    of_dropped, of_kept = gradients(jnp.asarray(~kept, jnp.float32)), gradients(jnp.asarray(kept, jnp.float32))
    for path in of_dropped:
        if "/ffn/" in path or "ffn_residual" in path:
            np.testing.assert_array_equal(of_dropped[path], 0)
            assert np.any(of_kept[path] != 0)
        elif "/attention/" in path:
            assert np.any(of_dropped[path] != 0)


PACKED = dataclasses.replace(CONFIGS["gemma2"], layers=4)


@pytest.fixture(scope="module")
def local_and_global():
    return build(PACKED)


def test_scanned_layers_do_what_unrolled_ones_do(local_and_global):
    """With predictors, of which each layer has its own."""
    pair = {"query": network(24, 3, 4, 1), "key": network(24, 3, 4, 7)}
    networks = {"attention": pair, "ffn": network(24, 3, 1, 20)}
    of_layers = jax.tree.map(lambda x: jnp.stack([x, x[::-1], -x, x * 2]), networks)
    model = local_and_global
    results = []
    for predictors in (None, of_layers):
        rule = Elimination(block=BLOCK, kept={"attention": (3,), "ffn": (4,)}, predictors=predictors)
        scanned = hidden_of(model, eliminate=rule)
        each = dataclasses.replace(rule, kept={"attention": (3,) * 4, "ffn": (4,) * 4})
        model.config = dataclasses.replace(PACKED, scan_layers=False)
        unrolled = hidden_of(model, eliminate=each)
        model.config = PACKED
        np.testing.assert_allclose(scanned.hidden, unrolled.hidden, atol=3e-5)
        results.append(np.asarray(scanned.hidden))
    assert np.abs(results[0] - results[1]).max() > 0.01


def test_layers_may_keep_different_numbers(local_and_global):
    rule = Elimination(block=BLOCK, kept={"attention": (6, 6, 2, 6), "ffn": (6,)})
    out = hidden_of(local_and_global, eliminate=rule)
    keys = np.asarray(out.stats["attended_keys"])
    dense = np.asarray(hidden_of(local_and_global).stats["attended_keys"])
    np.testing.assert_array_equal(keys[[0, 1, 3]], dense[[0, 1, 3]])
    assert keys[2] < dense[2]
