import subprocess
import sys

import pytest

from sparsezoo_jax.data import DataConfig, cache_directory
from sparsezoo_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("seq_len", 0),
        ("bpe_vocab_size", 258),
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("prefetch", -1),
        ("workers", -1),
        ("dataset", " "),
        ("tokenizer", ""),
        ("cache_dir", ""),
    ],
)
def test_a_bad_value_names_its_field(field, value):
    with pytest.raises(ConfigError, match=f"data.{field}"):
        DataConfig(**{field: value})


def test_cache_directory_prefers_the_field_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEZOO_CACHE", str(tmp_path))
    assert cache_directory(DataConfig()) == tmp_path
    assert cache_directory(DataConfig(cache_dir=str(tmp_path / "other"))) == tmp_path / "other"
    monkeypatch.delenv("SPARSEZOO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory(DataConfig()) == tmp_path / ".cache" / "sparsezoo_jax"


def heavy_modules_after(statement):
    heavy = {"jax", "grain", "tensorflow_datasets", "pyarrow", "pandas", "tokenizers", "sentencepiece", "rich"}
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_room_imports_nothing_heavy():
    # The package above may import more; this is about what `data` adds to it.
    assert heavy_modules_after("import sparsezoo_jax.data") == heavy_modules_after("import sparsezoo_jax")
