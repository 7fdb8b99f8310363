"""The records of files in their order, each with its place, so that reading can go on where it was left.

A record becomes one document at the most: a text or a part of one, a line of JSON, a row of a table. Whatever
the size of a file, a piece of it is held at a time: a line, a row group of Parquet, a few megabytes of text.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from data.sources.documents import Document, Record
from data.sources.files import SourceFile

PART_CHARS = 2**16  # texts beyond are cut into several documents
MAX_LINE_BYTES = 2**26
CHUNK_BYTES = 2**22
EXTRA = "pip install -r requirements-extra.txt"
PARQUET, ZSTANDARD = ".parquet", ".zst"


class Records:
    """Iterates over the records of `files` behind `start` = (file, how many of its records are done).

    With a `column` they are JSON lines or Parquet, by their names; else texts, cut beyond `part_chars`.
    `done_bytes` is how much of the files was read. Raises ValueError for a file that ends or breaks in the middle.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        column: str | None,
        part_chars: int | None = None,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self._files, self._column, self._part_chars, self._start = files, column, part_chars, start
        self._behind = 0
        self._place: Callable[[], int] = lambda: 0

    @property
    def done_bytes(self) -> int:
        return self._behind + self._place()

    def __iter__(self) -> Iterator[Record]:
        first, done = self._start
        self._behind = sum(file.size for file in self._files[:first])
        for number, file in enumerate(self._files[first:], start=first):
            yield from self._of(number, file, done if number == first else 0)
            self._place, self._behind = (lambda: 0), self._behind + file.size

    def _of(self, number: int, file: SourceFile, done: int) -> Iterator[Record]:
        if self._column is None:
            records = text_records(number, file, self._part_chars)
            return (record for record in records if record.number > done)
        if file.name.endswith(PARQUET):
            return self._rows(number, file, done)
        return self._json_lines(number, file, done)

    def _json_lines(self, file_number: int, file: SourceFile, done: int) -> Iterator[Record]:
        number = 0
        try:
            with closing(self._open(file.path)) as stream:
                while line := stream.readline(MAX_LINE_BYTES):
                    number += 1
                    problem = ""
                    while not line.endswith(b"\n") and (rest := stream.readline(MAX_LINE_BYTES)):
                        problem, line = f"longer than {MAX_LINE_BYTES} bytes", rest
                    if number > done and (problem or not line.isspace()):
                        content = None if problem else line
                        yield Record(file_number, number, f"{file.name}#{number}", content, problem)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"data.paths: {file.path} cannot be read after line {number} ({error}); bring a whole copy: one that "
                "git lfs holds is a pointer of a few lines until git lfs pull"
            ) from None

    def _open(self, path: Path) -> io.BufferedReader:
        raw = open(path, "rb")  # noqa: SIM115
        self._place = lambda: 0 if raw.closed else raw.tell()
        if path.name.endswith(".gz"):
            return _Closing(gzip.GzipFile(fileobj=raw), raw)  # type: ignore[arg-type]
        if path.name.endswith(ZSTANDARD):
            return _Closing(pyarrow().CompressedInputStream(raw, "zstd"), raw)
        return raw

    def _rows(self, file_number: int, file: SourceFile, done: int) -> Iterator[Record]:
        arrow, number = pyarrow(), 0
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(file.path) as table:
                if self._column not in table.schema_arrow.names:
                    names = ", ".join(table.schema_arrow.names)
                    raise ValueError(f"data.column: {file.path} has no {self._column}, but {names}; name one of these")
                total = max(1, table.metadata.num_rows)
                self._place = lambda: file.size * number // total
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if number + rows <= done:
                        number += rows
                        continue
                    for batch in table.iter_batches(256, [group], [self._column]):
                        for text in batch.column(0).to_pylist():
                            number += 1
                            if number > done:
                                yield row_record(file_number, number, file.name, text)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(
                f"data.paths: {file.path} cannot be read after row {number} ({error}); bring a whole copy"
            ) from None


class _Closing(io.BufferedReader):
    """A buffered stream of decompressed bytes that closes what it reads from as well."""

    def __init__(self, stream: Any, raw: io.BufferedReader) -> None:
        super().__init__(stream, 2**20)
        self._below = raw

    def close(self) -> None:
        super().close()
        self._below.close()


def row_record(file: int, number: int, name: str, text: Any) -> Record:
    """A row of a table; its name is the table's and its number, as with lines."""
    problem = "" if isinstance(text, str) and text else "without a text"
    return Record(file, number, f"{name}#{number}", None if problem else text, problem)


def text_records(number: int, file: SourceFile, part_chars: int | None) -> Iterator[Record]:
    """A text file as one record, or, beyond `part_chars`, as parts cut behind line ends; byte for byte."""
    try:
        if file.size > CHUNK_BYTES:
            for _ in _pieces(file.path):  # all of it is UTF-8, or none of it is taken
                pass
        parts = _parts(_pieces(file.path), part_chars)
        first, second = next(parts, ""), next(parts, "")
    except UnicodeDecodeError:
        yield Record(number, 1, file.name, None, "not UTF-8")
        return
    except OSError as error:
        yield Record(number, 1, file.name, None, error.strerror or "unreadable")
        return
    if not second:
        yield Record(number, 1, file.name, first or None, "" if first else "empty")
        return
    for part, text in enumerate((first, second), start=1):
        yield Record(number, part, f"{file.name}#{part}", text)
    for part, text in enumerate(parts, start=3):
        yield Record(number, part, f"{file.name}#{part}", text)


def read_documents(
    files: Iterable[SourceFile], skipped: dict[str, list[str]], part_chars: int | None = None
) -> Iterator[Document]:
    """Yield the files' texts, byte for byte (no newline translation); what is not read goes to `skipped`:
    reason → names. With `part_chars`, longer files are cut into documents `name#1`, `name#2`, …
    """
    for number, file in enumerate(files):
        for record in text_records(number, file, part_chars):
            if record.content is None:
                skipped.setdefault(record.problem, []).append(record.name)
            else:
                yield Document(record.name, str(record.content))


def _pieces(path: Path) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with open(path, "rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield decode(piece)
    yield decode(b"", final=True)


def _parts(pieces: Iterable[str], size: int | None) -> Iterator[str]:
    """The text of `pieces` in parts of at most `size` characters that end, where they can, behind a line end."""
    if size is None:
        yield "".join(pieces)
        return
    text = ""
    for piece in pieces:
        text, start = text + piece, 0
        while len(text) - start > size:
            end = text.rfind("\n", start, start + size) + 1 or start + size
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"data.paths: Parquet and .zst files are read by pyarrow, which is missing: {EXTRA}") from None
    return pyarrow
