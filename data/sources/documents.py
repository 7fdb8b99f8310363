"""Records as they are read, documents as they are tokenised, and the parser from records to documents."""

import hashlib
import json
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


class Parser:
    """Makes documents of records.

    The text of a line of JSON is under the key `column`; with `pairs` it is the text under `prompt` followed by the
    text under `response`.
    """

    def __init__(self, column: str, pairs: bool = False) -> None:
        self.column, self.pairs = column, pairs

    def __call__(self, record: Record) -> Document | str:
        """The record's document, or the reason why it has none."""
        if record.content is None:
            return record.problem
        if isinstance(record.content, np.ndarray):
            return Document(record.name, record.content.tobytes().decode("latin-1"))  # only to be hashed
        if isinstance(record.content, str):
            return Document(record.name, record.content)
        return self._parse_line(record.name, record.content)

    def _parse_line(self, name: str, line: bytes) -> Document | str:
        try:
            entry = json.loads(line.decode().removeprefix("\ufeff"))  # a mark stands here after `cat` of several files
        except UnicodeDecodeError:
            return NOT_UTF8
        except (ValueError, RecursionError):
            return PAIR if self.pairs else NOT_JSON
        try:
            prompt = entry["prompt"] if self.pairs else ""
            text = entry["response" if self.pairs else self.column]
            (prompt + text).encode()
        except (KeyError, TypeError, AttributeError):
            return PAIR if self.pairs else NO_TEXT
        except UnicodeEncodeError:
            return LONE_SURROGATE
        if not text:
            return NO_RESPONSE if self.pairs else NO_TEXT
        return Document(name, prompt + text, len(prompt))


def digest(document: Document) -> bytes:
    """SHA-256 (32 bytes) of a document's text and of where its prompt ends; the name is left out."""
    prompt = f"\0{document.given}" if document.given else ""
    return hashlib.sha256((document.text + prompt).encode()).digest()
