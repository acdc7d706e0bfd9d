"""The client of an object store: its file system, its errors, ranges, and writes that demand a generation."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsezoo_jax.errors import StorageError


class StoreError(StorageError, OSError):
    """An object store that denies something or fails: for callers an `OSError`, for users one line."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@functools.cache
def client() -> Any:
    """The file system of `etils.epath`, and so of Orbax; it asks the store each time, for others write there."""
    # With TensorFlow in the environment, epath would go through its client, which has no conditions.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config
    from etils.epath import backend

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return backend.fsspec_backend.fs("gs://")


def info(path: Path) -> dict[str, Any] | None:
    try:
        with calls(path):
            return client().info(str(path))
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def calls(path: Path) -> Iterator[None]:
    """What a store's client raises, of a dozen libraries, as `OSError` with one line in `strerror`."""
    if not str(path).startswith("gs://"):
        raise StoreError(errno.EPROTONOSUPPORT, "stores of this kind are not supported", str(path))
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "is not what it was", str(path)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # of this machine
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        denied = lines[0].startswith("Forbidden") or getattr(error, "code", None) in (401, "401")
        number, what = (errno.EACCES, "access denied") if denied else (errno.EIO, "the object store failed")
        raise StoreError(number, f"{what} ({_shown(lines[-1])})", str(path)) from error


def _shown(text: str) -> str:
    return "".join(character for character in text[:300] if character.isprintable())


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of an object, in one request; raises `OSError`."""
    with calls(path):
        return client().cat_file(str(path), start=start, end=end)


def read_versioned(path: Path) -> tuple[bytes, int] | None:
    """An object and its generation, None if there is none; raises `OSError`."""
    try:
        with calls(path):
            headers, content = client().call("GET", _url(path), alt="media")
            return content, int(headers["X-Goog-Generation"])
    except FileNotFoundError:
        return None


def write_if(path: Path, content: bytes, generation: int) -> int | None:
    """Write an object if its generation is still this one (0: if there is none); the new one, None if it is not.

    Raises:
      OSError: it can't be written.
    """
    bucket, name = path.parts[1], "/".join(path.parts[2:])
    text = {"Content-Type": "multipart/related; boundary=part"}
    meta = json.dumps({"name": name, "contentType": "application/json", "cacheControl": "no-store"})
    head = (
        f"--part\nContent-Type: application/json; charset=UTF-8\n\n{meta}\n--part\nContent-Type: application/json\n\n"
    )
    store = client()
    try:
        with calls(path):
            made = store.call(
                "POST",
                f"{store._location}/upload/storage/v1/b/{quote(bucket)}/o",
                headers=text,
                data=head.encode() + content + b"\n--part--",
                uploadType="multipart",
                ifGenerationMatch=generation,
                json_out=True,
            )
        return int(made["generation"])
    except FileExistsError:
        return None


def remove_if(path: Path, generation: int) -> None:
    """Remove an object if its generation is still this one; raises `OSError`."""
    with contextlib.suppress(FileExistsError, FileNotFoundError), calls(path):
        client().call("DELETE", _url(path), ifGenerationMatch=generation)


def _url(path: Path) -> str:
    name = quote("/".join(path.parts[2:]), safe="")
    return f"{client()._location}/storage/v1/b/{quote(path.parts[1])}/o/{name}"
