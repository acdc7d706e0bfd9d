"""Where files are: paths of this machine, and names that begin with a scheme such as gs://.

`pathlib` takes the two slashes of a scheme for one, and what is written there would land in a local folder called
`gs:`. So a name becomes a path in `path` alone, and a field that can't take a scheme refuses it with `require_place`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path, PosixPath

from sparsezoo_jax.errors import ConfigError

#: One slash, too: what is left of a name that went through `pathlib`. Drives of Windows have one letter.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


class ObjectPath(PosixPath):
    """A path with a scheme, which it keeps: `str` gives `gs://bucket/name`, and so does every path made from it."""

    def __str__(self) -> str:
        first, *rest = self.parts or ("",)
        return f"{first}//{'/'.join(rest)}" if first.endswith(":") else super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        """What is before the colon."""
        return self.parts[0].removesuffix(":")

    def is_absolute(self) -> bool:
        """Always."""
        return True

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Itself: there are no links."""
        return self

    def expanduser(self) -> ObjectPath:
        """Itself."""
        return self


def scheme_of(name: str | os.PathLike[str]) -> str | None:
    """The scheme that a name begins with ('gs' of 'gs://bucket/run'); None for a path of this machine."""
    found = _SCHEME.match(os.fspath(name))
    return found[1].lower() if found else None


def path(name: str | os.PathLike[str]) -> Path:
    """The path that a name stands for; one with a scheme keeps it."""
    return Path(name) if scheme_of(name) is None else ObjectPath(name)


def require_place(field: str, name: str | os.PathLike[str] | None, *, schemes: Collection[str] = ()) -> None:
    """Raise `ConfigError` unless `name` (None is none) is a path of this machine or begins with one of `schemes`."""
    scheme = None if name is None else scheme_of(name)
    if scheme is not None and scheme not in schemes:
        also = "".join(f" or {known}://" for known in schemes)
        raise ConfigError(field, name, f"must be a path on this machine{also}; {scheme}: is not supported here")
