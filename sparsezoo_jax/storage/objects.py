"""The clients of object stores: their file systems, their errors, and ranges of bytes."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsezoo_jax.errors import StorageError

#: Object stores by scheme: the module that is their file system, and the extra that brings it.
CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
#: To one store at the same time: botocore's own 10 are fewer than a reader of records has threads.
_CONNECTIONS = 100
_UNMET = ("PreconditionFailed", "ConditionalRequestConflict")
_UNKNOWN = ("NotImplemented", "501")


class StoreError(StorageError, OSError):
    """An object store that denies something or fails: for callers an `OSError`, for users one line."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def scheme(path: Path) -> str:
    """What is before the `://` of an object's path."""
    return str(path).partition("://")[0]


def client(path: Path) -> Any:
    """The file system of a path's store; raises `StoreError` for a store of another kind."""
    if scheme(path) not in CLIENTS:
        raise StoreError(errno.EPROTONOSUPPORT, "stores of this kind are not supported", str(path))
    return _client(scheme(path))


@functools.cache
def _client(scheme: str) -> Any:
    """The file system of `etils.epath`, and so of Orbax; it asks the store each time, for others write there."""
    # With TensorFlow in the environment, epath would go through its client, which has no conditions.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config
    from etils.epath import backend

    options = fsspec.config.conf.setdefault("s3", {})
    options.setdefault("config_kwargs", {"max_pool_connections": _CONNECTIONS})
    store = backend.fsspec_backend.fs(f"{scheme}://")
    # Not by an option: a library that used `epath` before has made it already, with lists that it remembers.
    store.dircache.use_listings_cache = False
    store.invalidate_cache()
    return store


def info(path: Path) -> dict[str, Any] | None:
    """What a store says of an object or of what is below a name; None if there is nothing. Raises `OSError`."""
    try:
        with calls(path):
            return client(path).info(str(path))
    except FileNotFoundError:
        return None


def change(found: Mapping[str, Any]) -> int:
    """A number that tells whether an object that `info` found is still the same: of Google its generation, else of
    its ETag, which follows from what is in it.
    """
    if "generation" in found:
        return int(found["generation"])
    return int.from_bytes(hashlib.sha256(str(found["ETag"]).encode()).digest()[:7], "big")


@contextlib.contextmanager
def calls(path: Path) -> Iterator[None]:
    """What a store's client raises, of a dozen libraries, as `OSError` with one line in `strerror`."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        what = "no such bucket" if _code(error) == "NoSuchBucket" else os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, what, str(path)) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "is not what it was", str(path)) from None
    except Exception as error:
        code = _code(error)
        if code in _UNMET:
            raise FileExistsError(errno.EEXIST, "is not what it was", str(path)) from None
        if code is None and isinstance(error, OSError) and error.strerror:  # of this machine
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        number, what = errno.EIO, "the object store failed"
        if _is_denied(error, lines[0]):
            number, what = errno.EACCES, "access denied"
        elif _lacks_credentials(error):
            number, what = errno.EACCES, "no credentials"
        elif code in _UNKNOWN:
            number = errno.ENOTSUP
        raise StoreError(number, f"{what} ({_shown(lines[-1])})", str(path)) from error


def _code(error: BaseException) -> str | None:
    """What S3 calls an error: s3fs makes exceptions of Python of those of botocore, which have the answer."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _is_denied(error: Exception, first: str) -> bool:
    return (
        isinstance(error, PermissionError)
        or first.startswith("Forbidden")
        or getattr(error, "code", None) in (401, "401")
    )


def _lacks_credentials(error: Exception) -> bool:
    if not type(error).__module__.startswith("botocore."):
        return False
    from botocore import exceptions  # pyright: ignore[reportMissingImports]

    kinds = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
        exceptions.SSOError,
    )
    return isinstance(error, kinds)


def _shown(text: str) -> str:
    return "".join(character for character in text[:300] if character.isprintable())


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of an object, in one request; raises `OSError`."""
    with calls(path):
        return client(path).cat_file(str(path), start=start, end=end)
