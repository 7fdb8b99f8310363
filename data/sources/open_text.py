"""Open text files, plain or compressed, as UTF-8."""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from data.text_encoding import BLOCK_BYTES, Utf8Reader

EXTRA = ".venv/bin/pip install -r requirements-extra.txt"
COMPRESSED = (".gz", ".zst")
READ_ERRORS = (EOFError, OSError, zlib.error)  # of files, gzip and zstd; pyarrow's errors of streams are OSError


class TextFile(io.BufferedReader):
    """A text file as UTF-8 bytes without a byte-order mark; `.gz` and `.zst` are decompressed.

    `encoding` and `problem` are those of ``Utf8Reader``.

    Raises:
        ValueError: The file is .zst, and pyarrow is not installed.
        EOFError, OSError, zlib.error: The file cannot be read or decompressed, now or when it is read later.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            reader = Utf8Reader(self._decompressed(path))
        except BaseException:
            self._file.close()
            raise
        super().__init__(reader, BLOCK_BYTES)
        self.encoding, self.problem = reader.encoding, reader.problem

    def place(self) -> int:
        """The number of bytes read so far from the file on disk, which may be compressed."""
        return 0 if self._file.closed else self._file.tell()

    def close(self) -> None:
        super().close()
        self._file.close()

    def _decompressed(self, path: Path) -> Any:
        if path.name.endswith(".gz"):
            return gzip.GzipFile(fileobj=self._file)
        if path.name.endswith(".zst"):
            return pyarrow().CompressedInputStream(self._file, "zstd")
        return self._file


def reason(error: Exception) -> str:
    """The first line of an error, without Python's error number."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0][:300]


def pyarrow() -> Any:
    """The library pyarrow. Raises ValueError if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"data.paths: Parquet and .zst need pyarrow, which is not installed; run {EXTRA}") from None
    return pyarrow
