"""Models laid out for decoding compute what they did before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.inference import Engine, Formats, Sampling, packed, restored
from sparsezoo_jax.inference.attention import PackedGQA, PackedSparkAttention
from sparsezoo_jax.inference.cost import bytes_read
from sparsezoo_jax.inference.ffn import PackedBlockFFN, PackedGatedFFN, PackedSparkFFN
from sparsezoo_jax.models import Sparsity, bytes_per_token
from sparsezoo_jax.models.ffn import GatedFFNConfig
from tests.models.conftest import CONFIGS, build, forward

GREEDY = Sampling(temperature=0)
# Two layers show what five do; gemma3n's first has a sparse gate.
KINDS = {
    **{kind: dataclasses.replace(config, layers=2) for kind, config in CONFIGS.items() if kind != "gemma3n"},
    "gemma3n": dataclasses.replace(
        CONFIGS["gemma3n"], layers=2, ffn=GatedFFNConfig(d_ff=64, activation_sparsity_pattern=(0.9, 0.0))
    ),
}
LAID_OUT = {
    "gemma2": (PackedGQA, PackedGatedFFN),
    "spark": (PackedSparkAttention, PackedSparkFFN),
    "blockffn": (object, PackedBlockFFN),
    "llama": (PackedGQA, PackedGatedFFN),
    "gpt2": (PackedGQA, object),
    "gemma3n": (PackedGQA, object),
}


@pytest.fixture(scope="module", params=list(LAID_OUT))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return build(KINDS[kind])


@pytest.fixture(scope="module")
def laid_out(model):
    return packed(model)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 30), 0, 61)


def test_kinds_that_have_a_layout_get_it(kind, laid_out):
    attention, ffn = LAID_OUT[kind]
    for period in laid_out.segments:
        (block,) = period.blocks
        assert isinstance(block.attention, attention)
        if kind != "gemma3n":
            assert isinstance(block.ffn, ffn)
    if kind == "gemma3n":
        packed_ffns = [isinstance(period.blocks[0].ffn, PackedGatedFFN) for period in laid_out.segments]
        assert packed_ffns == [False, True], "sparse gates stay"


def test_layers_with_a_routed_width_stay():
    (block,) = packed(build(KINDS["mohd"])).segments[0].blocks
    assert type(block.attention).__name__ == "GQA"
    assert type(block.ffn).__name__ == "GatedFFN"


@pytest.mark.parametrize("chunks", [[30], [5, 1, 1, 20, 1, 1, 1]], ids=str)
def test_prompts_and_steps_equal_the_full_forward(model, laid_out, tokens, chunks):
    """Whole prompts, chunks of few tokens, and single tokens; over windows and over slots not yet written."""
    expected, step = forward(model)(tokens), forward(laid_out)
    cache, start, logits = laid_out.init_cache(2, 40), 0, []
    for length in chunks:
        out = step(tokens[:, start : start + length], cache=cache)
        logits.append(out.logits)
        cache, start = out.cache, start + length
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected.logits, atol=1e-4)
    if chunks == [30]:
        for name in ("ffn_density", "attended_keys"):
            np.testing.assert_allclose(out.stats[name], expected.stats[name], rtol=1e-5)


def test_padding_in_front_is_not_seen(model, laid_out, tokens):
    padded = jnp.pad(tokens[:, :20], ((0, 0), (5, 0)))
    real = jnp.broadcast_to(jnp.arange(25) >= 5, padded.shape).astype(jnp.int32)
    expected, step = forward(model)(tokens), forward(laid_out)
    out = step(padded, segment_ids=real, cache=laid_out.init_cache(2, 40))
    np.testing.assert_allclose(out.logits[:, 5:], expected.logits[:, :20], atol=1e-4)
    following = step(tokens[:, 20:21], cache=out.cache)
    np.testing.assert_allclose(following.logits, expected.logits[:, 20:21], atol=1e-4)


def test_weights_come_back_exactly(kind, model, laid_out):
    like = build(KINDS[kind]).unstacked()
    for _, variable in nnx.to_flat_state(nnx.state(like, nnx.Param)):
        variable[...] = jnp.where(jnp.zeros((), bool), variable[...], jnp.nan) if variable.ndim > 1 else variable[...]
    original = model.unstacked()
    restored(laid_out, like)
    for period, source in zip(like.segments, original.segments, strict=True):
        for block, expected in zip(period.blocks, source.blocks, strict=True):
            for path, variable in nnx.to_flat_state(nnx.state(block, nnx.Param)):
                found, wanted = variable[...], dict(nnx.to_flat_state(nnx.state(expected, nnx.Param)))[path][...]
                laid = "projections" in path or (path[0] == "ffn" and kind in ("gemma2", "spark", "llama"))
                if laid and not path[-1].endswith(("norm", "scale", "bias")):
                    np.testing.assert_array_equal(found, wanted, err_msg=str(path))
    np.testing.assert_array_equal(like.embedding_VD[...], original.embedding_VD[...])


@pytest.mark.parametrize(
    ("formats", "error"),
    [("bfloat16", 0.02), ("int8", 0.05), (Formats("float32", predictor="int8", head="int8"), 0.05)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "blockffn"], indirect=True)
def test_number_formats(model, tokens, formats, error):
    """Rounding weights changes the logits a little, alike for prompts and for steps."""
    other = packed(model, formats)
    expected, step = forward(model)(tokens).logits, forward(other)
    out = step(tokens[:, :29], cache=other.init_cache(2, 40))
    after = step(tokens[:, 29:], cache=out.cache)
    logits = jnp.concatenate([out.logits, after.logits], axis=1)
    difference = jnp.linalg.norm(logits - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    assert 0 < float(jnp.mean(difference[:, :29])) < error
    assert 0 < float(jnp.mean(difference[:, 29:])) < error


def test_int8_keeps_a_factor_for_each_row():
    from sparsezoo_jax.inference.matrices import Rows

    pair = jax.random.normal(jax.random.key(0), (6, 5)), 100 * jax.random.normal(jax.random.key(1), (6, 3))
    rows = Rows(pair, "int8", jnp.dtype("float32"))
    stored, scale = rows.arrays
    assert (stored.dtype, stored.shape, scale.shape) == (jnp.int8, (6, 8), (6, 2))
    for part, found, factor in zip(pair, rows.parts(), scale.T, strict=True):
        assert (jnp.abs(found - part) <= factor[:, None] * 0.5001).all()
        assert int(jnp.abs(stored).max()) == 127
    zero = Rows(jnp.zeros((2, 4)), "int8", jnp.dtype("float32"))
    np.testing.assert_array_equal(zero.restored(), 0)


@pytest.mark.parametrize("kind", ["spark", "llama"], indirect=True)
def test_the_engine_takes_a_packed_model(model, laid_out):
    def text(model, **kwargs):
        generation = Engine(model).generate([[5, 17, 3, 3, 44, 17, 3]], max_new_tokens=30, sampling=GREEDY, **kwargs)
        for _ in generation:
            pass
        return generation.rows

    plain = text(model)
    assert text(laid_out) == plain
    assert text(laid_out, drafts=4) == plain


def test_bytes_follow_the_formats():
    config = KINDS["spark"]
    stats = {"ffn_density": np.full(2, 0.1), "attended_keys": np.full(2, 6.0)}
    # Two heads: r of all visible keys, of which the window leaves 12 in the first layer; the rest of 12.
    cache = 2 * (4 * 12 + 12 * 12 + 4 * 20 + 12 * 12) * 4
    whole = bytes_per_token(config, 20, logits=True, sparsity=Sparsity((4.8, 4.8), (6.0, 6.0)))
    assert bytes_read(config, Formats(), 20, stats) == pytest.approx(whole)
    predictor, head = 2 * 12 * 48, 61 * 24
    assert bytes_read(config, Formats("int8"), 20, stats) == pytest.approx((whole - cache) / 4 + cache)
    small = bytes_read(config, Formats("model", predictor="int8", head="bfloat16"), 20, stats)
    assert small == pytest.approx(whole - 3 * predictor - 2 * head)


def test_unknown_formats():
    model = build(CONFIGS["llama"])
    with pytest.raises(ConfigError, match="--weights=int4: must be one of model, float32, bfloat16, int8"):
        packed(model, "int4")
    with pytest.raises(ConfigError, match="--head=fp8"):
        packed(model, Formats(head="fp8"))
