"""Recording of internal arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.records import RECORDS
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig
from tests.models.conftest import CONFIGS

SPARK = DecoderConfig(
    vocab_size=32,
    d_model=16,
    layers=4,
    max_seq_len=24,
    layer_pattern=("local", "global"),
    attention=SparkAttentionConfig(heads=4, kv_heads=2, head_dim=8, top_k=4, r=4, window=8),
    ffn=SparkFFNConfig(d_ff=40, top_k=5, r=8),
)
DENSE = dataclasses.replace(
    SPARK,
    attention=GQAConfig(heads=4, kv_heads=2, head_dim=8, window=8),
    ffn=GatedFFNConfig(d_ff=24),
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 32)
SEGMENTS = jnp.ones((2, 24), jnp.int32).at[1, 10:].set(2).at[1, 20:].set(0)


@functools.cache
def parameters(config):
    return nnx.split(Decoder(config, rngs=nnx.Rngs(0)))


def forward(config, *, scan=True, **kwargs):
    """A jitted call of the decoder of `config`, every time with the same parameters."""
    graphdef, state = parameters(config)

    @jax.jit
    def apply(state, tokens, segments):
        model = nnx.merge(graphdef, state)
        model.config = dataclasses.replace(config, scan_layers=scan)
        return model(tokens, segment_ids=segments, **kwargs)

    return apply(state, TOKENS, SEGMENTS)


@pytest.fixture(scope="module")
def spark():
    return forward(SPARK, record=tuple(RECORDS))


@pytest.mark.slow
def test_shapes(spark):
    # This model has no experts, and is not sparsified.
    others = {name for name in RECORDS if name.startswith(("input_", "scores_"))} | {"expert_scores", "gate_scores"}
    assert set(spark.records) == set(RECORDS) - others
    shapes = {name: {x.shape for x in layers} for name, layers in spark.records.items()}
    assert shapes == {
        "ffn_scores": {(2, 24, 40)},
        "ffn_gate": {(2, 24, 40)},
        "ffn_hidden": {(2, 24, 40)},
        "ffn_output": {(2, 24, 16)},
        "residual": {(2, 24, 16)},
        "attention_scores": {(2, 4, 24, 24)},
        "attention_selected": {(2, 4, 24, 24)},
        "attention_visible": {(2, 24, 24)},
        "sublayer_input": {(2, 2, 24, 16)},
    }
    assert all(len(layers) == 4 for layers in spark.records.values())


def test_values_agree_with_statistics(spark):
    valid = np.asarray(SEGMENTS) > 0
    for layer in range(4):
        gate, scores = (np.asarray(spark.records[name][layer]) for name in ("ffn_gate", "ffn_scores"))
        threshold = scores.mean(-1) + scores.std(-1, ddof=1) * 1.1503493804  # Q(1 - 5 / 40)
        np.testing.assert_array_equal(gate != 0, scores > threshold[..., None])
        assert (gate != 0)[valid].mean() == pytest.approx(float(spark.stats["ffn_density"][layer]), rel=1e-5)
        selected = np.asarray(spark.records["attention_selected"][layer])
        visible = np.asarray(spark.records["attention_visible"][layer])
        assert not np.any(selected & ~visible[:, None])
        attended = selected.sum(-1).mean(1)[valid].mean()
        assert attended == pytest.approx(float(spark.stats["attended_keys"][layer]), rel=1e-5)
        few = np.broadcast_to(visible.sum(-1)[:, None] <= 4, selected.shape[:3])
        np.testing.assert_array_equal(selected[few], np.broadcast_to(visible[:, None], selected.shape)[few])
    local, all_keys = (np.asarray(spark.records["attention_visible"][i]).sum(-1).max() for i in (0, 1))
    assert (local, all_keys) == (8, 24)


def test_attention_scores_belong_to_their_heads(spark):
    """The selected keys of every head are those above the threshold of that head's own scores."""
    scores, selected = (np.asarray(spark.records[f"attention_{name}"][1]) for name in ("scores", "selected"))
    visible = np.asarray(spark.records["attention_visible"][1])
    for head in range(4):
        for query in (8, 15, 23):
            row = scores[0, head, query, visible[0, query]]
            n = len(row)
            quantile = -float(jax.scipy.special.ndtri(4 / n))
            threshold = row.mean() + row.std(ddof=1) * quantile
            kept = (row >= threshold) | (row == row.max())
            np.testing.assert_array_equal(selected[0, head, query, visible[0, query]], kept)


def test_scanned_and_unrolled_agree(spark):
    unrolled = forward(SPARK, scan=False, record=tuple(RECORDS))
    for name in ("ffn_scores", "attention_scores"):
        for a, b in zip(spark.records[name], unrolled.records[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # another order of float32 sums
    for a, b in zip(spark.records["attention_visible"], unrolled.records["attention_visible"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_recording_changes_nothing_else(spark):
    plain = forward(SPARK)
    assert plain.records == {}
    np.testing.assert_array_equal(plain.logits, spark.logits)
    for name in plain.stats:
        np.testing.assert_array_equal(plain.stats[name], spark.stats[name])


def test_only_what_is_asked_for():
    out = forward(SPARK, record=("ffn_gate",))
    assert set(out.records) == {"ffn_gate"}
    with pytest.raises(ConfigError, match="record=ffn_gates: must be one of ffn_scores"):
        forward(SPARK, record=("ffn_gates",))


def test_dense_layers_record_what_they_have():
    out = forward(DENSE, record=tuple(RECORDS))
    assert set(out.records) == {
        "ffn_scores",
        "ffn_gate",
        "ffn_hidden",
        "ffn_output",
        "attention_visible",
        "residual",
        "sublayer_input",
    }
    np.testing.assert_allclose(
        out.records["ffn_gate"][2], jax.nn.gelu(out.records["ffn_scores"][2], approximate=True), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", [name for name in CONFIGS if name not in ("moe", "mohd", "readme")])
def test_the_output_is_hidden_units_times_the_dictionary(kind):
    config = CONFIGS[kind]
    ffn: Any = config.layer_specs()[-1].ffn.build(config.build_context(), nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 5, config.d_model))
    ones = jnp.ones((1, 5), jnp.int32)
    ctx = CallContext(jnp.arange(5)[None], ones, record=frozenset(["ffn_hidden"]))
    y_BTD, aux = ffn(x_BTD, ctx)
    if kind == "deco":
        y_BTD = y_BTD - ffn.shared(x_BTD, ctx)[0]
    hidden_BTF = aux.records["ffn_hidden"]
    assert hidden_BTF.shape[-1] == config.ffn.d_ff
    assert jnp.any(hidden_BTF != 0)
    np.testing.assert_allclose(hidden_BTF @ ffn.dictionary, y_BTD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_units_that_are_not_kept_leave_output_and_records(scan):
    def keep(layer, records, dictionary_FD):
        assert dictionary_FD.shape == (24, 16)
        return jnp.full(records["ffn_hidden"].shape, layer != 2)

    out = forward(DENSE, scan=scan, record=("ffn_hidden", "ffn_output"), keep=keep)
    whole = forward(DENSE, scan=scan, record=("ffn_output",)).records["ffn_output"]
    np.testing.assert_allclose(out.records["ffn_output"][1], whole[1], atol=1e-6)
    # What is left is the rounding of a sum that is taken off again.
    np.testing.assert_allclose(out.records["ffn_output"][2], 0, atol=1e-5)
    assert [bool(jnp.any(x != 0)) for x in out.records["ffn_hidden"]] == [True, True, False, True]


@pytest.mark.parametrize("scan", [True, False])
def test_the_stream_is_what_the_layers_add_up_to(scan):
    out = forward(DENSE, scan=scan, record=("residual", "ffn_output"))
    stream, last = out.records["residual"], out.records["residual"][-1]
    norm = np.asarray(last) / np.sqrt(np.mean(np.square(last), axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm, out.hidden, rtol=1e-4, atol=1e-5)

    def replaced(name, layer, x):
        return stream[2] if (name, layer) == ("residual", 2) else jnp.zeros_like(x)

    # After layer 2 everything is as it was, and only layer 3's FFN adds nothing.
    edited = forward(DENSE, scan=scan, record=("residual",), edit=lambda n, i, x: replaced(n, i, x) if i < 3 else x)
    np.testing.assert_allclose(edited.hidden, out.hidden, atol=1e-5)
    np.testing.assert_array_equal(edited.records["residual"][1], 0)
    silent = forward(DENSE, scan=scan, edit=lambda n, i, x: x * 0 if (n, i) == ("ffn_output", 3) else x)
    full, short = np.asarray(last), np.asarray(last - out.records["ffn_output"][3])
    assert np.abs(full - short).max() > 1e-3
    norm = short / np.sqrt(np.mean(np.square(short), axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(silent.hidden, norm, rtol=1e-4, atol=1e-5)


def test_edits_see_every_layer_once():
    seen = []
    forward(SPARK, edit=lambda name, layer, x: seen.append((name, layer)) or x)
    assert seen == [(name, layer) for layer in range(4) for name in ("ffn_output", "residual")]


def test_a_summary_takes_the_place_of_the_records():
    def count(records, spec, ctx):
        assert set(records) == {"ffn_gate"}
        return {f"active_{spec.layer_type}": jnp.sum(records["ffn_gate"] != 0) * jnp.any(ctx.valid_BT)}

    out = forward(SPARK, record=("ffn_gate",), summarise=count)
    full = forward(SPARK, record=("ffn_gate",)).records["ffn_gate"]
    expected = [int((np.asarray(x) != 0).sum()) for x in full]
    assert [None if x is None else int(x) for x in out.records["active_local"]] == [
        expected[0],
        None,
        expected[2],
        None,
    ]
    assert [None if x is None else int(x) for x in out.records["active_global"]] == [
        None,
        expected[1],
        None,
        expected[3],
    ]
