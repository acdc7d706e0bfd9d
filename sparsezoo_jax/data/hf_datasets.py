"""Data sets of Hugging Face's library `datasets`: those of the hub, and local ones that it made.

    hf://owner/name             train and validation splits of the only configuration
    hf://owner/name:config      those of a configuration
    hf://owner/name:config/dev  one split, of which a share is held out for validation
    hf:///data/set, hf://./set  a local folder, as `datasets.load_dataset` reads it

`load_dataset` downloads a split once, into that library's own cache, and maps it into memory: random access costs
neither a copy nor a pass. A folder that `save_to_disk` wrote is read where it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsezoo_jax.data.config import DataConfig, local_cache
from sparsezoo_jax.data.dataset_names import HUGGING_FACE
from sparsezoo_jax.data.documents import PART_BYTES, Split, digest
from sparsezoo_jax.data.local_files import LocalDocuments, share_of
from sparsezoo_jax.data.local_files.columns import innermost, path_to_text, text_of_row
from sparsezoo_jax.data.local_files.file import Entry, File
from sparsezoo_jax.errors import DataError, StorageError, UserError

#: Rows that are decoded at once.
_ROWS = 1024
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


class Name(NamedTuple):
    """What `hf://...` says."""

    path: str
    """owner/name on the hub, or a local folder."""
    config: str | None
    split: str | None
    """The split to read; None: those that the configuration of a run names."""


def parse(name: str) -> Name:
    """The parts of a name.

    Raises:
      DataError: it has too many or too few.
    """
    rest = name.removeprefix(HUGGING_FACE)
    if rest.startswith((".", "/", "~")):
        return Name(str(Path(rest).expanduser()), None, None)
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([^/:]+))?(?:/([^/:\[]+(?:\[[^\]]*\])?))?", rest)
    if match is None:
        raise DataError(f"data.dataset={name}: must be hf://owner/name, with :config and /split behind it or not")
    return Name(*match.groups())


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (path / _SAVED_SPLITS).is_file() or ((path / _SAVED).is_file() and (path / "dataset_info.json").is_file())


def open_hf(config: DataConfig, name: str, split: Split, *, whole: bool = False) -> LocalDocuments:
    """Opens a split of a data set.

    Training reads `train_split` and validation `validation_split` where the data set has it; of one without, and of a
    split that the name itself says, the `validation_fraction` of rows whose numbers have the lowest sha256 values is
    held out. `whole` takes every row of the split for validation.

    Raises:
      DataError: `datasets` is not installed, there is no such data set, configuration, split or column, or the hub
        can't be reached. StorageError: the disk can't be read or written.
    """
    parsed = parse(name)
    with _errors(name):
        rows = _load(config, parsed, name, split)
    file = HfFile(rows.dataset, f"{Path(parsed.path).name}:{parsed.config or ''}:{rows.split}", name, config.text_field)
    share = share_of([file], config, name, split, whole or rows.own_split)
    return LocalDocuments([file], share, local_cache(config))


class _Loaded(NamedTuple):
    dataset: Any
    split: str
    own_split: bool
    """Whether validation has a split of its own."""


def _load(config: DataConfig, name: Name, shown: str, split: Split) -> _Loaded:
    try:
        import datasets
    except ImportError as error:
        needs = "needs the package datasets: pip install 'sparsezoo-jax[hf-data]'"
        raise DataError(f"data.dataset={shown}: {needs}") from error

    folder = Path(name.path)
    saved = is_saved(folder)
    local = saved or name.path.startswith((".", "/")) or folder.is_dir()
    if saved:
        splits = datasets.load_from_disk(name.path)
        if not isinstance(splits, datasets.DatasetDict):
            return _Loaded(splits, "all", False)
        names = list(splits)
    elif local and not folder.is_dir():
        raise DataError(f"data.dataset={shown}: no such folder")
    else:
        names = datasets.get_dataset_split_names(name.path, name.config)
        splits = None

    def has(wanted: str) -> bool:
        return wanted.split("[")[0] in names

    if name.split is not None:
        chosen, own = name.split, False
    elif has(config.validation_split):
        chosen, own = config.train_split if split == "train" else config.validation_split, True
    else:
        chosen, own = config.train_split, False
    if not has(chosen):
        raise DataError(f"data.dataset={shown}: has no split '{chosen}', it has {', '.join(map(str, names))}")
    if splits is None:
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        loaded = datasets.load_dataset(name.path, name.config, split=chosen)
    elif chosen in splits:
        loaded = splits[chosen]
    else:
        raise DataError(f"data.dataset={shown}: slices such as '{chosen}' need a data set that is not saved to disk")
    return _Loaded(loaded, chosen, own)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turns what `datasets` raises into one line, and keeps the hub's library from repeating itself meanwhile."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except ConnectionError as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else _line(error)
        raise DataError(
            f"data.dataset={name}: the hub can't be reached, and the data set is not in the cache ({why})"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise StorageError(f"data.dataset={name}: {error.filename or ''} {error.strerror}") from error
        raise DataError(f"data.dataset={name}: {_line(error)}") from error
    except ValueError as error:  # an unknown configuration
        raise DataError(f"data.dataset={name}: {_line(error)}") from error
    except Exception as error:
        # Builders let through whatever their formats raise, wrapped as this.
        from datasets.exceptions import DatasetsError

        if not isinstance(error, DatasetsError):
            raise
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise StorageError(f"data.dataset={name}: {cause.filename or ''} {cause.strerror}") from error
        raise DataError(f"data.dataset={name}: {_line(cause or error)}") from error
    finally:
        logger.setLevel(level)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 400 else f"{text[:400]}...") or type(error).__name__


class HfFile(File):
    """The rows of a split, as those of one file.

    Args:
      dataset: a `datasets.Dataset`.
      name: of the data set and its split, in ids.
      shown: its name in errors.
      text_field: see `DataConfig`.
    """

    def __init__(self, dataset: Any, name: str, shown: str, text_field: str):
        super().__init__(Path(), name, text_field)
        self.label = shown
        self._path_in_row = path_to_text(dataset.features.arrow_schema, text_field, f"data.dataset={shown}")
        self._fingerprint = dataset._fingerprint
        self._rows = dataset.select_columns(self._path_in_row[0]).with_format("arrow")
        self.rows = len(dataset)
        # All rows are taken to be as large as the mean, so that no pass is needed to find their places.
        self._piece = max(1, PART_BYTES * len(dataset) // max(1, self._rows.data.nbytes))

    def digest(self) -> str:
        """The fingerprint that the library gives the data set."""
        return digest(self._fingerprint, self.rows)

    def pieces(self) -> Sequence[int]:
        """Ranges of rows, of about `PART_BYTES`."""
        rows, size = self.rows or 0, self._rows.data.nbytes
        return [size * min(self._piece, rows - start) // rows for start in range(0, rows, self._piece)]

    def numbers(self) -> Iterator[int]:
        """All rows."""
        return iter(range(self.rows or 0))

    def entries(self, piece: int) -> Iterator[Entry]:
        """The rows of a range."""
        return self._range(piece * self._piece, min((piece + 1) * self._piece, self.rows or 0))

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The rows from one on."""
        row, size = place, 1
        while row < (self.rows or 0):
            yield from self._range(row, min(row + size, self.rows or 0))
            row, size = row + size, min(2 * size, _ROWS)

    def _range(self, begin: int, end: int) -> Iterator[Entry]:
        for start in range(begin, end, _ROWS):
            try:
                table = self._rows[start : min(start + _ROWS, end)]
            except OSError as error:
                raise StorageError(f"data.dataset={self.label}: {_line(error)}") from error
            column = innermost(table.column(0), self._path_in_row)
            for row, value in enumerate(column, start):
                yield Entry(row, row, value)

    def text(self, entry: Entry) -> str:
        """The text column of a row."""
        return text_of_row(self, entry.number, entry.content)
