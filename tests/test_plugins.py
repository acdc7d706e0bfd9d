"""A kind from outside the package, from training to packed decoding; and what may be imported for a run."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from pydantic.dataclasses import dataclass

import sparsezoo_jax
from sparsezoo_jax import data, plugins, train
from sparsezoo_jax.config import from_json, restorable, to_json
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import STRICT, ConfigError, DataError, UserError
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.registry import Kind, Registry
from tests.test_docs import values_of

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "arch": "topk_relu2",
    "model.vocab-size": 320,
    "model.d-model": 32,
    "model.layers": 2,
    "model.max-seq-len": 64,
    "model.attention.heads": 2,
    "model.attention.kv-heads": 1,
    "model.attention.head-dim": 16,
    "model.attention.window": 16,
    "model.ffn.d-ff": 64,
    "model.ffn.top-k": 6,
    "data.bpe-vocab-size": 320,
    "data.seq-len": 32,
    "data.batch-size": 4,
    "data.validation-fraction": 0.2,
    "train.steps": 4,
    "train.log-every": 1,
    "train.checkpoint-every": 2,
    "eval.batches": 2,
}


# A process of its own knows nothing of the kind until somebody names its module.
OPENED = """
import sys, sparsezoo_jax
from sparsezoo_jax import evaluate, generate
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.inference import packed, Engine, Sampling
run = sys.argv[1]
if sys.argv[2] == "installed":
    model, config, tokenizer = sparsezoo_jax.load(run)
else:
    try:
        sparsezoo_jax.load(run)
    except UserError as error:
        print(error)
    model, config, tokenizer = sparsezoo_jax.load(run, plugins=["topk_relu2"])
laid_out = packed(model)
print(type(laid_out.segments[0].blocks[0].ffn).__name__)
def text(model):
    generation = Engine(model).generate([[5, 9, 7]], max_new_tokens=8, sampling=Sampling(temperature=0))
    list(generation)
    return generation.rows
assert text(model) == text(laid_out), "packed decoding writes the same text"
evaluate.main([run, "--json", "--meter-batches", "1", "--contexts", "32"])
generate.main([run, "--prompt", "The", "--max-new-tokens", "3"])
"""


def test_the_python_of_the_documentation(monkeypatch):
    """docs/kinds.md shows the example without what it adds; here with the example's imports. Its second block is in
    `OPENED`.
    """
    tree = ast.parse((EXAMPLES / "topk_relu2.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    module = ModuleType("kind_of_a_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where pydantic looks for the names in annotations
    names = module.__dict__
    exec(compile(tree, "imports", "exec"), names)
    # The module begins so, which the page leaves out.
    changes = {"@register_ffn": "from __future__ import annotations\n\n\n@register_ffn"}
    names["register_ffn"] = lambda kind: kind  # the example has the name
    found = values_of("docs/kinds.md", changes, block=0, **names)
    config = found["TopKReLU2Config"](d_ff=64, top_k=6)
    ctx = preset("dense", "tiny").model.build_context()
    layer = config.build(ctx, nnx.Rngs(0))
    segment_ids = jnp.ones((2, 3), jnp.int32)
    y_BTD, aux = layer(jax.random.normal(jax.random.key(0), (2, 3, 128)), CallContext(segment_ids, segment_ids))
    assert y_BTD.shape == (2, 3, 128)
    assert 0 < aux.stats["ffn_density"] <= 6 / 64 + 1e-6
    assert config.weights(128) == 128 * 70


@pytest.mark.slow
def test_a_kind_from_outside_end_to_end(tmp_path, small_corpus, shared_cache, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    run = tmp_path / "run"
    values = {"plugins": "topk_relu2", **SMALL, "data.dataset": small_corpus, "workdir": run}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    train.main([*flags, "--train.stop-at", "2"])
    train.main(flags)
    assert "resuming from step 2" in capsys.readouterr().err
    stored = json.loads((run / "config.json").read_text())
    assert stored["plugins"] == ["topk_relu2"]
    assert stored["model"]["ffn"] == {"kind": "topk_relu2", "d_ff": 64, "top_k": 6}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(density <= 6 / 64 for row in steps if "split" not in row for density in row["ffn_density"])
    assert "topk_relu2" in (run / "report.html").read_text()

    def opened(how):
        path = os.pathsep.join([str(EXAMPLES), *([str(tmp_path)] if how == "installed" else []), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", OPENED, str(run), how],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    named = opened("named")
    assert "is not installed as a plugin" in named
    assert "--plugins topk_relu2" in named
    assert "PackedTopKReLU2" in named
    install(tmp_path)
    assert "PackedTopKReLU2" in opened("installed")


def install(folder, module="topk_relu2"):
    """What pip writes for a package with an entry point."""
    info = folder / "their_kinds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kinds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\ntheirs = {module}\n")


def module(folder, name, text="loaded = True\n"):
    (folder / f"{name}.py").write_text(text)
    return name


def test_a_stored_name_is_imported_only_if_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    name = module(tmp_path, "not_yet_installed_kinds")
    text = to_json(dataclasses.replace(preset("dense"), plugins=(name,)))
    with pytest.raises(UserError, match=f"plugins='{name}': is not installed as a plugin"):
        from_json(text)
    assert name not in sys.modules
    install(tmp_path, name)
    assert from_json(text).plugins == (name,)
    assert sys.modules.pop(name).loaded


@pytest.mark.parametrize("stored", ['"os"', "[1]", "{}"])
def test_plugins_of_a_wrong_shape(stored):
    with pytest.raises(UserError, match="plugins: must be a list of names of modules"):
        from_json(f'{{"plugins": {stored}}}')


def test_a_plugin_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = module(tmp_path, "broken_kinds", "raise ValueError('no such thing')\n")
    with pytest.raises(UserError, match=r"--plugins=broken_kinds: can't be imported \(ValueError: no such thing\)"):
        plugins.load_named([broken])
    install(tmp_path, broken)
    with pytest.warns(sparsezoo_jax.errors.SparsezooWarning, match="plugin theirs .broken_kinds. is left out"):
        plugins.load_installed()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Wider(PlainFFNConfig):
    """A subclass that nobody registered."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OtherNorm(NormConfig):
    """A part that is no kind."""


def test_what_could_not_be_restored_is_refused():
    config = preset("dense")
    with pytest.raises(ConfigError, match=r"model.ffn=Wider: can't be restored: kind plain is .*PlainFFNConfig"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, ffn=Wider(d_ff=8)))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, norm=OtherNorm()))
    with pytest.raises(UserError, match="can't be restored from its JSON"):
        restorable(other)


class Counting(data.Corpus):
    """Documents without a file."""

    packing = "blocks"

    def open(self, config, split):
        class Documents(list):
            fingerprint = f"counting-{split}"

        return Documents(data.Document(str(i), "one two three") for i in range(3 if split == "train" else 0))


def test_a_corpus_of_a_plugin(monkeypatch):
    with pytest.raises(ConfigError, match=r"data.dataset=sotu: is taken by sparsezoo_jax\.data\.corpora\.SotuCorpus"):
        data.register_corpus("sotu")(Counting)
    monkeypatch.setitem(data.CORPORA, "counting", Counting)
    config = dataclasses.replace(preset("dense"), data=data.DataConfig(dataset="counting"))
    assert config.data.in_blocks
    assert [document.text for document in data.open_documents(config.data, "train")] == ["one two three"] * 3
    with pytest.raises(DataError, match=r"data\.dataset=counting: the validation split has no documents"):
        data.open_documents(config.data, "validation")
    with pytest.raises(UserError, match=r"data.dataset=counting is defined in module tests\.test_plugins"):
        restorable(config)


def test_a_tokenizer_of_a_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tokenizer, "TOKENIZER_FILES", dict(data.tokenizer.TOKENIZER_FILES))
    with pytest.raises(ConfigError, match=r"data.tokenizer=other.json: has the suffix of tokenizer\.json"):
        data.register_tokenizer("other.json", lambda path, content: content)
    data.register_tokenizer("tokenizer.vocab", lambda path, content: content.decode())
    (tmp_path / "tokenizer.vocab").write_text("theirs")
    assert data.find_tokenizer(tmp_path) == "theirs"
    assert data.load_tokenizer(tmp_path / "tokenizer.vocab") == "theirs"


class Base(Kind):
    """Of the kinds below."""


def test_registration():
    kinds: Registry = Registry("model.part", Base)

    @kinds.register
    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class First(Base):
        kind: Literal["first"] = "first"

    assert kinds["first"] is First
    assert kinds.checked(First()) == First()
    with pytest.raises(ConfigError, match=r"model.part.kind=frist: must be one of first \(did you mean first\?\)"):
        kinds["frist"]
    with pytest.raises(ConfigError, match=r"model.part.kind=first: is taken by .*First"):

        @kinds.register
        @dataclass(frozen=True, kw_only=True, config=STRICT)
        class Second(Base):
            kind: Literal["first"] = "first"

    with pytest.raises(ConfigError, match="must be a frozen dataclass of pydantic"):

        @kinds.register
        class Third(Base):
            kind = "third"

    with pytest.raises(ConfigError, match="must derive from Base"):

        @kinds.register
        @dataclass(frozen=True, config=STRICT)
        class Fourth:
            kind: Literal["fourth"] = "fourth"


def test_kinds_of_nobody_are_refused():
    """A kind that a program defines in itself trains nothing, for nobody could load it."""
    from sparsezoo_jax.models import FFN_KINDS

    @FFN_KINDS.register
    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class Lost(PlainFFNConfig):
        kind: Literal["lost"] = "lost"

    try:
        config = preset("dense")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn=Lost(d_ff=8)))
        with pytest.raises(
            UserError, match=r"kind 'lost' is defined in module tests\.test_plugins, which is no plugin"
        ):
            restorable(config)
        assert restorable(dataclasses.replace(config, plugins=(__name__,))).plugins == (__name__,)
    finally:
        FFN_KINDS._kinds.pop("lost")
