"""Conditions of Google Cloud Storage: an object has a generation, which each write makes anew."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from urllib.parse import quote

from sparsezoo_jax.storage.objects import calls, client


def read_versioned(path: Path) -> tuple[bytes, int] | None:
    """See `conditions.read_versioned`."""
    try:
        with calls(path):
            headers, content = client(path).call("GET", _url(path), alt="media")
            return content, int(headers["X-Goog-Generation"])
    except FileNotFoundError:
        return None


def write_if(path: Path, content: bytes, generation: int) -> int | None:
    """See `conditions.write_if`."""
    bucket, name = path.parts[1], "/".join(path.parts[2:])
    text = {"Content-Type": "multipart/related; boundary=part"}
    meta = json.dumps({"name": name, "contentType": "application/json", "cacheControl": "no-store"})
    head = (
        f"--part\nContent-Type: application/json; charset=UTF-8\n\n{meta}\n--part\nContent-Type: application/json\n\n"
    )
    store = client(path)
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
    """See `conditions.remove_if`."""
    with contextlib.suppress(FileExistsError, FileNotFoundError), calls(path):
        client(path).call("DELETE", _url(path), ifGenerationMatch=generation)


def _url(path: Path) -> str:
    name = quote("/".join(path.parts[2:]), safe="")
    return f"{client(path)._location}/storage/v1/b/{quote(path.parts[1])}/o/{name}"
