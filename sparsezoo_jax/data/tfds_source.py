"""Datasets from the TFDS catalogue, of texts and of others, read without TensorFlow."""

from __future__ import annotations

import bisect
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sparsezoo_jax import storage
from sparsezoo_jax.data.config import DataConfig, local_cache
from sparsezoo_jax.data.corpus import CORPORA
from sparsezoo_jax.data.documents import BadDocumentError, Document, InRanges, SourceFile, digest
from sparsezoo_jax.data.record_file import open_reader
from sparsezoo_jax.data.skipping import NOT_UTF8
from sparsezoo_jax.errors import DataError, StorageError, UserError
from sparsezoo_jax.untrusted import read_json

#: The TFDS builders that this package brings along; `corpora` registers them as corpora.
OWN = ("sotu", "chess", "pysource")
#: TFDS's collections with text in them.
_OF_TEXT = ("text", "summarization", "question_answering", "translate")
#: Records that are fetched from an object store at once.
_AHEAD = 64
#: Where Hugging Face's hub has the same texts, ready to read.
_ON_THE_HUB = {
    "c4": "hf://allenai/c4:{config}",
    "wikipedia": "hf://wikimedia/wikipedia:{config}",
    "wiki40b": "hf://google/wiki40b:{config}",
}


class RangeSource:
    """What TFDS's `as_data_source` gives, of a data set in an object store, which ArrayRecord's library can't open.

    Neighbours that are read one after the other are fetched together, `_AHEAD` of them.

    Raises:
      StorageError: a file can't be read, now or later.
    """

    def __init__(self, info: Any, split: str):
        self._features, self._files = info.features, info.splits[split].file_instructions
        self._starts = [0, *itertools.accumulate(file.take for file in self._files)]
        self._readers = [functools.cache(functools.partial(self._opened, file.filename)) for file in self._files]
        self._held: tuple[int, list[bytes]] = (0, [])

    @staticmethod
    def _opened(name: str) -> Any:
        with _reading(name):
            return open_reader(name)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        start, records = self._held
        if not start <= index < start + len(records):
            number = bisect.bisect_right(self._starts, index) - 1
            file, inside = self._files[number], index - self._starts[number]
            count = min(_AHEAD, file.take - inside) if index == start + len(records) else 1
            with _reading(file.filename):
                records = self._readers[number]().read(range(file.skip + inside, file.skip + inside + count))
            start = index
            self._held = start, records  # as one, for threads that read ahead
        return self._features.deserialize_example_np(records[index - start])


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise StorageError(f"{name}: can't be read ({getattr(error, 'strerror', None) or error})") from error


class TfdsDocuments(InRanges):
    """One split of a TFDS dataset; a document's id is its `id` feature, or its index in the split.

    Args:
      path: names of the features that lead to the text, one within the other.
      directory: where it is prepared.

    Attributes:
      files: what tells a change of the corpus, beside its fingerprint.
    """

    files: Sequence[SourceFile] = ()

    def __init__(
        self,
        source: Any,
        name: str,
        path: Sequence[str],
        fingerprint: str,
        total_bytes: int = 0,
        directory: str = "",
    ):
        self._source, self._name, self._path = source, name, path
        self.total_bytes, self.directory = total_bytes, directory
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self._source):
            raise IndexError(f"document {index} of {len(self._source)}")
        example = self._source[index]
        where = f"{self._name}:{index}"
        text = functools.reduce(lambda value, name: value[name], self._path, example)
        return Document(_text(example["id"], where) if "id" in example else where, _text(text, where))


def _text(value: Any, where: str) -> str:
    # ArrayRecord examples come back as bytes, mocked ones as str.
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise BadDocumentError(where, NOT_UTF8, f"not UTF-8 at byte {error.start}") from None


def open_tfds(config: DataConfig, name: str, split: str) -> TfdsDocuments:
    """Opens a split of a TFDS dataset, preparing it first (ArrayRecord) if the data directory does not hold it.

    Raises `DataError` for an unknown name, split or text field, or a dataset that can't be prepared here;
    `StorageError` if writing fails.
    """
    builder = prepared_builder(config, name)
    info = builder.info
    path = _path_to_text(info.features, config.text_field, name)
    source = open_split(builder, name, split)
    try:
        sizes = (info.splits[split].num_examples, info.splits[split.split("[")[0]].num_bytes)
    except (KeyError, ValueError):
        sizes = (len(source),)  # a dataset that doesn't record its splits
    fingerprint = digest("tfds", info.full_name, split, config.text_field, *sizes)
    return TfdsDocuments(source, f"{name}:{split}", path, fingerprint, (*sizes, 0)[1] or 0, str(builder.data_dir))


def prepared_builder(config: DataConfig, name: str, collections: Sequence[str] = _OF_TEXT) -> Any:
    """TFDS's builder of a dataset, which is prepared (ArrayRecord) if the data directory does not hold it.

    Args:
      collections: modules of TFDS whose datasets are known beside those that are known already.

    Raises:
      DataError: an unknown name, or a dataset that can't be prepared here.
      StorageError: writing fails.
    """
    with _without_warnings():
        builder = _builder(config, name, collections)
        _prepare(builder, name)
    return builder


def open_split(builder: Any, name: str, split: str) -> Any:
    """The examples of a split of a prepared dataset, a sequence.

    Raises:
      DataError: there is no such split, or it has no random access.
    """
    info = builder.info
    try:
        return RangeSource(info, split) if is_ranged(builder) else builder.as_data_source(split)
    except NotImplementedError as error:
        raise DataError(
            f"data.dataset={name}: prepared in {builder.data_dir} as {info.file_format}, which has no random access; "
            "prepare it with file_format=array_record in another data.tfds_data_dir"
        ) from error
    except (KeyError, ValueError) as error:
        splits = ", ".join(info.splits) or "none"
        raise DataError(
            f"data.dataset={name}: no {_contents(info)} in split '{split}'; it has {splits}, and slices such as "
            "'train[99%:]'"
        ) from error


def _contents(info: Any) -> str:
    return "documents" if "image" not in (info.features or {}) else "images"


def is_ranged(builder: Any) -> bool:
    """Whether records are read by `RangeSource`: of other formats TFDS itself says what is wrong with them."""
    return storage.is_object(builder.data_dir) and builder.info.file_format.value == "array_record"


def _path_to_text(features: Any, text_field: str, name: str) -> list[str]:
    """The names of features that lead to the text: a feature as it is, or the parts of its path between dots.

    Raises:
      DataError: there is no such feature, or it holds others.
    """
    path = [text_field] if text_field in (features or {}) else text_field.split(".")
    if ".".join(path) not in (fields := _fields(features)):
        raise DataError(f"data.text_field={text_field}: {name} has the fields {', '.join(fields)}")
    return path


def _fields(features: Any, prefix: str = "") -> list[str]:
    """The features that hold one value, with dots between the names of one within the other."""
    import tensorflow_datasets as tfds

    found = []
    for name, feature in (features or {}).items():
        if isinstance(feature, tfds.features.FeaturesDict):
            found += _fields(feature, f"{prefix}{name}.")
        elif not isinstance(feature, (tfds.features.Sequence, tfds.features.Dataset)):
            found.append(prefix + name)
    return found


def _builder(config: DataConfig, name: str, collections: Sequence[str]) -> Any:
    import tensorflow_datasets as tfds

    if re.match(r"\w+:[A-Za-z_]", name):
        raise DataError(f"data.dataset={name}: datasets of a community are code from elsewhere, which is not run")
    _check_features(config, name)
    # TFDS imports its collections in a fixed order and stops at the first that lacks an optional dependency, which
    # hides the text datasets (c4, wiki40b, ...) behind e.g. a missing pydub. So import the wanted ones one by one.
    for collection in collections:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{collection}")
    arguments = {}
    if name == "sotu":
        importlib.import_module("sparsezoo_jax.data.sotu")
    if name == "chess":
        from sparsezoo_jax.data.chess.builder import games_config

        arguments["config"] = games_config(config.chess, local_cache(config) / "chess")
    if name == "pysource":
        from sparsezoo_jax.data.pysource.builder import packages_config

        arguments["config"] = packages_config(config.pysource)
    try:
        return tfds.builder(name, data_dir=tfds_directory(config, name), file_format="array_record", **arguments)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(f"data.dataset={name}: {_suggestion(name)}") from error
    except ImportError as error:
        raise DataError(
            f"data.dataset={name}: this TFDS dataset needs a package that is not installed: {error}"
        ) from error
    except Exception as error:  # an unknown config or version, a malformed name, no network: TFDS has many types
        raise DataError(f"data.dataset={name}: {_one_line(error)}") from error


def _check_features(config: DataConfig, name: str) -> None:
    """TFDS imports any module that a prepared data set names as the home of its features; only its own are let pass."""
    if config.tfds_data_dir is None:
        return
    folder = storage.path(config.tfds_data_dir).expanduser() / re.split(r"[/:]", name)[0]
    files = storage.files_below(folder) if storage.is_object(folder) else folder.rglob("features.json")
    for path in sorted(file for file in files if file.name == "features.json"):
        try:
            foreign = [home for home in _classes(read_json(path)) if not home.startswith("tensorflow_datasets.")]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read ({error})") from None
        if foreign:
            raise DataError(f"{path}: names {foreign[0]}, which is no feature of TFDS; code from elsewhere is not run")


def _classes(value: Any) -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key in ("type", "pythonClassName", "python_class_name") and isinstance(item, str):
            yield item
        yield from _classes(item)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """TFDS warns about every dataset that is not prepared yet."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _suggestion(name: str) -> str:
    from tensorflow_datasets.core import registered

    known = [*registered.list_imported_builders(), *CORPORA]
    close = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"neither a file on this machine nor a TFDS dataset{hint}"


def _prepare(builder: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    if builder.is_prepared():
        return
    if storage.is_object(builder.data_dir):
        reason = "ArrayRecord writes to disks alone: prepare it in a directory of this machine, and copy that"
        raise DataError(f"data.dataset={name}: not prepared in {builder.data_dir}, and can't be there; {reason}")
    _require_beam(builder, name)
    quiet = name in OWN  # these take a second, or show their own progress
    if quiet:
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stderr):
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except UserError:
        raise
    except Exception as error:
        # TFDS lets through whatever its many builders raise; a concurrent process may also have been first.
        if _prepared_by_another(builder):
            return
        if isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.errno is not None:
            raise StorageError(f"{builder.data_dir}: could not prepare {name}: {error}") from error
        raise DataError(
            f"data.dataset={name}: not prepared in {builder.data_dir} and can't be prepared here: {_one_line(error)}"
        ) from error
    finally:
        if quiet:
            tfds.enable_progress_bar()


def _require_beam(builder: Any, name: str) -> None:
    """Refuses, before anything is downloaded, a data set whose preparation needs a package that is not there."""
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("apache_beam") is not None:
        return
    module = sys.modules[type(builder).__module__]
    by_beam = isinstance(builder, tfds.core.BeamBasedBuilder)
    if by_beam or re.search(r"\bapache_beam\b", inspect.getsource(module)):
        same = _ON_THE_HUB.get(builder.name, "hf://owner/name").format(config=name.partition("/")[2].split(":")[0])
        raise DataError(
            f"data.dataset={name}: not prepared in {builder.data_dir}, and preparing it needs Apache Beam: pip install "
            f"apache-beam, name a data.tfds_data_dir that has it, or take it from the hub: --data.dataset {same}"
        )


def _prepared_by_another(builder: Any) -> bool:
    if not builder.is_prepared():
        return False
    builder.info.read_from_directory(builder.data_dir)
    return True


def _one_line(error: BaseException) -> str:
    # TFDS puts its constructor's arguments in front of the reason.
    reason = " ".join(str(error).split()).split('}": ')[-1]
    return (reason if len(reason) <= 400 else f"{reason[:400]}...") or type(error).__name__


def tfds_directory(config: DataConfig, name: str) -> str | None:
    """Where the TFDS dataset `name` is stored; None is TFDS's default."""
    if config.tfds_data_dir is not None:
        return str(storage.path(config.tfds_data_dir).expanduser())
    if name == "sotu":
        from sparsezoo_jax.data.sotu import corpus_digest

        # Another release of the texts is another directory, so that it is never mistaken for the one prepared before.
        return str(local_cache(config) / "tfds" / corpus_digest()[:12])
    if name in ("chess", "pysource"):
        return str(local_cache(config) / "tfds")
    return None
