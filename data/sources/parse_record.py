"""Parse a record, such as a line of JSON, into a document."""

import json

import numpy as np

from data.sources.documents import LONE_SURROGATE, NO_RESPONSE, NO_TEXT, NOT_JSON, NOT_UTF8, PAIR, Document, Record


class Parser:
    """Converts records to documents.

    The text of a line of JSON is the value of the key `column`. With `pairs`, it is the value of `prompt` followed by
    the value of `response`.
    """

    def __init__(self, column: str, pairs: bool = False) -> None:
        self.column, self.pairs = column, pairs

    def __call__(self, record: Record) -> Document | str:
        """The record's document, or the reason why there is none."""
        if record.content is None:
            return record.problem
        if isinstance(record.content, np.ndarray):
            return Document(record.name, record.content.tobytes().decode("latin-1"))  # only to be hashed
        if isinstance(record.content, str):
            return Document(record.name, record.content)
        return self._parse_line(record.name, record.content)

    def _parse_line(self, name: str, line: bytes) -> Document | str:
        try:
            entry = json.loads(line.decode().removeprefix("\ufeff"))  # `cat` of several files leaves marks in lines
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
