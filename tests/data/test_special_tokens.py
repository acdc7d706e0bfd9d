"""Special tokens from all files that may name them, and texts of tokens in their context."""

import json
import warnings

import pytest

from sparsezoo_jax.data import continuation, load_tokenizer, pieces, stop_ids
from sparsezoo_jax.errors import DataError, SparsezooWarning
from tests.data.test_tokenizer import sentencepiece_model

BOS, EOS = "<|begin|>", "<|end|>"


def byte_level(*special, template=None):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocabulary[token]) for token in special]
        )
    return tokenizer


def saved(folder, tokenizer, **files):
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


NAMES = {"bos_token": BOS, "eos_token": {"content": EOS}}


@pytest.mark.parametrize(
    ("template", "files"),
    [
        (None, {"tokenizer_config": NAMES}),
        (None, {"special_tokens_map": NAMES}),
        (f"{BOS} $A {EOS}", {}),
        (None, {"config": {"bos_token_id": 0, "eos_token_id": 1}}),
        (None, {"config": {"bos_token_id": 0}, "generation_config": {"eos_token_id": [1, 5]}}),
        (f"{BOS} $A", {"special_tokens_map": {"eos_token": EOS}}),
    ],
    ids=["config", "map", "template", "model", "generation", "both"],
)
def test_files_that_name_them(template, files, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsezooWarning)
        tokenizer = load_tokenizer(saved(tmp_path, byte_level(BOS, EOS, template=template), **files))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
        listed = files.get("generation_config", {}).get("eos_token_id", [1])
        assert stop_ids(tmp_path, tokenizer) == tuple(listed)
        # What was found goes along.
        tokenizer.save(tmp_path / "run")
        again = load_tokenizer(tmp_path / "run")
    assert (again.bos_id, again.eos_id, again.fingerprint) == (0, 1, tokenizer.fingerprint)


def test_no_end_of_text(tmp_path):
    saved(tmp_path, byte_level(BOS, EOS, template=f"{BOS} $A"))
    with pytest.warns(SparsezooWarning, match="no end-of-text token is named"):
        tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, None)
    assert stop_ids(tmp_path, tokenizer) == ()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsezooWarning)
        assert load_tokenizer(tmp_path).eos_id is None, "said to be so"


@pytest.mark.parametrize("value", [-1, "1", [1, None], 2**40, True])
def test_damaged_numbers(value, tmp_path):
    saved(tmp_path, byte_level(BOS, EOS), generation_config={"eos_token_id": value})
    with pytest.raises(DataError, match=r"generation_config\.json: damaged: eos_token_id has "):
        load_tokenizer(tmp_path)


def test_special_tokens_in_a_prompt(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, byte_level(BOS, EOS, "<|im|>"), tokenizer_config=NAMES))
    assert tokenizer.encode_prompt("a<|im|>b", special_tokens=True)[2] == 2
    assert tokenizer.encode_prompt(f"{BOS}a", special_tokens=True) == tokenizer.encode_prompt("a"), "one bos is enough"
    assert 2 not in tokenizer.encode_prompt("a<|im|>b"), "plain text unless asked for"
    path = tmp_path / "any.model"
    path.write_bytes(sentencepiece_model(byte_fallback=True))
    pieces_of = load_tokenizer(path)
    assert pieces_of.encode_prompt("peace</s>", special_tokens=True)[-1] == pieces_of.eos_id
    assert pieces_of.eos_id not in pieces_of.encode_prompt("peace</s>")


def test_a_normalizer_may_join_characters(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, byte_level(BOS, EOS), tokenizer_config=NAMES))
    assert tokenizer.encode_prompt("cafe\u0301") == tokenizer.encode_prompt("caf\u00e9")


def test_a_vocabulary_in_two_files(tmp_path):
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", "the", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(DataError, match=r"needs merges\.txt beside it"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the") == [257]
    assert tokenizer.decode(tokenizer.encode("the caf\u00e9 <|endoftext|>")) == "the caf\u00e9 <|endoftext|>"
    assert tokenizer.eos_id == 258
    tokenizer.save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").fingerprint == tokenizer.fingerprint
    (tmp_path / "merges.txt").write_text("t h e\n")
    with pytest.raises(DataError, match="must have two tokens a line"):
        load_tokenizer(tmp_path / "vocab.json")


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_tokens_are_decoded_where_they_stand(byte_fallback, tmp_path):
    path = tmp_path / "any.model"
    path.write_bytes(sentencepiece_model(byte_fallback))
    tokenizer = load_tokenizer(path)
    text = "peace with the quick brown fox" + " caf\u00e9" * byte_fallback
    ids = tokenizer.encode(text)
    prompt = len(tokenizer.encode("peace with"))
    assert tokenizer.decode(ids[:prompt]) + continuation(tokenizer, ids[:prompt], ids[prompt:]) == text
    assert tokenizer.decode(ids[prompt:]) != text.removeprefix("peace with"), "the first space would be lost"
    shown = pieces(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == text
