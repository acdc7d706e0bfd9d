"""What `data.dataset` may say of files: one path, or several; and the formats that names of files end with."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from sparsezoo_jax.storage import OBJECT_STORES, require_place

#: Ending of a file -> format. Case does not matter.
FORMATS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pgn": "pgn",
}
#: Endings of compressed files, which follow that of any format but Parquet (compressed inside).
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
#: For messages.
KNOWN = f"{', '.join(FORMATS)}, and all but .parquet with {', '.join(COMPRESSIONS)}"
#: Begins the names of data sets of the Hugging Face hub.
HUGGING_FACE = "hf://"


class Format(NamedTuple):
    """What a file holds, by its name."""

    name: str
    suffix: str
    """That of the format, in lower case."""
    compression: str
    """One of `COMPRESSIONS`, or ""."""


def format_of(path: str | os.PathLike[str]) -> Format | None:
    """The format of a file, None if it is no known one."""
    name = Path(path).name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    if suffix not in FORMATS or (compression and suffix == ".parquet"):
        return None
    return Format(FORMATS[suffix], suffix, compression)


def names_in(dataset: str) -> list[str]:
    """The names that `data.dataset` lists, separated by commas or as a JSON list; one name is a list of itself.

    A name with a comma in it is one name if there is such a file, and can always be written in a JSON list.
    """
    if dataset.startswith("["):
        try:
            names = json.loads(dataset)
        except ValueError:
            names = None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return [name for name in names if name.strip()]
    if "," not in dataset or os.path.lexists(os.path.expanduser(dataset)):
        return [dataset]
    return [name for name in map(str.strip, dataset.split(",")) if name]


def require_corpus(field: str, dataset: str | None) -> None:
    """Raise `ConfigError` if a name that `dataset` lists is a place that can't be read."""
    for name in () if dataset is None else names_in(dataset):
        if not name.startswith(HUGGING_FACE):
            require_place(field, name, schemes=OBJECT_STORES)


def are_games(dataset: str) -> bool:
    """Whether all names of `dataset` end as those of PGN files. A directory of such files has a name of its own."""
    formats = [format_of(name) for name in names_in(dataset)]
    return bool(formats) and all(found is not None and found.name == "pgn" for found in formats)


def short_name(dataset: str) -> str:
    """A name for a corpus, of letters, digits, dots, dashes and underscores: what its file or directory is called,
    without endings, or its name in a catalogue.
    """
    first = next(iter(names_in(dataset)), dataset).removeprefix(HUGGING_FACE)
    path = Path(first)
    while glob.has_magic(path.name):
        path = path.parent
    found = format_of(path)
    name = path.name
    if found is not None:
        name = name[: -len(found.suffix) - len(found.compression)]
    elif not first.startswith((".", "/", "~")):
        name = str(path)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "corpus"
