"""Records as they are read, documents as they are tokenised, and the reasons why a record is left out."""

import hashlib
from typing import NamedTuple

import numpy as np

PAIR = "no JSON object with the texts prompt and response"
NO_TEXT, NO_RESPONSE, NOT_JSON = "without a text", "without a response", "not JSON"
NOT_UTF8, LONE_SURROGATE = "not UTF-8", "with half of a surrogate pair"


class Record(NamedTuple):
    """Record `number` (from 1) of file `file` (from 0). Where `content` is None, `problem` says why.

    `content` is a text, a line of JSON in UTF-8, or tokens (n,) int32.
    """

    file: int
    number: int
    name: str
    content: str | bytes | np.ndarray | None
    problem: str = ""


class Document(NamedTuple):
    """A text and its name. The first `given` characters are a prompt: they are input and never a target."""

    name: str
    text: str
    given: int = 0


class Batch(NamedTuple):
    """Consecutive records, and the number of bytes of the corpus that were read up to the last of them."""

    records: list[Record]
    done_bytes: int


def digest(document: Document) -> bytes:
    """SHA-256 (32 bytes) of a document's text and of where its prompt ends; the name is left out."""
    prompt = f"\0{document.given}" if document.given else ""
    return hashlib.sha256((document.text + prompt).encode()).digest()
