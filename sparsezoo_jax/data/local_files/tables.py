"""Tables: Parquet files, and comma- or tab-separated values with a header."""

from __future__ import annotations

import bisect
import contextlib
import csv
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from sparsezoo_jax import storage
from sparsezoo_jax.data.local_files.columns import NoColumnError, innermost, path_to_text, text_of_row
from sparsezoo_jax.data.local_files.file import Entry, File, checked
from sparsezoo_jax.data.local_files.streams import Line, encoding_at, lines, open_utf8, reading
from sparsezoo_jax.data.skipping import NOT_CSV, NOT_UTF8
from sparsezoo_jax.errors import DataError, StorageError
from sparsezoo_jax.untrusted import MAX_COMPRESSION, MAX_LINE_BYTES, check_expansion

_BATCH_ROWS = 1024
#: Stands for a line that is too long to be kept: no row of a table.
_TOO_LONG = '""x\n'


class CsvFile(File):
    """A .csv or .tsv file: one row a document, named by the line on which it ends; the first row names the columns.

    Values are separated by what separates the header so that it has the column of the text: a comma (in .tsv files a
    tab), else a semicolon, a tab or a bar.
    """

    seekable = False

    def __init__(self, path, name, text_field, compression="", *, separator: str = ","):
        super().__init__(path, name, text_field, compression)
        with reading(path):
            encoding_at(path, compression)
        header = next(self._rows(separator), None)
        self._separator, self._column, self._width = separator, -1, 0
        for candidate in (separator, ",", ";", "\t", "|"):
            columns = next(self._rows(candidate))[1] if header is not None else []
            if columns is not None and text_field in columns:
                self._separator, self._column, self._width = candidate, columns.index(text_field), len(columns)
                return
        if header is not None:
            columns = ", ".join(repr(column[:40]) for column in (header[1] or [])[:20])
            raise NoColumnError(f"{path}: no column '{text_field}' (data.text_field), its first row is {columns}")

    def entries(self, piece: int) -> Iterator[Entry]:
        """The rows in order, blank lines left out."""
        rows = self._rows(self._separator)
        next(rows, None)
        return (Entry(line, line, row) for line, row in rows if row is None or row)

    def _rows(self, separator: str) -> Iterator[tuple[int, list[str] | None]]:
        """Line and values of each row; None for one that is none."""
        with reading(self.path), open_utf8(self.path, self.compression) as file:
            # Process-wide, but nothing else in this package reads tables of others.
            csv.field_size_limit(MAX_LINE_BYTES)
            reader = csv.reader(map(_text, lines(file)), delimiter=separator, strict=True)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    row = None
                yield reader.line_num, row

    def text(self, entry: Entry) -> str:
        """The text column of a row."""
        row, line = entry.content, entry.number
        if row is None:
            raise self.bad(line, NOT_CSV, "no row of the table: a quote that is not closed or followed by more")
        if len(row) != self._width:
            raise self.bad(line, NOT_CSV, f"{len(row)} values, not {self._width} as in the header")
        text = row[self._column]
        if any("\udc80" <= character <= "\udcff" for character in text) if not text.isascii() else False:
            raise self.bad(line, NOT_UTF8, f"'{self.text_field}' is not UTF-8")
        return checked(self, line, text)


def _text(line: Line) -> str:
    return _TOO_LONG if line.content is None else line.content.decode("utf-8", "surrogateescape")


class ParquetFile(File):
    """A .parquet file: one row a document, numbered from 0; row groups are its pieces."""

    def __init__(self, path, name, text_field, compression=""):
        super().__init__(path, name, text_field, compression)
        self._cached: tuple[int, Any] = (-1, None)
        self._indexed: list[str] = []
        with self._decoding("not a Parquet file", DataError), self._open() as file:
            schema, metadata = file.schema_arrow, file.metadata
            leaves = [metadata.schema.column(i).path for i in range(len(metadata.schema))]
        self._path_in_row = path_to_text(schema, text_field, path)
        self._name = ".".join(self._path_in_row)
        column = leaves.index(self._name)
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        chunks = [group.column(column) for group in groups]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        self._bytes = [chunk.total_uncompressed_size for chunk in chunks]
        self.rows = rows = self._ends[-1] if self._ends else 0
        if rows > MAX_COMPRESSION * self.size:
            raise DataError(f"{path}: declares {rows:,} rows in {self.size:,} bytes")
        try:
            check_expansion({self._name: sum(self._bytes)}, self.size)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        # Values that are stored once and repeated by their index stay so: written out, a few bytes become any number.
        if any(encoding.endswith("_DICTIONARY") for chunk in chunks for encoding in chunk.encodings):
            self._indexed = [self._name]

    def __getstate__(self):
        return {**self.__dict__, "_cached": (-1, None)}

    def pieces(self) -> Sequence[int]:
        """Bytes of the text in each row group."""
        return self._bytes

    def numbers(self) -> Iterator[int]:
        """All rows."""
        return iter(range(self.rows or 0))

    def entries(self, piece: int) -> Iterator[Entry]:
        """The rows of a row group."""
        first = row = self._ends[piece - 1] if piece else 0
        with self._decoding(f"row group {piece}", StorageError), self._open() as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[piece], columns=[self._name], use_threads=False):
                for value in innermost(batch.column(0), self._path_in_row):
                    yield Entry(row, row, value)
                    row += 1
        self._check_rows(piece, row - first)

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The rows from one on."""
        for row in range(place, self.rows or 0):
            group = bisect.bisect_right(self._ends, row)
            yield Entry(row, row, self._column(group)[row - (self._ends[group - 1] if group else 0)])

    def text(self, entry: Entry) -> str:
        """The text column of a row."""
        with self._decoding(f"row {entry.number}", StorageError):  # an index may lead beyond the values
            return text_of_row(self, entry.number, entry.content)

    def _column(self, group: int) -> Any:
        cached, column = self._cached  # read once: another thread may replace the pair meanwhile
        if cached != group:
            with self._decoding(f"row group {group}", StorageError), self._open() as file:
                column = innermost(file.read_row_group(group, columns=[self._name]).column(0), self._path_in_row)
            self._check_rows(group, len(column))
            self._cached = (group, column)
        return column

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(storage.source(self.path), memory_map=False, read_dictionary=self._indexed)

    def _check_rows(self, group: int, found: int) -> None:
        rows = self._ends[group] - (self._ends[group - 1] if group else 0)
        if found != rows:
            raise StorageError(f"{self.path}: row group {group}: holds {found:,} rows, not {rows:,}")

    @contextlib.contextmanager
    def _decoding(self, what: str, error_type: type[Exception]) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for names of columns
            if isinstance(error, OSError) and error.errno is not None:
                raise StorageError(f"{self.path}: {error.strerror or error}") from error
            raise error_type(f"{self.path}: {what}: {str(error).splitlines()[0]}") from error


TsvFile = functools.partial(CsvFile, separator="\t")
