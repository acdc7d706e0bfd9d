"""Models laid out for decoding compute what they did before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError, SparsezooWarning
from sparsezoo_jax.inference import Engine, Formats, Sampling, packed, restore
from sparsezoo_jax.inference.attention import PackedGQA, PackedMLA, PackedSparkAttention
from sparsezoo_jax.inference.cost import bytes_read
from sparsezoo_jax.inference.delta import PackedDeltaFFN
from sparsezoo_jax.inference.experts import (
    PackedBlockFFN,
    PackedDECOFFN,
    PackedMoEFFN,
    PackedMoEXFFN,
    PackedReadMEFFN,
)
from sparsezoo_jax.inference.ffn import (
    MappedGatedFFN,
    MappedPlainFFN,
    PackedGatedFFN,
    PackedPlainFFN,
    PackedReGLUFFN,
    PackedSparkFFN,
    PackedSparseLMFFN,
)
from sparsezoo_jax.inference.matrices import Rows
from sparsezoo_jax.inference.sparsified import PackedSparsifiedFFN
from sparsezoo_jax.inference.sparsified_attention import PackedSparsifiedAttention
from sparsezoo_jax.models import ATTENTION_KINDS, FFN_KINDS, Sparsity, bytes_per_token
from sparsezoo_jax.models.accounting import abstract_decoder, reads_per_token
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.common import EXACT_ZERO_ACTIVATIONS
from sparsezoo_jax.models.deco import DECOConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.masks import ActivationSparsity
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.spark import SparkFFN
from sparsezoo_jax.models.sparsified import SparsifiedAttentionConfig, SparsifiedFFNConfig
from tests.models.conftest import CONFIGS, forward

GREEDY = Sampling(temperature=0)


def mixture(**ffn):
    return dataclasses.replace(CONFIGS["llama"], layers=1, ffn=MoEFFNConfig(experts=6, expert_width=8, **ffn))


def masked(ffn, maps=None):
    """A layer of experts of which all maps leave channels out, or `maps`."""
    maps = tuple(name for name in ffn.linear_maps(24) if "neurons" not in name) if maps is None else maps
    sparsity = ActivationSparsity(maps=maps, target=0.5, weighted=() if "neurons" in maps else maps)
    return dataclasses.replace(CONFIGS["llama"], layers=1, ffn=SparsifiedFFNConfig(of=ffn, sparsity=sparsity))


def masked_attention(kind):
    """Layers of which all maps of attention leave channels out."""
    attention = CONFIGS[kind].attention
    maps = tuple(attention.linear_maps(24))
    sparsity = ActivationSparsity(maps=maps, target=0.5, weighted=maps)
    attention = SparsifiedAttentionConfig(of=attention, sparsity=sparsity)
    return dataclasses.replace(CONFIGS[kind], layers=2, attention=attention)


# One layer where all are alike.
KINDS = {
    **{kind: dataclasses.replace(CONFIGS[kind], layers=2) for kind in ("gemma2", "spark")},
    **{
        kind: dataclasses.replace(CONFIGS[kind], layers=1)
        for kind in ("llama", "gpt2", "blockffn", "moex", "mohd", "sparselm", "lazy", "delta", "sparsified", "readme")
    },
    "deco": dataclasses.replace(CONFIGS["deco"], layers=1, first_layers=0, first_ffn=None),
    "gemma3n": dataclasses.replace(
        CONFIGS["gemma3n"], layers=1, ffn=GatedFFNConfig(d_ff=64, activation_sparsity_pattern=(0.9,))
    ),
    "plm": dataclasses.replace(
        CONFIGS["blockffn"],
        layers=1,
        attention=dataclasses.replace(CONFIGS["blockffn"].attention, q_lora_rank=None),
        ffn=PlainFFNConfig(d_ff=32, activation="relu2"),
    ),
    "prosparse": dataclasses.replace(
        CONFIGS["llama"], layers=1, ffn=GatedFFNConfig(d_ff=32, activation="relu", l1=True, threshold=0.2)
    ),
    "cats": dataclasses.replace(
        CONFIGS["llama"],
        layers=1,
        ffn=SparsifiedFFNConfig(
            of=GatedFFNConfig(d_ff=32, activation="silu"),
            sparsity=ActivationSparsity(maps=("neurons",), target=0.5),
        ),
    ),
    "masked latents": masked_attention("blockffn"),
    "masked spark": dataclasses.replace(
        masked_attention("spark"),
        ffn=SparsifiedFFNConfig(
            of=CONFIGS["spark"].ffn,
            sparsity=ActivationSparsity(maps=("gate", "down"), target=0.5, weighted=("gate", "down")),
        ),
    ),
    "masked experts": masked(
        MoEFFNConfig(experts=12, expert_width=8, k=4, router="deepseek", activation="gelu_tanh", gated=True)
    ),
    "masked neurons": masked(BlockFFNConfig(experts=6, expert_width=8, gated=True), ("neurons",)),
    "masked units": masked(DECOConfig(experts=6, expert_width=8, shared_width=10)),
    "masked features": masked(MoEXFFNConfig(experts=6, expert_width=8, k=3)),
    "moe": mixture(k=4, router="deepseek", activation="gelu_tanh", gated=True),
    "remoe": mixture(k=2, router="remoe", router_std=0.3),
    "ling": dataclasses.replace(
        CONFIGS["llama"],
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=32, activation="silu"),
        ffn=MoEFFNConfig(
            router="ling",
            experts=9,
            shared_experts=1,
            expert_width=8,
            k=4,
            groups=4,
            kept_groups=2,
            routed_scale=2.5,
            gated=True,
        ),
    ),
}
#: Attention, and the FFNs of the layers from the bottom up.
LAID_OUT = {
    "gemma2": (PackedGQA, PackedGatedFFN),
    "spark": (PackedSparkAttention, PackedSparkFFN),
    "llama": (PackedGQA, PackedGatedFFN),
    "gpt2": (PackedGQA, MappedPlainFFN),
    "blockffn": (PackedMLA, PackedBlockFFN),
    "plm": (PackedMLA, PackedPlainFFN),
    "lazy": (PackedGQA, PackedPlainFFN),
    "delta": (PackedGQA, PackedDeltaFFN),
    "deco": (PackedGQA, PackedDECOFFN),
    "moex": (PackedGQA, PackedMoEXFFN),
    "mohd": (PackedGQA, MappedGatedFFN),
    "sparselm": (PackedGQA, PackedSparseLMFFN),
    "prosparse": (PackedGQA, PackedReGLUFFN),
    "gemma3n": (PackedGQA, MappedGatedFFN),
    "moe": (PackedGQA, PackedMoEFFN),
    "remoe": (PackedGQA, PackedMoEFFN),
    "ling": (PackedGQA, PackedGatedFFN, PackedMoEFFN),
    "sparsified": (PackedSparsifiedAttention, PackedSparsifiedFFN),
    "masked latents": (PackedSparsifiedAttention, PackedBlockFFN),
    "masked spark": (PackedSparsifiedAttention, PackedSparsifiedFFN),
    "masked experts": (PackedGQA, PackedSparsifiedFFN),
    "masked neurons": (PackedGQA, PackedSparsifiedFFN),
    "masked units": (PackedGQA, PackedSparsifiedFFN),
    "masked features": (PackedGQA, PackedSparsifiedFFN),
    "readme": (PackedGQA, PackedReadMEFFN),
    "cats": (PackedGQA, PackedSparsifiedFFN),
}


@pytest.fixture(scope="module", params=list(LAID_OUT))
def kind(request):
    return request.param


def drawn(config):
    """A decoder whose parameters, norms and biases among them, are all random: much faster than initialising it."""
    graphdef, params, rest = nnx.split(abstract_decoder(config), nnx.Param, ...)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale, centre = (0.2, 0) if leaf.ndim > 2 or "VD" in str(path) or "DV" in str(path) else (0.1, 1)
        return jnp.asarray(centre + scale * rng.standard_normal(leaf.shape), leaf.dtype)

    def start(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if "cut_P" in str(path):
            return jnp.full(leaf.shape, 0.3, leaf.dtype)
        router = "bias_E" in str(path)  # of zero it would choose no experts but those of the largest scores
        return jnp.asarray(rng.standard_normal(leaf.shape) if router else np.zeros(leaf.shape), leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(draw, params), jax.tree_util.tree_map_with_path(start, rest)
    return nnx.merge(graphdef, *filled).unstacked()


@pytest.fixture(scope="module")
def model(kind):
    return drawn(KINDS[kind])


@pytest.fixture(scope="module")
def run(model):
    """The whole forward pass as trained, with the weights of any model of the kind; compiled once."""
    graphdef, _ = nnx.split(model)
    call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    return lambda model, tokens: call(nnx.split(model)[1], tokens)


@pytest.fixture(scope="module")
def laid_out(model):
    return packed(model)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 24), 0, 61)


def decoded(model, tokens, chunks):
    """The outputs of `model` for chunks of these lengths, one after another, over one cache."""
    step, cache, start, outputs = forward(model), model.init_cache(2, 32), 0, []
    for length in chunks:
        out = step(tokens[:, start : start + length], cache=cache)
        outputs.append(out)
        cache, start = out.cache, start + length
    return outputs


def joined(outputs, name):
    return jnp.concatenate([getattr(out, name) for out in outputs], axis=1)


def test_every_kind_has_a_sample():
    """By the kinds of layers that are laid out here: a new one belongs into `LAID_OUT`."""
    for registry, part in ((FFN_KINDS, "ffn"), (ATTENTION_KINDS, "attention")):
        sampled = {getattr(KINDS[name], part).kind for name in LAID_OUT}
        own = {name for name, kind in registry.members().items() if kind.__module__.startswith("sparsezoo_jax")}
        assert sampled == own - {"mixer"}  # which is for images, and never decoded


def test_a_kind_without_a_layout_is_named(tokens):
    config = dataclasses.replace(CONFIGS["spark"], layers=2)
    config = dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, selection="exact"))
    with pytest.warns(SparsezooWarning, match="model.ffn.kind=spark: no layout for decoding, 2 layers stay as trained"):
        assert type(packed(drawn(config)).segments[0].blocks[0].ffn) is SparkFFN


@pytest.mark.slow
def test_modules_get_their_layout(kind, laid_out):
    attention, *ffns = LAID_OUT[kind]
    for i, period in enumerate(laid_out.segments):
        (block,) = period.blocks
        assert type(block.attention) is attention
        assert type(block.ffn) is ffns[min(i, len(ffns) - 1)]


@pytest.mark.slow
def test_prompts_and_steps_equal_the_full_forward(model, run, laid_out, tokens):
    """A prompt, single tokens and a chunk of a few; over windows and over slots not yet written."""
    expected, chunks = run(model, tokens), [18, 1, 1, 3, 1]
    outputs = decoded(laid_out, tokens, chunks)
    np.testing.assert_allclose(joined(outputs, "logits"), expected.logits, atol=1e-4)
    for name in ("ffn_density", "attended_keys"):
        mean = np.average([out.stats[name] for out in outputs], axis=0, weights=chunks)
        np.testing.assert_allclose(mean, expected.stats[name], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "spark", "blockffn"], indirect=True)
def test_padding_in_front_is_not_seen(model, run, laid_out, tokens):
    padded = jnp.pad(tokens[:, :18], ((0, 0), (5, 0)))
    real = jnp.broadcast_to(jnp.arange(23) >= 5, padded.shape).astype(jnp.int32)
    expected, step = run(model, tokens).logits, forward(laid_out)
    out = step(padded, segment_ids=real, cache=laid_out.init_cache(2, 32))
    np.testing.assert_allclose(out.logits[:, 5:], expected[:, :18], atol=1e-4)
    following = step(tokens[:, 18:19], cache=out.cache)
    np.testing.assert_allclose(following.logits, expected[:, 18:19], atol=1e-4)


def without_weights(model):
    """A model of this kind whose parameters are not numbers."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params), rest)


@pytest.mark.slow
def test_all_parameters_come_back_exactly(model, laid_out):
    like = without_weights(model)
    restore(laid_out, like)
    found, expected = (dict(nnx.to_flat_state(nnx.state(part, nnx.Param))) for part in (like, model))
    for path, variable in expected.items():
        np.testing.assert_array_equal(found[path][...], variable[...], err_msg=str(path))


MIXED = Formats("float32", predictor="int8", head="int8")
INT8 = ("spark", "llama", "gpt2", "deco", "moe", "moex", "mohd", "lazy")
PROMPTS = [("spark", MIXED), ("llama", "bfloat16"), ("blockffn", "int8")]
STEPS = [(kind, "int8") for kind in (*INT8, "masked experts", "masked neurons")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "formats"), PROMPTS + STEPS, indirect=["kind"], ids=str)
def test_number_formats(kind, model, run, tokens, formats):
    """What is computed is the model with rounded weights, and these are near the original ones."""
    other, rounded = packed(model, formats), without_weights(model)
    restore(other, rounded)
    rounded.embedding_VD[...] = model.embedding_VD[...]  # rounded only where it makes logits
    outputs = decoded(other, tokens, [18, 1] if (kind, formats) in PROMPTS else [1] * 6)
    # Natively, tokens that meet int8 are rounded to 16 bits, a hundredth of what rounding the weights changes.
    error = {"atol": 0.05, "rtol": 0.05} if formats == "bfloat16" else {"atol": 3e-3}
    hidden, logits = joined(outputs, "hidden"), joined(outputs, "logits")
    np.testing.assert_allclose(hidden, run(rounded, tokens).hidden[:, : hidden.shape[1]], **error)
    expected = run(model, tokens).logits[:, : logits.shape[1]]
    difference = jnp.linalg.norm(logits - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    # The median: for a few tokens, rounding changes the choice of experts or neurons.
    assert 0 < float(jnp.median(difference)) < 0.05


def test_int8_keeps_a_factor_for_each_row():

    pair = jax.random.normal(jax.random.key(0), (6, 5)), 100 * jax.random.normal(jax.random.key(1), (6, 3))
    rows = Rows(pair, "int8", jnp.dtype("float32"))
    stored, scale = rows.arrays
    assert (stored.dtype, stored.shape, scale.shape) == (jnp.int8, (6, 8), (6, 2))
    for part, found, factor in zip(pair, rows.parts(), scale.T, strict=True):
        assert (jnp.abs(found - part) <= factor[:, None] * 0.5001).all()
        assert int(jnp.abs(stored).max()) == 127
    zero = Rows(jnp.zeros((2, 4)), "int8", jnp.dtype("float32"))
    np.testing.assert_array_equal(zero.restored(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "blockffn"], indirect=True)
def test_the_engine_takes_a_packed_model(model, laid_out):
    def text(engine, **kwargs):
        generation = engine.generate([[5, 17, 3, 3, 44, 17, 3]], max_new_tokens=30, sampling=GREEDY, **kwargs)
        for _ in generation:
            pass
        return generation.rows

    plain, engine = text(Engine(model)), Engine(laid_out)
    assert text(engine) == plain
    assert text(engine, drafts=4) == plain


def reads_all(ffn):
    """Whether a token reads the weights of all neurons, whatever is active."""
    if ffn.kind == "sparsified":
        return ffn.of.kind in ("gated", "plain") and "neurons" not in ffn.sparsity.maps
    return ffn.kind == "gated" or (ffn.kind == "plain" and ffn.activation not in EXACT_ZERO_ACTIVATIONS)


def read(model, formats):
    """Bytes for a token after 20, those of weights alone, and what the configuration counts."""
    config, layers, specs = model.config, model.config.layers, model.config.layer_specs()
    density = [1 if reads_all(spec.ffn) else 0.25 for spec in specs]
    stats = {"ffn_density": np.array(density), "attended_keys": np.full(layers, 6.0)}
    active = tuple(share * spec.ffn.d_ff for share, spec in zip(density, specs, strict=True))
    measured = Sparsity(active, (6.0,) * layers)
    cache = reads_per_token(config, 20, sparsity=measured).cache * 4
    found = bytes_read(packed(model, formats), 20, stats)
    return found, found - cache, bytes_per_token(config, 20, logits=True, sparsity=measured)


# Of mohd, all of the fusion is read.
@pytest.mark.parametrize("kind", [kind for kind in LAID_OUT if kind != "mohd"], indirect=True)
def test_bytes_are_what_the_configuration_counts(model):
    found, _, counted = read(model, "model")
    assert found == pytest.approx(counted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spark", "blockffn", "moex", "mohd"], indirect=True)
def test_bytes_of_int8_rows_and_their_factors(kind, model):
    """A row of n weights is n + 4 bytes; routers stay in float32."""
    _, weights, _ = read(model, "int8")
    head = 61 * 28
    expected = {
        "spark": 2 * (64 * 28 + 24 * 36 + 48 * 16 + 12 * (12 + 24 + 8)) + head,
        # Down, queries, keys, values, output; router and its scales; 2 of 8 experts.
        "blockffn": 32 * 28 + 36 * 20 + 36 * 12 + 18 * 16 + 24 * 22 + 4 * (24 * 8 + 8) + 2 * 12 * 28 + head,
        # Means and variances of the experts; 24 of 96 neurons' first rows, and as many second ones.
        "moex": 72 * 28 + 24 * 28 + 4 * 2 * 8 * 24 + 2 * 24 * 28 + head,
        # Two thirds of the width, by rows of the width; routers and fusions whole.
        "mohd": 24 * 2 / 3 * (36 + 20 + 68 + 36 + 65) + 4 * (3 * 24 * 6 + 2 * (6 * 4 * 4 + 4 * 6 * 6)),
    }
    assert weights == pytest.approx(expected[kind])


@pytest.mark.parametrize("kind", ["spark"], indirect=True)
def test_bytes_of_mixed_formats(model):
    whole, *_ = read(model, "model")
    small, *_ = read(model, Formats("model", predictor="int8", head="bfloat16"))
    assert small == pytest.approx(whole - 2 * 48 * (3 * 12 - 4) - 2 * 61 * 24)


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_unknown_formats(model):
    with pytest.raises(ConfigError, match="--weights=int4: must be one of model, float32, bfloat16, int8"):
        packed(model, "int4")
    with pytest.raises(ConfigError, match="--head=fp8"):
        packed(model, Formats(head="fp8"))
