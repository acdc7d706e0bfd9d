"""The readers, each with its inputs."""

import base64
import bz2
import contextlib
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from hypothesis import strategies as st
from safetensors.numpy import save

from sparsezoo_jax import cli, configs, train
from sparsezoo_jax.autoencoders import load_sae
from sparsezoo_jax.config import read_config, to_json
from sparsezoo_jax.data import DataConfig, open_documents
from sparsezoo_jax.data.chess.pgn import find_games, game_string
from sparsezoo_jax.data.documents import BadDocumentError, Document, Documents, Skipped, read_all
from sparsezoo_jax.data.manifest import FORMAT, MANIFEST_FILE, load_prepared, shard_name
from sparsezoo_jax.data.pipeline import evaluation_batches
from sparsezoo_jax.data.record_file import open_writer
from sparsezoo_jax.data.tfds_source import _check_features
from sparsezoo_jax.data.tokenizer import load_tokenizer
from sparsezoo_jax.evaluation.history import read_history
from sparsezoo_jax.evaluation.meters import Meters
from sparsezoo_jax.evaluation.report import RunFigures, render
from sparsezoo_jax.evaluation.report.figures import _final_figures
from sparsezoo_jax.huggingface.conversion import _shapes, read_object
from sparsezoo_jax.huggingface.layouts import read_model
from sparsezoo_jax.huggingface.saelens import described
from sparsezoo_jax.huggingface.tensors import open_tensors
from sparsezoo_jax.untrusted import printable
from tests.fuzz.inputs import damaged, json_bytes


class Target(NamedTuple):
    """A reader: takes a folder that is empty or holds what earlier inputs left, and an input."""

    inputs: st.SearchStrategy
    read: Callable[[Path, Any], object]
    examples: int
    """Inputs to try in the tests: as many as take a few seconds."""


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# --------------------------------------------------------------------------------------------- Configurations and flags

_CONFIGS = [json.loads(to_json(configs.preset(arch))) for arch in configs.PRESETS]
_FLAGS = [
    *(
        f"--{name}"
        for name in ("arch", "size", "train.steps", "train.groups", "train.objectives", "train.optimizer.kind")
    ),
    *(f"--{name}" for name in ("model.layers", "model.ffn.kind", "model.d-model", "data.dataset", "mesh.fsdp", "x")),
]
_WORDS = [
    *configs.PRESETS,
    "tiny",
    "0",
    "-1",
    "9" * 5000,
    "nan",
    "[{",
    "[" * 9999,
    '[{"pattern": "("}]',
    "muon",
    "\x1b[2J",
    "",
]


def _flags(folder: Path, args: list[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.parse_with_preset(train.Train, args, prog="train", description="").config()
        except SystemExit as error:
            if error.code not in (0, 2):
                raise AssertionError(f"exit status {error.code}") from error


_SAE = [{"source": "x", "step": None, "sae": {"kind": "topk", "features": 8, "k": 2}, "train": {"layer": 1}}]

_SAELENS = [
    {
        **{"architecture": "topk", "d_in": 6, "d_sae": 10, "k": 3, "normalize_activations": "none"},
        "metadata": {"sae_lens_version": "6.1.0", "model_name": "m", "hook_name": "blocks.1.hook_resid_post"},
    },
    {
        **{"d_in": 6, "d_sae": 10, "hook_point": "blocks.1.hook_resid_pre", "activation_fn_str": "topk"},
        **{"activation_fn_kwargs": {"k": 2}, "normalize_activations": True, "sae_lens_version": "3.0.0"},
    },
]

# --------------------------------------------------------------------------------- Checkpoints in Hugging Face's layout

_HF = [
    {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "hidden_act": "silu",
        "attention_bias": True,
    },
    {
        "model_type": "gemma2",
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "query_pre_attn_scalar": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": None,
    },
    {"model_type": "gpt2", "vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32},
    {
        "model_type": "minicpm",
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "attention_type": "mla",
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 6,
        "ffn_type": "block",
        "num_experts": 4,
        "expert_size": 4,
        "norm_after_router": "rms",
        "scale_depth": 1.4,
        "scale_emb": 12,
        "dim_model_base": 8,
    },
]
_TENSORS = save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float16)})
_INDEX = [{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}]


def _hf_config(folder: Path, content: bytes) -> None:
    path = _file(folder, "config.json", content)
    _shapes(read_model(read_object(path), path)[1])


def _tensors(folder: Path) -> None:
    with open_tensors(folder) as files:
        for name in files.shapes:
            files.read(name)


def _safetensors(folder: Path, content: bytes) -> None:
    _file(folder, "model.safetensors", content)
    _tensors(folder)


def _index(folder: Path, content: bytes) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        _file(folder, name, _TENSORS)
    _file(folder, "model.safetensors.index.json", content)
    _tensors(folder)


def _torch_file() -> bytes | None:
    try:
        import torch
    except ImportError:
        return None
    made = io.BytesIO()
    torch.save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}, made)
    return made.getvalue()


def _bin(folder: Path, content: bytes) -> None:
    _file(folder, "pytorch_model.bin", content)
    _tensors(folder)


_TORCH_FILE = _torch_file()

# ----------------------------------------------------------------------------------------------------------- Tokenizers

_TEXT = "The state of the Union, äöü 漢字 <eos>\n"


def _tokenizer_json() -> dict[str, Any]:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocab = {"<eos>": 0, "t": 1, "h": 2, "e": 3, "th": 4, "the": 5, "▁": 6}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")], unk_token="<eos>"))
    made.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.NFC()])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "isolated")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens(["<eos>"])
    return json.loads(made.to_str())


def _sentencepiece() -> bytes:
    import sentencepiece

    made = io.BytesIO()
    texts = iter(["the state of the union is strong and peace will follow"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=made, vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    return made.getvalue()


def _tokenizer(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        if name == "tokenizer_config.json":
            _file(folder, "tokenizer.json", json.dumps(_TOKENIZER).encode())
            _file(folder, name, content)
            tokenizer = load_tokenizer(folder / "tokenizer.json")
        else:
            tokenizer = load_tokenizer(_file(folder, name, content))
        ids = tokenizer.encode(_TEXT)
        tokenizer.decode(ids)
        tokenizer.encode_prompt(_TEXT)

    return read


def _ranks(folder: Path, content: bytes) -> None:
    tokenizer = load_tokenizer(_file(folder, "x.tiktoken", content), "o200k")
    assert tokenizer.decode(tokenizer.encode(_TEXT)) == _TEXT


_TOKENIZER = _tokenizer_json()
_TIKTOKEN = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b"he", b" t", b" the"]
_RANKS = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(_TIKTOKEN))

# -------------------------------------------------------------------------------------------------------------- Corpora

_PGN = (
    b'[Event "x"]\n[FEN "?"]\n\n1. e4 {a} e5 (1... c5 $1) 2. Nf3! ; b\nNc6 1-0\n\n[Event "y"]\n\n1. d4 O-O-O# e8=Q+ *\n'
)
_JSONL = [{"text": "peace and law", "meta": {"a": 1}}]
_ARRAY = [[{"text": "peace", "tags": ["[", "]"]}, {"text": None}], [[], {"text": "a"}, "x"]]
_CSV = b'n,text\r\n1,"peace, ""and""\n law"\r\n2,word\r\n\r\n3\r\n'


def _pgn(folder: Path, content: bytes) -> None:
    for game in find_games((number, 0, line) for number, line in enumerate(content.splitlines(keepends=True))):
        game_string(game.content)


def _documents(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        path = _file(folder, name, content)
        config = DataConfig(dataset=str(path), validation_fraction=0.0, cache_dir=str(folder / "cache"))
        documents = open_documents(config, "train")
        found = list(read_all(documents))
        for number, item in enumerate(found):
            assert _by_index(documents, number) == item
        assert len(documents) == len(found)
        for item in found:
            if isinstance(item, Document):
                item.text.encode()
            else:
                _check_line(item)
        assert len(documents.parts()) == 1

    return read


def _by_index(documents: Documents, number: int) -> Document | Skipped:
    try:
        return documents[number]
    except BadDocumentError as error:
        return error.skipped


def _check_line(item: Skipped) -> None:
    shown = printable(f"{item.where}: {item.detail or item.reason}")
    assert len(shown.splitlines()) == 1
    assert len(item.detail) < 3000


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b" * 100, None]}), made)
    return made.getvalue()


_PACKED = [
    (ending, pack(json.dumps(_JSONL[0]).encode()))
    for ending, pack in (
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
    )
]
_FEATURES = [
    {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {"text": {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text"}}
        },
    }
]


def _features(folder: Path, content: bytes) -> None:
    (folder / "corpus").mkdir(exist_ok=True)
    _file(folder / "corpus", "features.json", content)
    _check_features(DataConfig(tfds_data_dir=str(folder)), "corpus")


# -------------------------------------------------------------------------------------------------- A run and the cache

_ROW = {"step": 1, "loss": 2.5, "ffn_density": [0.1, None], "attended_keys": [3, 4]}
_ROWS = [[_ROW, {**_ROW, "step": 2, "split": "validation"}, {**_ROW, "step": 3, "loss": None}]]
_FINAL = [{"step": 3, "loss": 2.5, "perplexity": 12.0, "bits_per_byte": 1.0}]
_METERS = Meters(tokens=1, batches=1, layers=())


def _metrics(folder: Path, content: bytes) -> None:
    rows = content.removeprefix(b"[").removesuffix(b"]").replace(b"}, {", b"}\n{")
    _file(folder, "metrics.jsonl", rows)
    _report(folder)


def _evaluation(folder: Path, content: bytes) -> None:
    _file(folder, "evaluation.json", content)
    _report(folder)


def _report(folder: Path) -> None:
    run = RunFigures(
        name="run\x1b[2J</script>",
        configuration={},
        parameters=1,
        evaluation=_final_figures(folder / "evaluation.json"),
        history=read_history(folder),
        meters=_METERS,
        costs=[],
    )
    assert "\x1b" not in render([run])


def _manifest_values() -> dict[str, Any]:
    counts = {"num_records": 1, "num_targets": 3, "num_tokens": 4, "num_bytes": 9, "num_documents": 1}
    names = dict.fromkeys(("fingerprint", "documents", "tokenizer", "recipe"), "x")
    shard = {"name": shard_name(0, 1), "records": 1, "bytes": len(_RECORDS), "sha256": "x"}
    sizes = {"seq_len": 3, "vocab_size": 9, "pad_id": 0}
    return {"format": FORMAT, "split": "train", **names, **counts, "skipped": {}, **sizes, "shards": [shard]}


def _records() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / shard_name(0, 1)
        writer = open_writer(path)
        writer.write(np.array([[1, 2, 3, 4], [1, 1, 1, 1]], "<u2").tobytes())
        writer.close()
        return path.read_bytes()


_RECORDS = _records()


def _manifest(folder: Path, content: bytes) -> None:
    _file(folder, shard_name(0, 1), _RECORDS)
    _file(folder, MANIFEST_FILE, content)
    list(evaluation_batches(load_prepared(folder), 2, 1))


TARGETS = {
    "config": Target(json_bytes(_CONFIGS), lambda f, x: read_config(_file(f, "config.json", x)), 400),
    "flags": Target(st.lists(st.sampled_from([*_FLAGS, *_WORDS]) | st.text(max_size=8), max_size=6), _flags, 40),
    "sae": Target(json_bytes(_SAE), lambda f, x: load_sae(_file(f, "sae.json", x).parent), 150),
    "saelens": Target(json_bytes(_SAELENS), lambda f, x: described(_file(f, "cfg.json", x)), 150),
    "hf_config": Target(json_bytes(_HF), _hf_config, 60),
    "safetensors": Target(damaged(_TENSORS, often=0), _safetensors, 300),
    **({"bin": Target(damaged(_TORCH_FILE, often=0), _bin, 300)} if _TORCH_FILE else {}),
    "index": Target(json_bytes(_INDEX), _index, 200),
    "tokenizer": Target(json_bytes([_TOKENIZER]), _tokenizer("tokenizer.json"), 300),
    "tokenizer_config": Target(json_bytes([{"eos_token": "<eos>"}]), _tokenizer("tokenizer_config.json"), 150),
    "sentencepiece": Target(damaged(_sentencepiece(), often=0), _tokenizer("tokenizer.model"), 150),
    "ranks": Target(damaged(_RANKS, often=0), _ranks, 100),
    "pgn": Target(damaged(_PGN, often=0), _pgn, 300),
    "jsonl": Target(json_bytes(_JSONL), _documents("x.jsonl"), 200),
    "json": Target(json_bytes([*_ARRAY, *_JSONL]), _documents("x.json"), 100),
    "csv": Target(damaged(_CSV, often=0), _documents("x.csv"), 100),
    "txt": Target(damaged("\ufeffpeace".encode("utf-16"), often=0), _documents("x.txt"), 60),
    "utf16": Target(damaged(json.dumps(_JSONL[0]).encode("utf-16") * 2, often=0), _documents("x.jsonl"), 60),
    "games": Target(damaged(_PGN, often=0), _documents("x.pgn"), 80),
    **{f"jsonl{end}": Target(damaged(content, often=0), _documents(f"x.jsonl{end}"), 60) for end, content in _PACKED},
    "parquet": Target(damaged(_parquet(), often=0), _documents("x.parquet"), 200),
    "features": Target(json_bytes(_FEATURES), _features, 150),
    "metrics": Target(json_bytes(_ROWS), _metrics, 150),
    "evaluation": Target(json_bytes(_FINAL), _evaluation, 150),
    "manifest": Target(json_bytes([_manifest_values()]), _manifest, 200),
}
