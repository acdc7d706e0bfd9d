"""Writes to an object that demand the generation that was read, of whichever store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsezoo_jax.storage import google, s3
from sparsezoo_jax.storage.objects import scheme

#: Which writing of an object it is: Google's generation, the ETag of S3, 0 where there is no object.
Generation = int | str
_STORES: dict[str, Any] = {"gs": google, "s3": s3}


def read_versioned(path: Path) -> tuple[bytes, Generation] | None:
    """An object and its generation, None if there is none; raises `OSError`."""
    return _STORES[scheme(path)].read_versioned(path)


def write_if(path: Path, content: bytes, generation: Generation) -> Generation | None:
    """Write an object if its generation is still this one (0: if there is none); the new one, None if it is not.

    Each write makes another one, also of the same content.

    Raises:
      OSError: it can't be written, or the store knows no such conditions.
    """
    return _STORES[scheme(path)].write_if(path, content, generation)


def remove_if(path: Path, generation: Generation) -> None:
    """Remove an object if its generation is still this one; where a store knows no such condition, empty it instead.

    Raises:
      OSError: it can't be removed.
    """
    _STORES[scheme(path)].remove_if(path, generation)
