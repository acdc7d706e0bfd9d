"""Which files of an installed package are source that people wrote, and what its metadata says of it.

Everything is told from the package's RECORD (PyPA, "Recording installed projects"), which names each file with its
sha256: nothing is imported, and no file is taken that is not as it was published.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sparsezoo_jax.errors import DataError

#: Tests and what protobuf's compiler writes, by their names.
_LEFT_OUT = re.compile(
    r"(?:^|/)(?:_?tests?/|[^/]*test_?data/|conftest\.py$|test_[^/]*\.py$|[^/]*_tests?\.py$|[^/]*_pb2(?:_grpc)?\.py$)"
)
#: How files that a program wrote say so in their first lines.
_GENERATED = re.compile(
    r"\bauto(?:matically)?[- ]?generated\b|@generated\b|^\s*#.*\bgenerated (?:by|from|with|using)\b"
    r"|\bdo not (?:edit|modify)\b|\bdon'?t (?:manually )?edit\b",
    re.IGNORECASE,
)
_FIRST_LINES = 12
_LICENSE_FILE = re.compile(r"\.dist-info/(?:.*/)?(?:LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
#: Characters of a line, the longest and on average, above which a file is tables or minified.
LONGEST_LINE, MEAN_LINE = 1000, 100


@dataclass(frozen=True)
class Package:
    """An installed package: `files` are its Python files as (path, sha256 in hex), those left out by name excluded."""

    name: str
    version: str
    license: str
    license_files: tuple[str, ...]
    files: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """Name and version, as pip writes them."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Source:
    """A file of a package; lines of its text end with a line feed alone."""

    package: Package
    path: str
    text: str

    @property
    def id(self) -> str:
        """Names it in the corpus."""
        return f"{self.package.label}/{self.path}"


def find_package(name: str, version: str | None) -> Package:
    """The installed package of a name.

    Raises:
      DataError: it is not installed, in another version than `version`, or its files have no sha256.
    """
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        wanted = name if version is None else f"{name}=={version}"
        raise DataError(
            f"data.pysource: {name} is not installed; pip install {wanted}, or name other packages"
        ) from None
    if version not in (None, found.version):
        raise DataError(
            f"data.pysource: {name}=={version} is wanted, and {found.version} is installed; "
            f"pip install {name}=={version}, or name another version"
        )
    record = found.read_text("RECORD")
    if record is None:
        raise DataError(f"data.pysource: {name} has no list of its files (RECORD); install it with pip")
    rows = list(csv.reader(io.StringIO(record)))
    licenses = tuple(sorted(path for path, *_ in rows if _LICENSE_FILE.search(path)))
    return Package(name, found.version, license_of(found.metadata), licenses, _files(name, rows))


def license_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """The licence that a package's metadata names: its SPDX expression, its classifiers, or its older free text's first
    line.
    """
    for expression in metadata.get_all("License-Expression") or ():
        return expression
    prefix = "License :: "
    classifiers = [text for text in metadata.get_all("Classifier") or () if text.startswith(prefix)]
    if classifiers:
        return " or ".join(text.split(" :: ")[-1] for text in classifiers)
    texts = metadata.get_all("License") or ()
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "not named"


def _files(name: str, rows: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    found = []
    for path, checksum, *_ in rows:
        place = PurePosixPath(path)
        outside = place.is_absolute() or ".." in place.parts
        if place.suffix != ".py" or outside or _LEFT_OUT.search(path):
            continue
        kind, _, value = checksum.partition("=")
        if kind != "sha256":
            raise DataError(f"data.pysource: {name} does not say what {path} holds (sha256); install it with pip")
        found.append((path, base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()))
    return tuple(sorted(found))


def sources(packages: Sequence[Package]) -> Iterator[Source]:
    """The texts of packages, in their order and that of paths; of equal texts (white space aside) the first.

    Raises:
      DataError: a file is missing, or is not what its package says.
    """
    seen = set()
    for package in packages:
        distribution = importlib.metadata.distribution(package.name)
        for path, sha256 in package.files:
            text = _text(distribution, path, sha256)
            if text is None or not is_written(text):
                continue
            key = hashlib.sha256(" ".join(text.split()).encode()).digest()
            if key not in seen:
                seen.add(key)
                yield Source(package, path, text)


def _text(distribution: importlib.metadata.Distribution, path: str, sha256: str) -> str | None:
    """The text of a file; None if it is not in the encoding that it declares (PEP 263)."""
    place = str(distribution.locate_file(path))
    try:
        with open(place, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{place}: {error.strerror or error}; reinstall its package") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{place} was changed since it was installed (sha256 differs); reinstall its package")
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return io.TextIOWrapper(io.BytesIO(content), encoding).read()
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def is_written(text: str) -> bool:
    """Whether a text is code that people wrote: not empty, not said to be generated, no tables of very long lines."""
    lines = text.splitlines()
    if not text.strip() or any(_GENERATED.search(line) for line in lines[:_FIRST_LINES]):
        return False
    return max(map(len, lines)) <= LONGEST_LINE and sum(map(len, lines)) <= MEAN_LINE * len(lines)
