"""The column of the text in a table of Arrow, within structs too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsezoo_jax.data.local_files.file import File
from sparsezoo_jax.data.skipping import NOT_TEXT, NOT_UTF8, NULL_TEXT
from sparsezoo_jax.errors import DataError


class NoColumnError(DataError):
    """A table without the column of the text, or with one that can't hold texts."""


def path_to_text(schema: Any, text_field: str, where: object) -> list[str]:
    """The names that lead to the column of the text, one within the other.

    Args:
      schema: of Arrow.
      text_field: a column as it is, or the parts of its path between dots.
      where: named in errors.

    Raises:
      NoColumnError: there is none that holds strings or bytes.
    """
    import pyarrow.types as types

    path = [text_field] if text_field in schema.names else text_field.split(".")
    if path[0] not in schema.names:
        columns = ", ".join(schema.names)
        raise NoColumnError(f"{where}: no column '{text_field}' (data.text_field), it has {columns}")
    kind = schema.field(path[0]).type
    for part in path[1:]:
        index = kind.get_field_index(part) if types.is_struct(kind) else -1
        if index < 0:
            raise NoColumnError(f"{where}: no column '{text_field}' (data.text_field), '{path[0]}' is {kind}")
        kind = kind.field(index).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    texts += (types.is_binary, types.is_large_binary, types.is_binary_view)
    if not any(holds(values) for holds in texts):
        raise NoColumnError(f"{where}: column '{text_field}' holds {kind}, not strings")
    return path


def innermost(column: Any, path: Sequence[str]) -> Any:
    """The column at the end of a path that begins with `column`; null where one around it is."""
    import pyarrow.compute as pc

    for part in path[1:]:
        column = pc.struct_field(column, part)  # pyright: ignore[reportAttributeAccessIssue]
    return column


def text_of_row(file: File, row: int, scalar: Any) -> str:
    """The text in a value of the column.

    Raises:
      BadDocumentError: there is none.
    """
    try:
        value = scalar.as_py()
        if isinstance(value, bytes):
            value = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise file.bad(row, NOT_UTF8, f"row {row} is not UTF-8 at byte {error.start}") from None
    if value is None:
        raise file.bad(row, NULL_TEXT, f"row {row} has null in '{file.text_field}'")
    if not isinstance(value, str):
        raise file.bad(row, NOT_TEXT)
    return value
