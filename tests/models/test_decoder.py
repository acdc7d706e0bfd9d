"""What every composition of the decoder must satisfy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQA, GQAConfig
from sparsezoo_jax.models.common import positions_within_segments
from sparsezoo_jax.models.contract import ATTENTION_KINDS, FFN_KINDS, RESIDUAL_KINDS
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.residual import PreNormConfig
from tests.models.conftest import BASE, CONFIGS, build, forward, with_weights_of


@pytest.mark.parametrize(
    ("registry", "part"), [(FFN_KINDS, "ffn"), (ATTENTION_KINDS, "attention"), (RESIDUAL_KINDS, "residual")]
)
def test_every_kind_has_a_sample(registry, part):
    sampled = {getattr(config, part).kind for config in CONFIGS.values()}
    own = {name for name, kind in registry.members().items() if kind.__module__.startswith("sparsezoo_jax")}
    assert sampled == own - {"mixer"}  # which is for images: tests/models/test_encoder.py


@pytest.mark.slow
def test_output(config, output, tokens):
    assert output.logits.shape == (*tokens.shape, config.vocab_size)
    assert output.logits.dtype == jnp.float32
    assert np.isfinite(output.logits).all()
    assert output.stats["ffn_density"].shape == (config.layers,)
    assert output.stats["attended_keys"].shape == (config.layers,)
    # Evaluation logs counts under these names beside the statistics (`Meters.dead`).
    assert not {"dead_neurons", "dead_experts"} & output.stats.keys()


@pytest.mark.slow
def test_scanned_layers_equal_unrolled_ones(config, model, tokens, output):
    unrolled = forward(with_weights_of(dataclasses.replace(config, scan_layers=False), model))(tokens)
    # Compiled differently, so the last bits differ; a layer in the wrong place would differ by its whole output.
    np.testing.assert_allclose(unrolled.logits, output.logits, rtol=1e-5, atol=2e-5)
    for name, value in output.stats.items():
        np.testing.assert_allclose(unrolled.stats[name], value, rtol=1e-5)


@pytest.fixture(scope="module")
def step(model):
    """The call of the model with one set of arrays a layer, over a cache; two lengths of chunks compile once each."""
    single = model.unstacked()
    assert len(single.segments) == model.config.layers
    return forward(single)


CHUNK = 12


@pytest.mark.slow
def test_prefill_and_decode_equal_the_full_forward(model, step, tokens, output):
    cache, start, logits = model.init_cache(2, 32), 0, []
    for length in (CHUNK, *[1] * 6, CHUNK):
        out = step(tokens[:, start : start + length], cache=cache)
        logits.append(out.logits)
        cache, start = out.cache, start + length
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), output.logits, rtol=1e-5, atol=3e-5)


@pytest.mark.slow
def test_padding_in_front_of_a_prompt_does_not_matter(model, step, tokens, output):
    gap = 5
    padded = jnp.pad(tokens[:, : CHUNK - gap], ((0, 0), (gap, 0)))
    real = jnp.broadcast_to(jnp.arange(CHUNK) >= gap, padded.shape).astype(jnp.int32)
    out = step(padded, segment_ids=real, cache=model.init_cache(2, 32))
    np.testing.assert_allclose(out.logits[:, gap:], output.logits[:, : CHUNK - gap], rtol=1e-5, atol=3e-5)
    after = CHUNK - gap
    following = step(tokens[:, after : after + 1], cache=out.cache)
    np.testing.assert_allclose(following.logits, output.logits[:, after : after + 1], atol=3e-5)


@pytest.mark.slow
def test_gradients_reach_every_parameter(config, tokens):
    graphdef, params, rest = nnx.split(build(config), nnx.Param, ...)
    # Factors that start at 0 (a fusion's last one) keep gradients from what they multiply.
    params = jax.tree.map(lambda x: x + 0.01, params)

    def loss(params):
        out = nnx.merge(graphdef, params, rest)(tokens)
        return jnp.mean(jnp.square(jax.nn.log_softmax(out.logits))) + sum(out.losses.values())

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient[...]).all(), path
        assert np.any(gradient[...] != 0), path


@pytest.mark.slow
def test_causality(run, tokens, output):
    changed = run(tokens.at[:, 17].add(1).at[:, 17].set((tokens[:, 17] + 1) % 61))
    np.testing.assert_array_equal(changed.logits[:, :17], output.logits[:, :17])
    assert not np.allclose(changed.logits[:, 17:], output.logits[:, 17:], atol=1e-4)


@pytest.mark.slow
def test_documents_do_not_see_each_other(run, tokens, output):
    # 11 tokens of one document, 14 of another, 5 of padding.
    segment_ids = jnp.array([[1] * 11 + [2] * 14 + [0] * 5] * 2)
    packed = run(tokens, segment_ids=segment_ids)
    alone = run(jnp.pad(tokens[:, 11:25], ((0, 0), (0, 16))), segment_ids=jnp.array([[1] * 14 + [0] * 16] * 2))
    np.testing.assert_allclose(packed.logits[:, :11], output.logits[:, :11], atol=2e-5)
    np.testing.assert_allclose(packed.logits[:, 11:25], alone.logits[:, :14], atol=2e-5)
    other_first = run(tokens.at[:, 3].set((tokens[:, 3] + 1) % 61), segment_ids=segment_ids)
    np.testing.assert_array_equal(other_first.logits[:, 11:25], packed.logits[:, 11:25])
    other_padding = run(tokens.at[:, 25:].set(0), segment_ids=segment_ids)
    np.testing.assert_array_equal(other_padding.logits[:, :25], packed.logits[:, :25])
    for name in packed.stats:
        np.testing.assert_array_equal(other_padding.stats[name], packed.stats[name])


def test_window_of_local_layers(tokens):
    config = dataclasses.replace(CONFIGS["gemma2"], layers=1, layer_pattern=("local",))
    run = forward(build(config))
    before, after = run(tokens), run(tokens.at[:, 10].set((tokens[:, 10] + 1) % 61))
    differs = np.abs(before.logits - after.logits).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(10, 17), "7 keys, the query's own included")


@pytest.mark.slow
def test_bfloat16_stays_close(config, model, tokens, output):
    logits = forward(with_weights_of(dataclasses.replace(config, dtype="bfloat16"), model))(tokens).logits
    assert logits.dtype == jnp.float32
    error = jnp.linalg.norm(logits - output.logits) / jnp.linalg.norm(output.logits)
    # Rounding moves neurons, keys, blocks of the width and steps across their thresholds; each of these widths has few.
    selects = config.ffn.kind in ("spark", "sparsified", "delta") or config.residual.kind == "mohd"
    assert float(error) < (0.3 if selects else 0.1)


def test_positions_restart_with_each_segment():
    ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(positions_within_segments(ids), expected)


def test_layers_group_into_segments():
    layers = [(spec.repeats, len(spec.period)) for spec in CONFIGS["gemma2"].segments()]
    assert layers == [(2, 2), (1, 1)], "five layers of a pattern of two"
    layers = [(spec.repeats, spec.period[0].ffn.activation_sparsity_pattern) for spec in CONFIGS["gemma3n"].segments()]
    assert layers == [(2, (0.9,)), (3, (0.0,))]


def test_activation_sparsity_pattern(tokens):
    density = forward(build(CONFIGS["gemma3n"]))(tokens).stats["ffn_density"]
    np.testing.assert_allclose(density[:2], 0.1, atol=0.03)
    np.testing.assert_array_equal(density[2:], 1.0)


def test_parameters_carry_their_axes(model):
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes = variable.get_metadata()["axes"]
        assert variable.ndim - len(axes) == (1 if "segments" in path else 0), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": GQAConfig(heads=2, kv_heads=1, head_dim=8), "layer_pattern": ("local",)},
            "model.attention.window",
        ),
        ({"layers": 0}, "model.layers=0: must be above 0"),
        ({"ffn": GatedFFNConfig(d_ff=8, activation_sparsity_pattern=(0.5, 0.5))}, "one value for each of the 5 layers"),
    ],
)
def test_impossible_configurations(change, message):
    fields = {**BASE, "attention": GQAConfig(heads=2, kv_heads=1, head_dim=8), "ffn": GatedFFNConfig(d_ff=8), **change}
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GQAConfig(heads=2, kv_heads=1, head_dim=8, qk_norm_over="heads"),
            "model.attention.qk_norm_over=heads: works together with model.attention.qk_norm only",
        ),
        (
            lambda: GQAConfig(heads=2, kv_heads=1, head_dim=8, qk_norm=True, qk_norm_eps=0),
            "model.attention.qk_norm_eps=0.0: must be above 0",
        ),
        (
            lambda: PreNormConfig(input_norm=False),
            "model.residual.input_norm=False: needs model.residual.post_norm=True",
        ),
        (lambda: GQAConfig(heads=6, kv_heads=4, head_dim=8), "model.attention.kv_heads=4: must divide"),
        (lambda: GQAConfig(heads=4, kv_heads=4, head_dim=7), "model.attention.head_dim=7: must be even"),
        (lambda: GatedFFNConfig(d_ff=0), "model.ffn.d_ff=0"),
    ],
)
def test_impossible_layers(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_too_long_a_sequence(model):
    with pytest.raises(ConfigError, match=r"tokens=<49 long>: must be at most model.max_seq_len=48"):
        model(jnp.zeros((1, 49), jnp.int32))


def test_decoder_is_deterministic_in_its_seed():
    a, b, c = (Decoder(CONFIGS["spark"], rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    same = jax.tree.map(lambda x, y: bool((x == y).all()), nnx.state(a, nnx.Param), nnx.state(b, nnx.Param))
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(a.embedding_VD[...], c.embedding_VD[...])


class Seen(nnx.Variable):
    """Keys that queries saw, summed over train steps: no parameter."""


class CountingAttention(GQA):
    """Attention that observes something."""

    def __init__(self, config, ctx, rngs):
        super().__init__(config, ctx, rngs)
        self.seen = Seen(jnp.zeros(()))

    def __call__(self, x_BTD, ctx, cache=None):
        y, aux, cache = super().__call__(x_BTD, ctx, cache)
        return y, aux._replace(observed={"keys": aux.stats["attended_keys"]}), cache

    def after_step(self, observed, key):
        self.seen[...] += observed["keys"]


@pytest.mark.slow
@pytest.mark.parametrize("unstacked", [False, True])
def test_what_attention_observes_reaches_it(monkeypatch, tokens, unstacked):
    monkeypatch.setattr(GQAConfig, "build", lambda self, ctx, rngs: CountingAttention(self, ctx, rngs))
    model = Decoder(CONFIGS["llama"], rngs=nnx.Rngs(0))
    model = model.unstacked() if unstacked else model
    observed = model(tokens).observed
    model.after_step(observed, jax.random.key(0))
    model.after_step(observed, jax.random.key(0))
    seen = [segment.blocks[0].attention.seen[...] for segment in model.segments]
    # Query t of 30 sees t + 1 keys.
    np.testing.assert_allclose(jnp.stack(seen).ravel(), [2 * 15.5] * 2, rtol=1e-6)


def test_a_module_that_observes_must_use_it():
    with pytest.raises(NotImplementedError, match="PlainFFN observes load and defines no after_step"):
        build(CONFIGS["gpt2"]).segments[0].blocks[0].ffn.after_step({"load": jnp.zeros(3)}, jax.random.key(0))
