"""Records (units of reading), documents (units of tokenization), and the reasons why a record is skipped."""

import hashlib
from typing import NamedTuple

import numpy as np

PAIR = "not a JSON object with the texts prompt and response"
NO_TEXT, NO_RESPONSE, NOT_JSON = "without a text", "without a response", "not JSON"
NOT_UTF8, LONE_SURROGATE = "not UTF-8", "with half of a surrogate pair"


class Record(NamedTuple):
    """Record `number` (from 1) of file `file` (from 0).

    `content` is a text (str), a line of JSON in UTF-8 (bytes), or tokens (n,) int32. If it is None, `problem`
    is the reason, such as "not UTF-8".
    """

    file: int
    number: int
    name: str
    content: str | bytes | np.ndarray | None
    problem: str = ""


class Document(NamedTuple):
    """A text and its name. The first `given` characters are a prompt: inputs, but not targets."""

    name: str
    text: str
    given: int = 0


class Batch(NamedTuple):
    """Consecutive records, and the number of bytes of the corpus read up to the last record."""

    records: list[Record]
    done_bytes: int


def digest(document: Document) -> bytes:
    """SHA-256 (32 bytes) of a document's text and the length of its prompt, without its name."""
    prompt = f"\0{document.given}" if document.given else ""
    return hashlib.sha256((document.text + prompt).encode()).digest()
