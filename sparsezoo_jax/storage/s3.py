"""Conditions of S3: requests with `If-Match` and `If-None-Match`, on the ETag of an object.

An ETag follows from the content, so a line of random digits is written after it. Stores that speak the protocol without
these conditions ignore the headers or refuse them; which, is tried once for each bucket before the first write.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from pathlib import Path
from typing import Any

from sparsezoo_jax.storage.objects import StoreError, calls, client

#: An ETag that no object has: that of another content.
_OTHER = f'"{"0" * 32}"'
#: By bucket: whether deletions heed conditions, too. Buckets whose writes don't are not in here.
_deletions: dict[str, bool] = {}


def read_versioned(path: Path) -> tuple[bytes, str] | None:
    """See `conditions.read_versioned`."""
    from fsspec.asyn import sync

    store, place = client(path), _place(path)

    async def read() -> tuple[bytes, str]:
        found = await store._call_s3("get_object", **place)
        try:
            return await found["Body"].read(), found["ETag"]
        finally:
            found["Body"].close()

    try:
        with calls(path):
            found: Any = sync(store.loop, read)
    except FileNotFoundError:
        return None
    content, tag = found
    return content.rpartition(b"\n")[0], tag


def write_if(path: Path, content: bytes, tag: str | int) -> str | None:
    """See `conditions.write_if`."""
    _heeds_deletions(path)
    try:
        return _put(path, content, **({"IfMatch": tag} if tag else {"IfNoneMatch": "*"}))
    except FileExistsError:
        return None
    except FileNotFoundError:  # the object, or the bucket
        if not tag:
            raise
        return None


def remove_if(path: Path, tag: str) -> None:
    """See `conditions.remove_if`."""
    if not _heeds_deletions(path):
        write_if(path, b"", tag)
        return
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        _delete(path, IfMatch=tag)


def _heeds_deletions(path: Path) -> bool:
    """Whether a condition on a deletion is heeded in this bucket; raises `StoreError` if one on a write is not."""
    bucket = _place(path)["Bucket"]
    if bucket not in _deletions:
        tried = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        _put(tried, b"")
        try:
            for condition in ({"IfNoneMatch": "*"}, {"IfMatch": _OTHER}):
                if not _refuses(_put, tried, b"", **condition):
                    why = f"the object store ignores {next(iter(condition))} of conditional writes, which leases need"
                    raise StoreError(errno.ENOTSUP, why, str(path))
            _deletions[bucket] = _refuses(_delete, tried, IfMatch=_OTHER)
        finally:
            _delete(tried)
    return _deletions[bucket]


def _refuses(request: Any, *args: Any, **condition: str) -> bool:
    """Whether a request under a condition that does not hold is refused for that reason."""
    try:
        request(*args, **condition)
    except FileExistsError:
        return True
    except StoreError as error:
        if error.errno != errno.ENOTSUP:
            raise
    return False


def _put(path: Path, content: bytes, **condition: Any) -> str:
    body = content + b"\n" + secrets.token_hex(8).encode()
    with calls(path):
        made = client(path).call_s3("put_object", **_place(path), Body=body, CacheControl="no-store", **condition)
    return made["ETag"]


def _delete(path: Path, **condition: str) -> None:
    with calls(path):
        client(path).call_s3("delete_object", **_place(path), **condition)


def _place(path: Path) -> dict[str, str]:
    bucket, name, _ = client(path).split_path(str(path))
    return {"Bucket": bucket, "Key": name}
