"""Likelihoods and answers, as lm-evaluation-harness asks for them, without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import run_dir
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.harness.scorer import Answer, Scorer, batches, cut, rolling_windows
from sparsezoo_jax.inference import Sampling
from sparsezoo_jax.text_model import TextModel

PAIRS = [
    ("the state of", " union is strong"),
    ("the", " law"),
    ("peace will follow the state of the union where the law is", " strong and peace will follow"),
    ("", "the state"),
    ("the state of ", "union"),
]


@pytest.fixture(scope="module")
def text_model(text_run):
    model, config, tokenizer = run_dir.load(text_run)
    return TextModel(text_run, model, config, tokenizer)


@pytest.fixture(scope="module")
def scorer(text_model):
    return Scorer(text_model, batch_size=4)


@pytest.fixture(scope="module")
def alone(text_model):
    """Log-probability and greediness of one pair of ids, without batches: what is right of it changes nothing."""
    graphdef, state = text_model.engine.graphdef, text_model.engine.state
    logits = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits[0])

    def found(context, continuation):
        ids = (context + continuation)[:-1]
        log_p = jax.nn.log_softmax(logits(state, jnp.asarray([ids + [0] * (64 - len(ids))])), axis=-1)
        log_p = np.asarray(log_p, np.float64)[len(context) - 1 : len(ids)]
        chosen = log_p[np.arange(len(continuation)), continuation]
        return chosen.sum(), bool((log_p.argmax(-1) == continuation).all())

    return found


def test_likelihoods_are_those_of_each_pair_alone(alone, scorer):
    found = scorer.loglikelihood(PAIRS)
    for pair, one in zip(PAIRS, found, strict=True):
        expected, greedy = alone(*scorer.encode_pair(*pair))
        assert one.log_probability == pytest.approx(expected, rel=1e-5, abs=1e-4), pair
        assert one.is_greedy == greedy


def test_what_is_likeliest_is_greedy(text_model, scorer):
    context = "the state of"
    model, tokenizer = text_model.engine.model, text_model.tokenizer
    likeliest = int(model(jnp.asarray([scorer.encode(context)])).logits[0, -1].argmax())
    pair = (scorer.encode(context), [likeliest])
    (one,) = scorer._likelihoods([pair])
    assert one.is_greedy
    (other,) = scorer._likelihoods([(pair[0], [(likeliest + 1) % tokenizer.vocab_size])])
    assert not other.is_greedy
    assert other.log_probability < one.log_probability


def test_pairs_are_split_where_the_text_of_both_is(scorer):
    encode, tokenizer = scorer.encode, scorer.model.tokenizer
    context, continuation = scorer.encode_pair("the state of ", "union")
    assert context == encode("the state of")
    assert context + continuation == encode("the state of union")
    assert scorer.encode_pair("", "law") == ([tokenizer.bos_id], tokenizer.encode("law"))
    bare = Scorer(scorer.model, add_bos=False)
    assert bare.encode_pair("  ", "law") == ([tokenizer.bos_id], tokenizer.encode("  law"))


def test_long_contexts_lose_their_beginning(text_model, alone):
    scorer = Scorer(text_model, batch_size=2, max_length=8)
    context, continuation = scorer.encode("peace will follow where the law is strong and the state of"), [5, 6, 7]
    (one,) = scorer._likelihoods([(context, continuation)])
    expected, greedy = alone(context[-6:], continuation)
    assert one.log_probability == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert one.is_greedy == greedy
    with pytest.raises(UserError, match="a continuation of 9 tokens is longer than the model sees, 8"):
        scorer._likelihoods([(context, [5] * 9)])
    assert scorer._likelihoods([(context, [])]) == [(0.0, True)]


def test_windows_predict_every_token_once_from_all_that_fits():
    ids = list(range(100, 110))
    assert list(rolling_windows(ids, 1, 4)) == [
        ([1], [100, 101, 102, 103]),
        ([103], [104, 105, 106, 107]),
        ([105, 106, 107], [108, 109]),
    ]
    assert list(rolling_windows(ids, 1, 10)) == [([1], ids)]
    assert list(rolling_windows(ids, 1, 9))[1] == (ids[:9], ids[9:])
    assert list(rolling_windows([], 1, 4)) == []


def test_rolling_sums_windows(text_model, alone):
    scorer = Scorer(text_model, batch_size=2, max_length=8)
    texts = ["the state of the union is strong and peace will follow where the law is", "law", ""]
    found = scorer.loglikelihood_rolling(texts)
    for text, one in zip(texts, found, strict=True):
        windows = rolling_windows(text_model.tokenizer.encode(text), scorer.prefix, 8)
        assert one == pytest.approx(sum(alone(*window)[0] for window in windows), abs=1e-3)


def test_batches_have_the_longest_first():
    lengths = [3, 9, 5, 9, 1]
    assert list(batches(range(5), lengths.__getitem__, 2)) == [[1, 3], [2, 0], [4]]
    assert list(batches([4, 0], lengths.__getitem__, 2)) == [[0, 4]]


def test_answers_are_cut_and_those_of_each_prompt_alone(text_model, scorer):
    prompts = ["the state of", "peace will follow where the law is strong", "law", "union", "the"]
    settings = {"max_gen_toks": 8, "until": []}
    whole = scorer.generate_until([(prompt, settings) for prompt in prompts])
    for prompt, text in list(zip(prompts, whole, strict=True))[:2]:
        generation = text_model.generate([scorer.encode(prompt)], max_new_tokens=8, sampling=Sampling(0.0))
        assert text == text_model.texts(generation)[0]
    stop = whole[1][3:5]
    mixed = scorer.generate_until([(prompts[0], settings), (prompts[1], {"max_gen_toks": 8, "until": [stop, "\0"]})])
    assert mixed == [whole[0], whole[1][: whole[1].find(stop)]]


def test_an_answer_leaves_room_for_the_end_of_its_prompt(text_model, scorer):
    long = "peace will follow where the law is strong and the state of the union is strong and " * 3
    ids = scorer.encode(long)
    assert len(ids) > 64
    (text,) = scorer.generate_until([(long, {"max_gen_toks": 8})])
    generation = text_model.generate([ids[-56:]], max_new_tokens=8, sampling=Sampling(0.0))
    assert text == text_model.texts(generation)[0]


def test_settings(scorer):
    assert scorer.answer({}) == Answer(32, Sampling(0.0), ())
    assert scorer.answer({"temperature": 0.5, "max_new_tokens": 4}) == Answer(4, Sampling(0.5), ())
    assert scorer.answer({"temperature": 0.5, "do_sample": False}).sampling == Sampling(0.0)
    found = scorer.answer({"do_sample": True, "top_p": 0.9, "until": "\n"})
    assert (found.sampling, found.until) == (Sampling(1.0, top_p=0.9), ("\n",))
    with pytest.raises(ConfigError, match="num_beams=4: no such setting"):
        scorer.answer({"num_beams": 4})
    with pytest.raises(ConfigError, match="max_gen_toks=64: must be above 0 and leave room for a prompt in 64"):
        scorer.answer({"max_gen_toks": 64})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be above 0"),
        ({"max_length": 65}, "max_length=65: must be from 2 to the model's 64"),
    ],
)
def test_impossible_options(text_model, options, message):
    with pytest.raises(ConfigError, match=message):
        Scorer(text_model, **options)


def test_the_first_stop_in_the_text_counts():
    assert cut("one two three", ["three", "two", ""]) == "one "
    assert cut("one", ["two"]) == "one"
