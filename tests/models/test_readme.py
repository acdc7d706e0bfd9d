"""One router for all layers that reads tokens alone: its choice, its layers, its cache, and what accounting says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder, DecoderConfig, activated_parameters, count_parameters, routers
from sparsezoo_jax.models.accounting import abstract_decoder, reads_per_token
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.readme import ReadMEFFNConfig
from tests.models.conftest import CONFIGS, build, forward

CONFIG = CONFIGS["readme"]


def test_the_best_expert_is_taken_whole_and_its_scores_have_a_gradient():
    scores = jax.random.normal(jax.random.key(0), (2, 5, 3))
    g = jax.random.normal(jax.random.key(1), (2, 5, 3))
    routing = routers.top_1(scores)
    best = np.argmax(scores, axis=-1)
    np.testing.assert_array_equal(routing.weights_BTE, np.eye(3)[best])
    np.testing.assert_array_equal(routing.experts_BTK[..., 0], best)
    found = jax.grad(lambda scores: jnp.sum(g * routers.top_1(scores).weights_BTE))(scores)
    q = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    own = np.take_along_axis(np.asarray(g), best[..., None], axis=-1)
    np.testing.assert_allclose(found, own * (np.eye(3)[best] - q), atol=1e-6)


@pytest.fixture(scope="module")
def result(tokens):
    model = build(CONFIG)
    graphdef, state = nnx.split(model)
    # Documents of 11 and 14 tokens, and padding.
    segments = jnp.array([[1] * 11 + [2] * 14 + [0] * 5] * 2)
    call = jax.jit(
        lambda tokens: nnx.merge(graphdef, state)(
            tokens, segment_ids=segments, record=("expert_scores", "sublayer_input", "ffn_output")
        )
    )
    return model, call, call(tokens)


def choices(out):
    return np.argmax(np.stack(out.records["expert_scores"]), axis=-1)


@pytest.mark.slow
def test_all_layers_have_one_choice_that_sees_the_document_before_it(result, tokens):
    _, call, out = result
    layers = choices(out)
    np.testing.assert_array_equal(layers[0], layers[1])
    assert len(np.unique(layers)) == 3
    np.testing.assert_allclose(out.stats["ffn_density"], 20 / 36, rtol=1e-6)
    changed = []
    for shift in range(1, 8):
        other = choices(call(tokens.at[:, 3].set((tokens[:, 3] + shift) % 61)))[0]
        np.testing.assert_array_equal(other[:, :3], layers[0][:, :3])
        np.testing.assert_array_equal(other[:, 11:25], layers[0][:, 11:25])
        changed.append(other[:, 3:11] != layers[0][:, 3:11])
    assert np.any(np.stack(changed)[..., 1:]), "it has a context"


@pytest.mark.slow
def test_a_layer_adds_its_shared_neurons_and_the_experts(result):
    model, _, out = result
    ffn = model.segments[0].blocks[0].ffn
    names = {"gate": ffn.gate_EDW, "up": ffn.up_EDW, "down": ffn.down_EWD}
    experts = {name: np.asarray(x[...], np.float64) for name, x in names.items()}
    names = {"gate": ffn.shared.gate_DF, "up": ffn.shared.up_DF, "down": ffn.shared.down_FD}
    shared = {name: np.asarray(x[...], np.float64) for name, x in names.items()}
    chosen = choices(out)[0]
    for layer in range(2):
        x = np.asarray(out.records["sublayer_input"][layer][1], np.float64)
        y = np.asarray(out.records["ffn_output"][layer])
        for row, t in ((0, 0), (0, 7), (1, 12), (1, 20)):
            total = np.zeros(24)
            for maps, own in ((shared, None), (experts, chosen[row, t])):
                gate, up, down = (
                    maps[n][layer] if own is None else maps[n][layer, own] for n in ("gate", "up", "down")
                )
                h = x[row, t] @ gate
                total += (h / (1 + np.exp(-h)) * (x[row, t] @ up)) @ down
            np.testing.assert_allclose(y[row, t], total, atol=1e-5)


@pytest.mark.slow
def test_drafts_are_taken_back_from_the_routers_cache_too(result, tokens):
    """Tokens beyond a cache's end that was set back don't change the experts of those after it."""
    model, _, _ = result
    single = model.unstacked()
    step, cache = forward(single), single.init_cache(2, 32)
    first = step(tokens[:, :12], cache=cache)
    wrong = step((tokens[:, 12:24] + 1) % 61, cache=first.cache)
    again = step(tokens[:, 12:24], cache=wrong.cache.truncated(jnp.int32(12)))
    np.testing.assert_allclose(again.logits, step(tokens[:, 12:24], cache=first.cache).logits, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["ragged", "loop"])
def test_tokens_are_sorted_once_for_all_layers(optimised, implementation, tokens):
    """The compiled program sorts before the loop over layers, not in it."""
    config = dataclasses.replace(CONFIG, ffn=dataclasses.replace(CONFIG.ffn, implementation=implementation))
    graphdef, state = nnx.split(abstract_decoder(config))
    call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    text = call.lower(state, tokens).compile().as_text()
    loops, entry = text.split("\nENTRY ")
    assert "while(" in entry
    assert " sort(" in entry
    assert " sort(" not in loops


LLAMA2_7B = DecoderConfig(
    vocab_size=32_000,
    d_model=4096,
    layers=32,
    max_seq_len=4096,
    attention=GQAConfig(heads=32, kv_heads=32, head_dim=128),
    ffn=ReadMEFFNConfig(experts=7, expert_width=5504),
    norm=NormConfig(eps=1e-5),
    tie_embeddings=False,
)


def test_size_of_the_published_mixture():
    """Of Llama 2 7B, with half of the neurons in each of 7 experts and none shared: 17 B parameters, of which a token
    needs 4.7 B; the router has 18 M (section 4.1). The paper counts its few shared neurons once.
    """
    counted = count_parameters(LLAMA2_7B)
    router = 32_000 * 512 + 4 * 512**2 + 3 * 512**2 + 7 * 512 + 3 * 512  # with three norms
    assert router == pytest.approx(18e6, rel=0.02)
    attention, expert, tables = 4 * 4096**2, 3 * 4096 * 5504, 2 * 32_000 * 4096
    layers = 32 * (attention + 7 * expert + 2 * 4096)
    assert counted.total == tables + layers + 4096 + router
    assert counted.total == pytest.approx(17e9, rel=0.05)
    assert counted.total - counted.active == 32 * 6 * expert
    assert counted.active == pytest.approx(4.7e9, rel=0.03)
    assert counted.embedding == tables + 32_000 * 512
    needed = activated_parameters(LLAMA2_7B)
    assert needed.layers == 32 * (attention + expert) + router - 32_000 * 512 - 3 * 512
    # Keys and values of the router are read, too.
    assert reads_per_token(LLAMA2_7B, 100).cache == 100 * 2 * (32 * 4096 + 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, r"model.ffn.experts=0: must be above 0"),
        ({"shared_width": -1}, r"model.ffn.shared_width=-1: must be at least 0"),
        ({"router_width": 10}, r"model.ffn.router_width=10: must be a multiple of twice model.ffn.router_heads=2"),
    ],
)
def test_impossible_experts(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG.ffn, **changes)


def test_a_router_of_all_layers_is_one_of_all_layers():
    with pytest.raises(ConfigError, match=r"model.mtp_layers=1: must be 0 with model.ffn.kind=readme"):
        dataclasses.replace(CONFIG, mtp_layers=1)
    dense = GatedFFNConfig(d_ff=8)
    with pytest.raises(ConfigError, match=r"model.first_ffn.kind=readme: takes its experts from the router of all"):
        dataclasses.replace(CONFIG, ffn=dense, first_ffn=CONFIG.ffn, first_layers=1)
    below = dataclasses.replace(CONFIG, first_ffn=dense, first_layers=1)
    assert isinstance(abstract_decoder(below), Decoder)
