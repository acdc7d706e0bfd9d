"""What somebody else's files may not do: run programs, name places here, ask for unbounded work, forge lines."""

import contextlib
import dataclasses
import json
import os
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import sparsezoo_jax
from sparsezoo_jax.config import RunConfig, from_json, read_config, stored_config, to_json
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data import Component, DataConfig, open_documents
from sparsezoo_jax.data.chess.pgn import game_string
from sparsezoo_jax.data.tokenizer import load_tokenizer
from sparsezoo_jax.errors import DataError, SparsezooWarning, StorageError, UserError
from sparsezoo_jax.evaluation.history import read_history
from sparsezoo_jax.overrides import local_fields, with_values
from sparsezoo_jax.registry import Registry
from sparsezoo_jax.run_dir import write_config
from sparsezoo_jax.training.checkpoint_format import write_meta
from sparsezoo_jax.training.parameters import read_params, restore_params, save_params
from sparsezoo_jax.untrusted import Local, parse_json, printable, read_json

#: Text fields that name nothing on a machine: keys of tables in this package, of a data set, or of parameters.
NAMES = {
    "arch",
    "size",
    "model.attention.implementation",
    "model.ffn.implementation",
    "model.first_ffn.implementation",
    *(f"model.{layer}.of.implementation" for layer in ("attention", "ffn", "first_ffn")),
    *(f"model.{layer}.sparsity.{of}" for layer in ("attention", "ffn", "first_ffn") for of in ("maps", "weighted")),
    "data.text_field",
    "data.pysource.fingerprint",  # of texts
    "data.train_split",
    "data.validation_split",
    "train.groups.pattern",
    "train.lora.targets",
    "train.lora.whole",
    "train.objectives.loss",
    "train.objectives.statistic",
}
#: Imported only if installed as plugins, or named by the user: see `plugins.load_stored`.
CODE = {"plugins"}


def text_fields(hint, path, marks=(), within=()):
    """Paths, of every member of every union, whose type takes a text or a path, with what the annotation says of it.

    A kind that wraps others may wrap itself; what is `within` itself has no other fields there.
    """
    if dataclasses.is_dataclass(hint):
        if hint in within:
            return
        fields = {field.name for field in dataclasses.fields(hint)}  # without class variables
        for name, inner in typing.get_type_hints(hint, include_extras=True).items():
            if name in fields:
                yield from text_fields(inner, f"{path}.{name}" if path else name, marks, (*within, hint))
    elif typing.get_origin(hint) is typing.Annotated and isinstance(hint.__metadata__[0], Registry):
        for kind in hint.__metadata__[0].members().values():
            yield from text_fields(kind, path, marks, within)
    elif typing.get_origin(hint) is typing.Annotated:
        yield from text_fields(hint.__origin__, path, (*marks, *hint.__metadata__), within)
    elif typing.get_origin(hint) is not typing.Literal:
        for inner in typing.get_args(hint):
            yield from text_fields(inner, path, marks, within)
        if (isinstance(hint, type) and issubclass(hint, str | bytes | Path)) or hint in (typing.Any, object):
            yield path, any(isinstance(mark, Local) for mark in marks)


def test_every_text_field_is_a_name_or_marked_as_local():
    found = set(text_fields(RunConfig, ""))
    assert {path for path, local in found if not local} == NAMES | CODE
    # Values are cleared in objects; of lists of them, the whole list.
    local = {"data.mixture" if path.startswith("data.mixture.") else path for path, local in found if local}
    assert {"data.dataset", "data.cache_dir", "data.tfds_data_dir", "data.chess.stockfish", "train.init_from"} < local
    places = local - {"data.mixture", "data.dataset", "data.validation_dataset"}
    values = dict.fromkeys(sorted(places), "x")
    values |= {"data.pysource.packages": ("x",), "data.pysource.validation": ("y",)}
    config = with_values(preset("spark"), {"data.dataset": None, **values})
    assert local_fields(config).keys() == places
    one = with_values(config, {"data.dataset": "x", "data.validation_dataset": "x"})
    several = with_values(config, {"data.mixture": (Component(dataset="x", weight=1.0),)})
    assert local_fields(one).keys() | local_fields(several).keys() == local


PLACES = {
    "data.dataset": "/home/mallory/*.txt",
    "data.validation_dataset": "c4/en",
    "data.tokenizer": "/home/mallory",
    "data.cache_dir": "/home/mallory/cache",
    "data.tfds_data_dir": "/home/mallory/tfds",
    "data.chess.stockfish": "/home/mallory/evil",
    "train.init_from": "/home/mallory/run",
    "train.init_step": 3,
}


def test_places_in_the_configuration_of_somebody_else(tmp_path, monkeypatch):
    config = with_values(preset("spark"), PLACES)
    write_config(tmp_path / "run", config)
    path = tmp_path / "run" / "config.json"
    assert read_config(path) == config  # this user gave them, on this machine
    path.write_text(path.read_text() + "\n")
    with pytest.warns(SparsezooWarning, match="ignored, for it was not written by you.*stockfish=/home/mallory/evil"):
        foreign = read_config(path)
    assert local_fields(foreign) == {"data.tokenizer": str(tmp_path / "run")}
    assert with_values(foreign, PLACES) == config
    assert stored_config(path) == config
    with pytest.raises(UserError, match=r"data\.dataset=None: must be named"):
        open_documents(foreign.data, "train")


def test_what_is_harmless_is_taken(tmp_path, recwarn):
    path = tmp_path / "config.json"
    path.write_text(to_json(preset("spark")))
    assert read_config(path) == preset("spark")
    assert not recwarn.list


@pytest.mark.parametrize("split", ["/etc", "../../private"])
def test_splits_stay_within_the_corpus(split):
    with pytest.raises(UserError, match=r"data\.validation_split=.*: must name a split, or a directory within"):
        DataConfig(validation_split=split)


def test_features_of_a_data_set_import_no_module(tmp_path, monkeypatch):
    folder = tmp_path / "tfds" / "evil_corpus" / "1.0.0"
    folder.mkdir(parents=True)
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    (folder / "features.json").write_text(json.dumps({"pythonClassName": "payload.Text", "text": {}}))
    info = {"name": "evil_corpus", "version": "1.0.0", "splits": [], "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    config = DataConfig(dataset="evil_corpus", tfds_data_dir=str(tmp_path / "tfds"))
    with pytest.raises(DataError, match=r"names payload\.Text, which is no feature of TFDS"):
        open_documents(config, "train")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="code from elsewhere, which is not run"):
        open_documents(DataConfig(dataset="kaggle:evil"), "train")


HOSTILE = {
    "deep": ("[" * 100_000, "more than 64 objects and lists"),
    "deep objects": ('{"a":' * 100_000, "more than 64 objects and lists"),
    "digits": ("9" * 5000, "an integer of more than 100 digits"),
    "long": (" " * (5 << 20), "longer than 4,194,304 bytes"),
    "no text": (b"\xff\xfe", "can't decode"),
    "infinity": ('{"a": 1e999}', "1e999 is no finite number"),
    "open string": ('"' + '\\"[' * 1_000_000, "Unterminated|longer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_json_within_bounds(name, tmp_path):
    text, message = HOSTILE[name]
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_json(path, finite=True)
    with pytest.raises(UserError, match="not a configuration"):
        from_json(path.read_bytes())


def test_json_in_strings_is_no_structure():
    assert parse_json(json.dumps(["[" * 1000, '\\"[' * 1000])) == ["[" * 1000, '\\"[' * 1000]
    assert parse_json("[" * 64 + "]" * 64) is not None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 2_000_000_000, "model.layers=2000000000: must be at most"),
        ("layers", 1_000_000, "model.layers=1000000: must be at most 4096"),
        ("vocab_size", 2**40, "model.vocab_size=1099511627776: must be at most"),
        ("ffn.d_ff", 10**30, "d_ff"),
        ("logit_divisor", float("nan"), "NaN is no finite number"),
    ],
)
def test_sizes_in_a_configuration(field, value, message):
    values = json.loads(to_json(preset("dense")))
    *parents, name = field.split(".")
    holder = values["model"]
    for parent in parents:
        holder = holder[parent]
    holder[name] = value
    with pytest.raises(UserError, match=message):
        from_json(json.dumps(values))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is no regular file"):
        read_config(tmp_path / "config.json")
    with pytest.raises(StorageError, match="is no regular file"):
        read_history(tmp_path)


def test_arrays_without_bytes_do_not_fill_the_memory(tmp_path):
    save_params(tmp_path, {"x": np.zeros((4, 4), np.float32)})
    (meta,) = tmp_path.glob("0/meta/metadata")
    for name in ("x", "y"):  # one that is there, with another shape, and one that is not
        values = json.loads(meta.read_text())
        values["arrays"][f"model/params/{name}"] = [[1 << 20, 1 << 20], "float32", 0]
        values.pop("checksum")
        meta.write_text(json.dumps(write_meta(values)))
        with pytest.raises(StorageError, match=r"declares arrays of .* bytes in files of"):
            restore_params(tmp_path)
    with pytest.raises(StorageError, match="declares arrays of"):
        next(read_params(tmp_path))


def growing(factor, rules):
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    made.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Replace("a", "a" * factor)] * rules)
    return made


def test_a_tokenizer_whose_rules_multiply(tmp_path):
    growing(10, 9).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="its rules may make 1000000000 characters of one; at most 4096"):
        load_tokenizer(tmp_path)
    growing(2, 3).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a") == [0] * 8


def test_numbers_of_tokens(tmp_path):
    write_config(tmp_path, preset("dense"))
    text = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 4321}, [])).to_str()
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.vocab_size=4096: must be at least the tokenizer's 4322"):
        sparsezoo_jax.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace("4321", "2147483648"))
    with pytest.raises(DataError, match="numbers its tokens up to 2147483648; at most 16777216 tokens are read"):
        load_tokenizer(tmp_path)


def test_panics_and_faults_of_a_tokenizer(tmp_path):
    values = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [], unk_token="<unk>")).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"the tokenizer fails: .*unk"):
        load_tokenizer(tmp_path).encode("b")
    values["model"] |= {"continuing_subword_prefix": "long" * 9, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer, or damaged: .*range"):  # the library panics
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["1e4", "1." + " 1" * 200_000, "{" * 200_000, "1. e4 " * 200_000, "(" * 200_000, "({" * 200_000, "({}" * 200_000],
    ids=lambda x: x[:6],
)
def test_one_long_game_takes_no_quadratic_time(text):
    started = time.process_time()
    with contextlib.suppress(DataError):
        game_string(text.encode())
    assert time.process_time() - started < 10  # two seconds here; minutes when each move copied the rest of the game


def test_printable():
    assert printable("ä 漢 👍 e\u0301 क्‍ष") == "ä 漢 👍 e\u0301 क्‍ष"
    assert printable("a\nerror: b\x1b[31m\r\x9b\u202e\u2028\ud800") == r"a\nerror: b\x1b[31m\r\x9b\u202e\u2028\ud800"
    assert printable("a\tb\n\x07", keep="\t\n") == "a\tb\n\\x07"
    assert printable("x" * 5000) == "x" * 4000 + "..."
