"""The texts in a column of Parquet files."""

from collections.abc import Iterator
from typing import Any

from data.sources.documents import NO_TEXT, NOT_UTF8, Record
from data.sources.files import SourceFile
from data.sources.open_text import pyarrow, reason

BATCH_ROWS = 256


class ParquetRows:
    """Yields a `Record` for each row of a Parquet file after the first `done` rows, reading 256 rows at a time.

    Args:
        number: The number of the file in the corpus, from 0.
        column: The column with the texts.
        done: The number of rows to skip.

    Raises:
        ValueError: The file is damaged, or `column` is missing or has another type; the message names the file. Or
            pyarrow is not installed.
    """

    def __init__(self, number: int, file: SourceFile, column: str, done: int) -> None:
        self._number, self._file, self._column, self._done = number, file, column, done
        self._row, self._rows = 0, 1

    def place(self) -> int:
        """The approximate number of bytes read so far."""
        return self._file.size * self._row // self._rows

    def __iter__(self) -> Iterator[Record]:
        arrow = pyarrow()
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self._file.path) as table:
                self._check(table.schema_arrow)
                self._rows = max(1, table.metadata.num_rows)
                for group in range(table.num_row_groups):
                    yield from self._group(table, group)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(
                f"data.paths: {self._file.path} cannot be read after row {self._row} ({reason(error)}); replace it "
                "with a complete copy"
            ) from None

    def _check(self, schema: Any) -> None:
        if self._column not in schema.names:
            names = ", ".join(schema.names)
            raise ValueError(
                f"data.column={self._column}: {self._file.path} has no such column; choose one of its columns "
                f"({names}), or leave the file out of data.paths"
            )
        kind = schema.field(self._column).type
        if not holds_text(kind):
            raise ValueError(
                f"data.column={self._column}: in {self._file.path} this column has the type {kind}; choose one of text"
            )

    def _group(self, table: Any, group: int) -> Iterator[Record]:
        rows = table.metadata.row_group(group).num_rows
        if self._row + rows <= self._done:
            self._row += rows
            return
        for batch in table.iter_batches(BATCH_ROWS, [group], [self._column]):
            for text in _texts(batch.column(0)):
                self._row += 1
                if self._row > self._done:
                    yield row_record(self._number, self._row, self._file.name, text)


def holds_text(kind: Any) -> bool:
    """Whether a column of this Arrow type contains texts, or only nulls."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = (types.is_string, types.is_large_string, getattr(types, "is_string_view", types.is_string), types.is_null)
    return any(holds(kind) for holds in texts)


def row_record(file: int, number: int, name: str, text: Any) -> Record:
    """Row `number` (from 1) of a table as a record of file number `file`, without content if it has no text.

    `name` is that of the table. `text` is the row's value, or bytes if the value is not valid UTF-8.
    """
    problem = NOT_UTF8 if isinstance(text, bytes) else "" if isinstance(text, str) and text else NO_TEXT
    return Record(file, number, f"{name}#{number}", None if problem else text, problem)


def _texts(column: Any) -> list[Any]:
    """The values of a column; values that are not valid UTF-8 are bytes, because Arrow does not check them."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text(value) for value in column]


def _text(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""
