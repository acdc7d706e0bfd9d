"""Rank files of tiktoken. The numbers of tokens were made by tiktoken 0.14 of the same ranks and patterns."""

import base64
import json

import pytest

from sparsezoo_jax import huggingface
from sparsezoo_jax.data import DataConfig, build_tokenizer, find_tokenizer, load_tokenizer
from sparsezoo_jax.data.tiktoken_files import FAMILIES
from sparsezoo_jax.errors import DataError, UserError
from tests.test_convert import CONFIGS, call, tensors_of, write

WORDS = [
    *("th", "the", "he", " t", " the", "in", "ing", "an", "and", "  ", "   ", "aa", "aaa", "aaaa", "\n\n", " \n"),
    *(" \n ", "12", "123", "23", "'s", "'re", "é", "日", "/\n", "xyzw"),
]
TOKENS = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
TEXT = "The thing and 12345aaaaa's THE're HellO/\n\n  é日 xyzw \n "
START = [84, 258, 32, 256, 262, 32, 264, 32]
MIDDLE = [52, 53, 267, 268, 276, 32, 84, 72, 69]
HELLO = [32, 72, 101, 108, 108, 79, 47, 270, 32, 32, 278, 230, 151, 165, 32, 120, 121, 122, 119]
NUMBERS = {
    "cl100k": [*START, 274, *MIDDLE, 277, *HELLO, 272],
    "o200k": [*START, 274, *MIDDLE, 39, 114, 101, *HELLO, 271, 32],
    "llama3": [*START, 274, *MIDDLE, 277, *HELLO, 271, 32],
    "qwen2": [*START, 49, 50, 51, *MIDDLE, 277, *HELLO, 271, 32],
}
N = len(TOKENS)


def ranks_file(path, tokens=TOKENS, ranks=None):
    ranks = range(len(tokens)) if ranks is None else ranks
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in zip(tokens, ranks, strict=True)]
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_tiktoken(family, tmp_path):
    tokenizer = load_tokenizer(ranks_file(tmp_path / "a.tiktoken"), family)
    assert tokenizer.encode(TEXT) == NUMBERS[family]
    assert tokenizer.decode(NUMBERS[family]) == TEXT
    special = dict(FAMILIES[family].special)
    end = "<|end_of_text|>" if family == "llama3" else "<|endoftext|>"
    assert tokenizer.eos_id == N + special[end]
    assert tokenizer.bos_id == (N if family == "llama3" else None)
    assert tokenizer.vocab_size == N + max(special.values()) + 1
    prompt = tokenizer.encode_prompt(f"the{end}", special_tokens=True)
    assert prompt[-2:] == [TOKENS.index(b"the"), tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode(end), "in a document it is text"
    # What a run keeps is the same tokenizer.
    tokenizer.save(tmp_path / "run")
    assert find_tokenizer(tmp_path / "run").fingerprint == tokenizer.fingerprint


def test_known_files_are_told_by_their_ranks(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen2", FAMILIES["qwen2"]._replace(ranks=N))
    # Llama 3's file is called as Llama 2's SentencePiece model is.
    ranks_file(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).encode(TEXT) == NUMBERS["qwen2"]
    # An end of line as other systems write it, and none at the end.
    content = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "any.tiktoken").write_bytes(content.replace(b"\n", b"\r\n").rstrip())
    assert load_tokenizer(tmp_path / "any.tiktoken").encode(TEXT) == NUMBERS["qwen2"]


def test_unknown_family_is_chosen(tmp_path):
    path = ranks_file(tmp_path / "a.tiktoken")
    with pytest.raises(DataError, match=rf"has {N} ranks.*tokenizer-family.*: cl100k, llama3, o200k, qwen2$"):
        load_tokenizer(path)
    config = DataConfig(tokenizer=str(tmp_path), tokenizer_family="o200k")
    assert build_tokenizer(config, []).encode(TEXT) == NUMBERS["o200k"]
    with pytest.raises(UserError, match=r"data\.tokenizer_family.*llama3.*is for a rank file"):
        build_tokenizer(DataConfig(tokenizer_family="llama3"), [])
    load_tokenizer(path, "qwen2").save(tmp_path)
    with pytest.raises(DataError, match="knows its own rules"):
        load_tokenizer(tmp_path, "qwen2")


def test_special_tokens_beside_the_file(tmp_path):
    path = ranks_file(tmp_path / "tokenizer.model")
    listed = {str(N + 2): {"content": "<end>", "special": True}, str(N): {"content": "<word>", "special": False}}
    values = {"added_tokens_decoder": listed, "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(path, "llama3")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, N + 2, N + 3)
    assert tokenizer.decode([N, N + 1, N + 2]) == "<word>"


def test_words_are_no_special_tokens(tmp_path):
    """As in the vocabularies of text from the web."""
    tokens = [*TOKENS, b"<s", b"<s>", b"</", b"</s", b"</s>"]
    tokenizer = load_tokenizer(ranks_file(tmp_path / "a.tiktoken", tokens), "cl100k")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, len(tokens) + 1)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"5": {"content": "<a>"}}, rf"'<a>' has number 5; must be from {N}"),
        ({str(N + 2**20): {"content": "<a>"}}, "must be from"),
        ({str(N): {"content": ""}}, "has no name"),
        ({str(N): {"content": "<a>"}, str(N + 1): {"content": "<a>"}}, "has two numbers"),
        ({str(N): {"content": "th"}}, "has two numbers, or those of another token"),
        ({"x": {"content": "<a>"}}, "damaged"),
        ([1], "damaged"),
    ],
)
def test_damaged_special_tokens(listed, message, tmp_path):
    path = ranks_file(tmp_path / "a.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(path, "llama3")
    assert "\n" not in str(caught.value)


def changed(change):
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(TOKENS)]
    change(lines)
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no token for the byte 0x00"),
        (changed(lambda lines: lines.pop()) + b"\n!", "line 282 is no token in base64"),
        (changed(lambda lines: lines.append(b"YQ==")), "line 283 is no token"),
        (changed(lambda lines: lines.append(b"YQ= 282")), "line 283 is no token"),
        (changed(lambda lines: lines.append(b"YWI= -1")), "line 283 is no token"),
        (changed(lambda lines: lines.append(b"YWI= 283")), "numbers from 0 to 282, each once"),
        (changed(lambda lines: lines.append(b"YWI= 281")), "numbers from 0 to 282, each once"),
        (changed(lambda lines: lines.append(b"YQ== 282")), "has the token of rank 97 again"),
        (changed(lambda lines: lines.append(base64.b64encode(b"a" * 1025) + b" 282")), "more than 1024 bytes"),
        (changed(lambda lines: lines.__setitem__(0, b"YWI= 0")), "no token for the byte 0x00"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path / "a.tiktoken", "llama3")
    assert "\n" not in str(caught.value)


def test_bounds(tmp_path, monkeypatch):
    path = ranks_file(tmp_path / "a.tiktoken")
    for name, bound, message in (("MAX_RANKS_BYTES", 100, "longer than 100"), ("MAX_MERGES", 20, "more than 20 ways")):
        with monkeypatch.context() as patch:
            patch.setattr(f"sparsezoo_jax.data.tiktoken_files.{name}", bound)
            with pytest.raises(DataError, match=message):
                load_tokenizer(path, "llama3")
    ranks_file(tmp_path / "b.tiktoken")
    with pytest.raises(DataError, match=r"holds a\.tiktoken, b\.tiktoken; name one"):
        find_tokenizer(tmp_path)


def test_checkpoint_with_ranks_only(tmp_path, monkeypatch, capsys):
    config = {**CONFIGS["llama"], "vocab_size": N + 256}
    source = write(tmp_path / "source", config, tensors_of(config))
    ranks_file(source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "Own", "chat_template": "{{ bos_token }}"}')
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [N + 1, N + 9]}))
    code = call(["from-hf", str(source), str(tmp_path / "run")], monkeypatch)
    assert code == 2
    assert "--tokenizer-family" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    huggingface.from_hf(source, tmp_path / "run", tokenizer_family="llama3")
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert kept == {*files, "config.json", "checkpoints"}
    assert find_tokenizer(tmp_path / "run").encode(TEXT) == NUMBERS["llama3"]
    # And transformers gets a tokenizer that needs no code of its authors.
    huggingface.to_hf(tmp_path / "run", tmp_path / "there")
    stored = json.loads((tmp_path / "there" / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert stored["bos_token"] == "<|begin_of_text|>"
