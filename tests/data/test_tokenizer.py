import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsezoo_jax.data import (
    DataConfig,
    HFTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    find_tokenizer,
    load_tokenizer,
    open_documents,
    train_bpe,
)
from sparsezoo_jax.errors import DataError, StorageError

any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def sentencepiece_model(byte_fallback):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog " * 4, "peace with all nations"] * 20),
        model_writer=model,
        vocab_size=330 if byte_fallback else 60,
        model_type="bpe",
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def sp_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "any.model"
    path.write_bytes(sentencepiece_model(byte_fallback=True))
    return path


@pytest.fixture(scope="module")
def sp(sp_path):
    return load_tokenizer(sp_path)


def word_level(**tokens):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "peace": 1, "war": 2} | tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class ListDocuments(list):
    fingerprint = "list"


def test_trained_bpe_has_specials_first(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert 259 < tokenizer.vocab_size <= 300


@given(any_text)
def test_bpe_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_specials_in_a_text_are_text(tokenizer):
    ids = tokenizer.encode("a<eos>b<pad>")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([1, *ids, 2, 0]) == "a<eos>b<pad>"


def test_encode_batch_is_encode(tokenizer, sp):
    for t in (tokenizer, sp):
        assert t.encode_batch(["the fox", "", "naïve"]) == [t.encode("the fox"), [], t.encode("naïve")]


def test_training_is_cached_and_deterministic(config, tokenizer, tmp_path):
    documents = open_documents(config, "train")
    assert train_bpe(documents, 300, tmp_path).fingerprint == tokenizer.fingerprint
    (file,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    before = file.stat().st_mtime_ns
    assert train_bpe(documents, 300, tmp_path).fingerprint == tokenizer.fingerprint
    assert file.stat().st_mtime_ns == before
    train_bpe(documents, 280, tmp_path)
    assert len(list(tmp_path.glob("tokenizers/*/tokenizer.json"))) == 2


def test_training_on_nothing(tmp_path):
    from sparsezoo_jax.data import Document

    with pytest.raises(DataError, match="no text to train"):
        train_bpe(ListDocuments([Document("a", "")]), 300, tmp_path)


def test_sentencepiece_round_trip(sp):
    text = "the quick  brown fox, naïve 日本"
    assert isinstance(sp, SentencePieceTokenizer)
    assert sp.decode([sp.bos_id, *sp.encode(text), sp.eos_id, sp.pad_id]) == text
    assert (sp.bos_id, sp.eos_id, sp.pad_id) == (1, 2, 3)


def test_save_and_load_a_run_directory(tokenizer, sp, tmp_path):
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    for name, original in (("hf", tokenizer), ("sp", sp)):
        file = original.save(tmp_path / name)
        for path in (file, tmp_path / name):
            loaded = load_tokenizer(path)
            assert type(loaded) is type(original)
            assert loaded.fingerprint == original.fingerprint
            assert loaded.encode("the fox") == original.encode("the fox")


def test_save_where_nothing_can_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        tokenizer.save(tmp_path / "file" / "run")


def test_truncated_files_are_named(tokenizer, sp, tmp_path):
    for original in (tokenizer, sp):
        file = original.save(tmp_path)
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(DataError, match=f"{file.name}: .*damaged"):
            load_tokenizer(file)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "message"), [("no.json", "can't read"), ("no.bin", "a tokenizer is a")])
def test_missing_or_unknown_file(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


def test_build_tokenizer_loads_the_given_one(sp_path, sp):
    assert build_tokenizer(DataConfig(tokenizer=str(sp_path)), ListDocuments()).fingerprint == sp.fingerprint


def test_special_tokens_come_from_the_config_file(tmp_path):
    plain = HFTokenizer(word_level(**{"</s>": 3, "[END]": 4}))
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (None, 3, 3)
    plain.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[END]"}, "bos_token": None}))
    named = load_tokenizer(tmp_path)
    assert (named.bos_id, named.eos_id) == (None, 4)
    named.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").eos_id == 4
    assert named.fingerprint != plain.fingerprint


def test_prompt_starts_with_bos(tokenizer, sp):
    for t in (tokenizer, sp):
        assert t.encode_prompt("日本 the") == [t.bos_id, *t.encode("日本 the")]


def test_prompt_names_characters_that_are_unknown():
    import sentencepiece
    from tokenizers import Tokenizer, models

    sp = SentencePieceTokenizer(
        sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(byte_fallback=False))
    )
    words = HFTokenizer(word_level(**{"fox": 3}))
    dropping = HFTokenizer(Tokenizer(models.BPE({c: i for i, c in enumerate("fox the")}, [])))
    for tokenizer in (sp, words, dropping):
        tokenizer.encode_prompt("fox")
        with pytest.raises(DataError, match=r"can't represent '日' \(U\+65E5\), '本' \(U\+672C\)$"):
            tokenizer.encode_prompt("fox 日本")


@given(any_text, st.lists(st.integers(0, 299), max_size=30))
def test_stream_decoder_pieces_are_the_text(tokenizer, text, noise):
    for ids in (tokenizer.encode(text), noise):
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.push(i) for i in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_stream_decoder_never_splits_a_character(tokenizer):
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(i) for i in tokenizer.encode("a😀b")]
    assert "".join(pieces) == "a😀b"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "😀" in pieces
    assert decoder.push(tokenizer.encode("😀")[0]) == ""
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.integers(0, 259), max_size=30), any_text)
def test_stream_decoder_of_sentencepiece(sp, noise, text):
    for ids in (sp.encode(text), noise):
        decoder = sp.stream_decoder()
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == sp.decode(ids)


def test_stream_decoder_of_sentencepiece_keeps_spaces(sp):
    decoder = sp.stream_decoder()
    ids = [sp.bos_id, *sp.encode("the lazy dog"), sp.eos_id, *sp.encode("the fox")]
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == sp.decode(ids)
    assert sp.decode(ids).startswith("the lazy dog")


def test_ids_outside_the_vocabulary_are_visible(tokenizer, sp):
    for t in (tokenizer, sp):
        assert t.decode([*t.encode("fox"), t.vocab_size, -1]) == "fox" + 2 * "\N{REPLACEMENT CHARACTER}"
