"""Checkpoints in Hugging Face's layout that were made to harm: one line each, before any work."""

import io
import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsezoo_jax import huggingface
from sparsezoo_jax.errors import StorageError, UserError
from tests.test_convert import CONFIGS, tensors_of, write


def refused(source, tmp_path, message, error=UserError):
    with pytest.raises(error, match=message):
        huggingface.from_hf(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**7}, "n_layer=10000000: must be an integer from 1 to 4096"),
        ({"n_embd": 2**40}, "n_embd=1099511627776: must be an integer from 1 to"),
        ({"layer_norm_epsilon": float("inf")}, "Infinity is no finite number"),
        ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\]: must be one of"),
        ({"n_layer": int("9" * 99)}, "must be an integer from 1 to 4096"),
    ],
)
def test_sizes_in_a_configuration(change, message, tmp_path):
    source = write(tmp_path / "source", {**CONFIGS["gpt2"], **change}, {"x": np.zeros(1, np.float32)})
    refused(source, tmp_path, message)


@pytest.mark.parametrize("types", [["sliding_attention"] * 100_000, [["sliding_attention"]], [{}]])
def test_lists_in_a_configuration(types, tmp_path):
    config = {**CONFIGS["gemma2"], "layer_types": types, "num_hidden_layers": len(types)}
    refused(write(tmp_path / "source", config, {"x": np.zeros(1, np.float32)}), tmp_path, "must list at most 4096")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", " " * (5 << 20)], ids=lambda x: x[:4])
def test_json_of_a_configuration(text, tmp_path):
    source = write(tmp_path / "source", {}, {"x": np.zeros(1, np.float32)})
    (source / "config.json").write_text(text)
    refused(source, tmp_path, r"config\.json: not JSON")


@pytest.mark.slow
def test_too_many_tensors(tmp_path):
    source = write(tmp_path / "source", CONFIGS["gpt2"], {"x": np.zeros(1, np.float32)})
    header = {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(source, tmp_path, "there are 100,001 tensors and more; at most 100,000 are read")
    (source / "model.safetensors").write_bytes((1 << 26).to_bytes(8, "little") + b"{}")
    refused(source, tmp_path, "has a header of 67,108,864 bytes")
    (source / "model.safetensors").unlink()
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"a{i}": f"{i}" for i in range(20_000)}}))
    refused(source, tmp_path, "names 20,000 files; at most 10,000 are read")
    index.write_text(json.dumps({"weight_map": {"a": "x" * 10_000, "b": "../b", "c": "c\0"}}))
    refused(source, tmp_path, "that model.safetensors.index.json names are missing")
    index.write_text(json.dumps({"weight_map": {"a": 3}}))
    refused(source, tmp_path, "damaged", StorageError)


def test_a_link_out_of_a_checkpoint_is_not_copied(tmp_path):
    secret = tmp_path / "id_ed25519"
    secret.write_text("secret")
    source = write(tmp_path / "source", CONFIGS["gpt2"], tensors_of(CONFIGS["gpt2"]))
    (source / "special_tokens_map.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"special_tokens_map\.json: is a link out of its directory"):
        huggingface.from_hf(source, tmp_path / "run")
    assert not (tmp_path / "run" / "special_tokens_map.json").exists()


def archive(files, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def test_archives_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    source = write(tmp_path / "source", CONFIGS["gpt2"], {"x": np.zeros(1, np.float32)})
    (source / "model.safetensors").unlink()
    path = source / "pytorch_model.bin"
    path.write_bytes(archive({"x/data.pkl": b"", "x/data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED))
    refused(source, tmp_path, "x/data.pkl is compressed, which torch never does")
    path.write_bytes(archive({"x/data.pkl": bytes((1 << 25) + 1)}, zipfile.ZIP_STORED))
    refused(source, tmp_path, r"data\.pkl has 33,554,433 bytes")
    torch.save({"x": torch.zeros(1).expand(1 << 30, 4)}, path)
    refused(source, tmp_path, "declares arrays of 17,179,869,184 bytes in files of")
    torch.save({3: torch.zeros(1)}, path)
    refused(source, tmp_path, "names are no text")


def test_names_of_tensors_come_in_one_line(tmp_path, monkeypatch, capsys):
    from sparsezoo_jax import cli, convert

    config = CONFIGS["gpt2"]
    source = write(tmp_path / "source", config, tensors_of(config))
    save_file(
        {**tensors_of(config), "x\nerror: all is well\x1b[2J": np.zeros(1, np.float32)}, source / "model.safetensors"
    )
    monkeypatch.setattr("sys.argv", ["convert", "from-hf", str(source), str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        cli.run(convert.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"unexpected: x\nerror: all is well\x1b[2J")
