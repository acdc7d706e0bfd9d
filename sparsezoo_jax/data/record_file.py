"""ArrayRecord files: one record a group, so that a record is read without decompressing its neighbours."""

from __future__ import annotations

import os
from typing import Any

from sparsezoo_jax import storage
from sparsezoo_jax.data.record_ranges import RangeReader


def open_writer(path: str | os.PathLike[str]) -> Any:
    """A writer with `write(bytes)` and `close()`; both raise `RuntimeError` if the disk is full."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    return array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")


def open_reader(path: str | os.PathLike[str]) -> Any:
    """A thread-safe reader with `num_records()`, `read(indices)` and `ok()`; `read` raises `RuntimeError`."""
    if storage.is_object(path):
        return RangeReader(storage.path(path))
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    # No read-ahead: the order is random.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return array_record_module.ArrayRecordReader(os.fspath(path), options, file_reader_buffer_size=32768)
