"""Counts in messages."""

from data.token_dataset import describe
from data.wording import counted


def test_one_thing_has_no_plural():
    assert [counted(n, "batch", "es") for n in (0, 1, 2048)] == ["0 batches", "1 batch", "2,048 batches"]


def test_a_split_of_one_document_says_so(tmp_path):
    sizes = {"tokens": 20, "bytes": 40}
    splits = {"train": {"documents": 3, **sizes}, "val": {"documents": 1, **sizes}}
    line = describe({"splits": splits, "tokenizer": {"vocab_size": 300}}, tmp_path)
    assert "of 3 documents (" in line and "of 1 document (" in line
