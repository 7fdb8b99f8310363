"""Text files are decoded by their byte-order mark, or else as UTF-8.

A byte-order mark is the character U+FEFF at the beginning of a file (The Unicode Standard, section 23.8). It identifies
the encoding and is not part of the text.
"""

import codecs
import io
from typing import Any, BinaryIO

MARKS = (  # UTF-32 before UTF-16, because its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
HEAD_BYTES, BLOCK_BYTES = 2**12, 2**20
COMPRESSED = {
    b"\x1f\x8b": "compressed with gzip, but its name does not end in .gz",
    b"(\xb5/\xfd": "compressed with zstd, but its name does not end in .zst",
    b"\xfd7zXZ\0": "compressed with xz, which is not supported",
    b"BZh91AY&SY": "compressed with bzip2, which is not supported",
    b"PK\x03\x04": "a zip archive, which is not supported",
}
UNMARKED = "UTF-16 or UTF-32 without a byte-order mark"
UNDECODABLE = "\udcff".encode("utf-8", "surrogatepass")  # bytes that do not occur in valid UTF-8
codecs.register_error("grass.undecodable", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def detect(head: bytes) -> tuple[str, int]:
    """The encoding and the length of the byte-order mark with which `head` begins; ("utf-8", 0) without a mark."""
    return next(((name, len(mark)) for mark, name in MARKS if head.startswith(mark)), ("utf-8", 0))


def head_problem(head: bytes) -> str:
    """Why a file that begins with `head` is not text; "" if `head` shows no reason."""
    packed = next((problem for begin, problem in COMPRESSED.items() if head.startswith(begin)), "")
    return packed or (UNMARKED if not detect(head)[1] and _is_unmarked(head) else "")


def _is_unmarked(head: bytes) -> bool:
    """Whether bytes without a byte-order mark look like UTF-16 or UTF-32, because too many bytes are NUL.

    Latin letters in UTF-16 are valid UTF-8 with a NUL next to every letter, so decoding does not detect the mistake.
    """
    seldom, often = sorted([head[::2].count(0), head[1::2].count(0)])
    one_side = 5 * often >= len(head) and 20 * seldom <= often
    return len(head) > 3 and (one_side or 5 * (seldom + often) >= 3 * len(head))


def decode(content: bytes) -> str:
    """The text of a complete file, without its byte-order mark. Raises UnicodeDecodeError if it is not text."""
    name, skip = detect(content)
    return content[skip:].decode(name)


class Utf8Reader(io.RawIOBase):
    """The text in a binary stream as UTF-8 bytes, without its byte-order mark. Closing the reader closes the stream.

    UTF-8 is passed on unchecked. Invalid parts of UTF-16 and UTF-32 become bytes that are not valid UTF-8, so that
    decoding the result fails. `encoding` is "UTF-8", "UTF-16" or "UTF-32". `problem` is empty, or the reason why the
    stream is not text.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._ended, head = stream, False, b""
        while len(head) < HEAD_BYTES and (block := stream.read(HEAD_BYTES - len(head))):
            head += block
        name, skip = detect(head)
        self.encoding = name.upper().removesuffix("-LE").removesuffix("-BE")
        self.problem = head_problem(head)
        self._decoder = None if name == "utf-8" else codecs.getincrementaldecoder(name)("grass.undecodable")
        self._ready = memoryview(self._convert(head[skip:]))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._stream.read(BLOCK_BYTES)
            self._ended = not block
            self._ready = memoryview(self._convert(block, final=self._ended))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        super().close()
        self._stream.close()

    def _convert(self, block: bytes, final: bool = False) -> bytes:
        if self._decoder is None:
            return block
        return self._decoder.decode(block, final).encode("utf-8", "surrogatepass")
