"""Documents and records, and the parser that makes the first of the second."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

PAIR, TEXT = "no JSON object with the texts prompt and response", "without a text"


class Record(NamedTuple):
    """The `number`th record (from 1) of the `file`th file (from 0), or, without content, why there is none."""

    file: int
    number: int
    name: str
    content: str | bytes | np.ndarray | None
    problem: str = ""


class Document(NamedTuple):
    """A text and its name; its first `given` characters are a prompt, which is read and not learnt."""

    name: str
    text: str
    given: int = 0


class Batch(NamedTuple):
    """Records, and how many bytes of the files were read up to their end."""

    records: list[Record]
    done_bytes: int


class Parser:
    """What a record holds: a text, or JSON with a text in `column`, or, with `pairs`, with a prompt and a response."""

    def __init__(self, column: str, pairs: bool = False) -> None:
        self.column, self.pairs = column, pairs

    def __call__(self, record: Record) -> Document | str:
        """The record's document, or why there is none."""
        if record.content is None:
            return record.problem
        if isinstance(record.content, np.ndarray):
            return Document(record.name, record.content.tobytes().decode("latin-1"))  # only to be hashed
        if isinstance(record.content, str):
            return Document(record.name, record.content)
        try:
            entry = json.loads(record.content)
            if self.pairs:
                prompt, response = entry["prompt"], entry["response"]
                (prompt + response).encode()
                return Document(record.name, prompt + response, len(prompt)) if response else "without a response"
            text = entry[self.column]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # also what UTF-8 cannot hold
            return PAIR if self.pairs else TEXT
        return Document(record.name, text) if text else TEXT


def digest(document: Document) -> bytes:
    """Of what a document says, whatever its name."""
    prompt = f"\0{document.given}" if document.given else ""
    return hashlib.sha256((document.text + prompt).encode()).digest()
