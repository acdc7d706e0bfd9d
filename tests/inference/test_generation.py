"""The token loop against the full forward pass, for every kind of model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import NumericsError, UserError
from sparsezoo_jax.inference import Engine, Sampling, generate_tokens, packed, sample
from tests.models.conftest import CONFIGS, build, forward

GREEDY = Sampling(temperature=0)
PROMPT = [5, 17, 3, 3, 44, 17, 3]


@pytest.fixture(scope="module", params=list(CONFIGS))
def engine(request):
    return Engine(build(CONFIGS[request.param]))


def assert_greedy(model, prompts, made):
    """Every token is the likeliest one after those before it, in one pass without a cache."""
    texts = [prompt + row for prompt, row in zip(prompts, made, strict=True)]
    longest = max(map(len, texts))
    padded = jnp.asarray([text + [0] * (longest - len(text)) for text in texts])
    likeliest = np.argmax(forward(model)(padded).logits, axis=-1)
    for prompt, row, said in zip(prompts, made, likeliest, strict=True):
        assert row == said[len(prompt) - 1 : len(prompt) + len(row) - 1].tolist()


def rows(engine, prompts, **kwargs):
    generation = engine.generate(prompts, **kwargs)
    for _ in generation:
        pass
    return generation.rows, generation.stats


@pytest.mark.slow
def test_greedy_rows_equal_the_full_forward(engine):
    """Over windows, padding of shorter prompts, and the boundary of a power of two."""
    prompts = [PROMPT, [9, 2], [1] * 12]
    made, stats = rows(engine, prompts, max_new_tokens=10, sampling=GREEDY)
    assert [len(row) for row in made] == [10, 10, 10]
    assert_greedy(engine.model, prompts, made)
    assert stats.prompt_tokens == 21
    assert stats.steps == 9
    assert stats.decoded == 27
    assert stats.contexts == list(range(13, 22))
    assert stats.decode_rate > 0 < stats.prefill_rate
    density = stats.layer_means()["ffn_density"]
    assert density.shape == (engine.model.config.layers,)
    assert ((density > 0) & (density <= 1)).all()


@pytest.mark.slow
def test_a_prompt_sees_the_slots_of_its_own_tokens_only():
    """Packed, padded to no power of two, in a cache that is longer: the first token and the ones that follow."""
    model = build(CONFIGS["llama"])
    prompts = [[int(token) for token in np.random.default_rng(0).integers(1, 60, 33)], PROMPT]
    made, _ = rows(Engine(packed(model)), prompts, max_new_tokens=6, sampling=GREEDY)
    assert_greedy(model, prompts, made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spark", "blockffn"])
def test_verified_drafts_are_greedy_decoding(kind):
    engine = Engine(build(CONFIGS[kind]))
    made, stats = rows(engine, [PROMPT], max_new_tokens=30, sampling=GREEDY, drafts=4)
    assert made == rows(engine, [PROMPT], max_new_tokens=30, sampling=GREEDY)[0]
    assert stats.drafted > 0
    assert stats.steps == stats.decoded - stats.accepted == 29 - stats.accepted


@pytest.mark.slow
def test_drafts_save_calls_where_the_text_repeats_itself():
    model = build(CONFIGS["llama"])
    # It says the last token again: layers that add nothing, and the embeddings as the output projection.
    for block in model.segments[0].blocks:
        block.attention.projections.o_NHD[...] *= 0
        block.ffn.down_FD[...] *= 0
    model.output_DV[...] = model.embedding_VD[...].T
    made, stats = rows(Engine(model), [[7, 7, 7]], max_new_tokens=21, sampling=GREEDY, drafts=4)
    assert made == [[7] * 21]
    assert (stats.steps, stats.drafted, stats.accepted) == (4, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_stop_tokens_end_a_row(drafts):
    engine = Engine(build(CONFIGS["spark"]))
    whole = rows(engine, [PROMPT], max_new_tokens=12, sampling=GREEDY)[0][0]
    stop = whole[5]
    made = rows(engine, [PROMPT], max_new_tokens=12, sampling=GREEDY, stop=[stop], drafts=drafts)[0][0]
    assert made == whole[: whole.index(stop)]


@pytest.mark.slow
def test_a_row_that_ended_does_not_change_the_others():
    engine = Engine(build(CONFIGS["spark"]))
    prompts = [PROMPT, [9, 2, 9]]
    alone = rows(engine, prompts[1:], max_new_tokens=12, sampling=GREEDY)[0][0]
    first = rows(engine, prompts[:1], max_new_tokens=1, sampling=GREEDY)[0][0]
    if first[0] in alone:
        pytest.skip("the other row would end, too")
    made, _ = rows(engine, prompts, max_new_tokens=12, sampling=GREEDY, stop=first)
    assert made == [[], alone]


@pytest.mark.slow
def test_draws_follow_the_seed_and_the_filters():
    engine = Engine(build(CONFIGS["llama"]))
    kwargs = {"max_new_tokens": 8}
    one, same, other = (rows(engine, [PROMPT], seed=seed, **kwargs)[0] for seed in (1, 1, 2))
    assert one == same != other
    programs = len(engine._programs)
    rows(engine, [PROMPT], sampling=Sampling(temperature=0.5), **kwargs)
    assert len(engine._programs) == programs, "another temperature needs no other program"
    twice = rows(engine, [PROMPT, PROMPT], seed=1, **kwargs)[0]
    assert twice[0] == one[0] != twice[1]
    single = list(generate_tokens(engine.model, PROMPT, seed=1, max_new_tokens=8))
    assert single == one[0]


def test_filters():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 2000)

    def seen(**kwargs):
        sampling, many = Sampling(**kwargs), jnp.repeat(logits, len(keys), axis=0)
        drawn = sample(many, keys, sampling)
        given = sample(many, keys, sampling.form(), jnp.asarray(sampling.numbers()))
        np.testing.assert_array_equal(drawn, given)
        return np.bincount(drawn, minlength=4) / len(keys)

    np.testing.assert_allclose(seen(), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(seen(top_k=2), [5 / 8, 3 / 8, 0, 0], atol=0.04)
    np.testing.assert_allclose(seen(top_p=0.7), [5 / 8, 3 / 8, 0, 0], atol=0.04)
    np.testing.assert_allclose(seen(min_p=0.2), [0.526, 0.316, 0.158, 0], atol=0.04)
    np.testing.assert_allclose(seen(min_p=0.9), [1, 0, 0, 0])
    np.testing.assert_allclose(seen(temperature=0), [1, 0, 0, 0])
    assert seen(temperature=0.5)[0] > 0.65


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": [PROMPT, []]}, "--prompt: is empty"),
        ({"prompts": []}, "--prompt: is empty"),
        ({"max_new_tokens": 42}, "--max-new-tokens=42: 7 prompt tokens and these exceed model.max_seq_len=48"),
        ({"max_new_tokens": 0}, "--max-new-tokens=0: must be above 0"),
        ({"drafts": -1}, "--drafts=-1: must be 0"),
        ({"drafts": 2}, "--drafts=2: needs one prompt and --temperature 0"),
        ({"drafts": 2, "sampling": GREEDY, "prompts": [PROMPT, PROMPT]}, "--drafts=2: needs one prompt"),
    ],
)
def test_errors(kwargs, message):
    engine = Engine(build(CONFIGS["llama"]))
    with pytest.raises(UserError, match=message):
        engine.generate(kwargs.pop("prompts", [PROMPT]), **{"max_new_tokens": 4, **kwargs})


@pytest.mark.slow
def test_everything_fits_up_to_the_last_position():
    engine = Engine(build(CONFIGS["gpt2"]))
    plain = rows(engine, [PROMPT], max_new_tokens=41, sampling=GREEDY)[0]
    assert_greedy(engine.model, [PROMPT], plain)
    assert rows(engine, [PROMPT], max_new_tokens=41, sampling=GREEDY, drafts=9)[0] == plain


@pytest.mark.parametrize("options", [{}, {"sampling": Sampling(temperature=0.8)}, {"drafts": 2}], ids=str)
def test_logits_that_are_not_finite_end_it(options):
    model = build(CONFIGS["gemma2"])
    model.final_norm.scale[...] = jnp.full_like(model.final_norm.scale[...], jnp.nan)
    options = {"sampling": Sampling(temperature=0), **options}
    with pytest.raises(NumericsError, match="logits are not finite"):
        list(Engine(model).generate([[1, 2, 3]], max_new_tokens=4, **options))


def test_tiny_temperatures_are_greedy():
    logits = jnp.asarray([[3e30, 1.0, 2.9e30], [0.0, 5.0, 4.999]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys, Sampling(temperature=1e-12)).tolist() == [0, 1]
