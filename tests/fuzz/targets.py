"""The readers, each with its inputs."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from sparsezoo_jax import cli, configs, train
from sparsezoo_jax.autoencoders import load_sae
from sparsezoo_jax.config import read_config, to_json
from sparsezoo_jax.data import DataConfig, open_documents
from sparsezoo_jax.data.chess.pgn import find_games, game_string
from sparsezoo_jax.data.pipeline import evaluation_batches
from sparsezoo_jax.data.preparation import META_FILE, RECORDS_FILE, load_prepared
from sparsezoo_jax.data.record_file import open_writer
from sparsezoo_jax.data.tfds_source import _check_features
from sparsezoo_jax.data.tokenizer import load_tokenizer
from sparsezoo_jax.evaluation.history import read_history
from sparsezoo_jax.evaluation.meters import Meters
from sparsezoo_jax.evaluation.report import RunFigures, render
from sparsezoo_jax.evaluation.report.figures import _final_figures
from sparsezoo_jax.huggingface.conversion import _read_json, _shapes
from sparsezoo_jax.huggingface.layouts import read_model
from sparsezoo_jax.huggingface.tensors import open_tensors
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
    _shapes(read_model(_read_json(path), path)[1])


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


_TOKENIZER = _tokenizer_json()

# -------------------------------------------------------------------------------------------------------------- Corpora

_PGN = (
    b'[Event "x"]\n[FEN "?"]\n\n1. e4 {a} e5 (1... c5 $1) 2. Nf3! ; b\nNc6 1-0\n\n[Event "y"]\n\n1. d4 O-O-O# e8=Q+ *\n'
)
_JSONL = [{"text": "peace and law", "meta": {"a": 1}}]


def _pgn(folder: Path, content: bytes) -> None:
    for game in find_games((number, 0, line) for number, line in enumerate(content.splitlines(keepends=True))):
        game_string(game.content)


def _documents(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        path = _file(folder, name, content)
        documents = open_documents(DataConfig(dataset=str(path), validation_fraction=0.0), "train")
        for i in range(len(documents)):
            documents[i].text.encode()

    return read


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b" * 100, None]}), made)
    return made.getvalue()


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
    counts = {"num_records": 1, "num_targets": 3, "num_bytes": 9, "num_documents": 1}
    return {"fingerprint": "x", **counts, "seq_len": 3, "vocab_size": 9, "pad_id": 0, "file_bytes": len(_RECORDS)}


def _records() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RECORDS_FILE
        writer = open_writer(path)
        writer.write(np.array([[1, 2, 3, 4], [1, 1, 1, 1]], "<u2").tobytes())
        writer.close()
        return path.read_bytes()


_RECORDS = _records()


def _manifest(folder: Path, content: bytes) -> None:
    _file(folder, RECORDS_FILE, _RECORDS)
    _file(folder, META_FILE, content)
    list(evaluation_batches(load_prepared(folder), 2, 1))


TARGETS = {
    "config": Target(json_bytes(_CONFIGS), lambda f, x: read_config(_file(f, "config.json", x)), 400),
    "flags": Target(st.lists(st.sampled_from([*_FLAGS, *_WORDS]) | st.text(max_size=8), max_size=6), _flags, 40),
    "sae": Target(json_bytes(_SAE), lambda f, x: load_sae(_file(f, "sae.json", x).parent), 150),
    "hf_config": Target(json_bytes(_HF), _hf_config, 60),
    "safetensors": Target(damaged(_TENSORS, often=0), _safetensors, 300),
    "index": Target(json_bytes(_INDEX), _index, 200),
    "tokenizer": Target(json_bytes([_TOKENIZER]), _tokenizer("tokenizer.json"), 300),
    "tokenizer_config": Target(json_bytes([{"eos_token": "<eos>"}]), _tokenizer("tokenizer_config.json"), 150),
    "sentencepiece": Target(damaged(_sentencepiece(), often=0), _tokenizer("tokenizer.model"), 150),
    "pgn": Target(damaged(_PGN, often=0), _pgn, 300),
    "jsonl": Target(json_bytes(_JSONL), _documents("x.jsonl"), 200),
    "parquet": Target(damaged(_parquet(), often=0), _documents("x.parquet"), 200),
    "features": Target(json_bytes(_FEATURES), _features, 150),
    "metrics": Target(json_bytes(_ROWS), _metrics, 150),
    "evaluation": Target(json_bytes(_FINAL), _evaluation, 150),
    "manifest": Target(json_bytes([_manifest_values()]), _manifest, 200),
}
