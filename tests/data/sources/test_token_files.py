"""Tokens of another program come in as the documents they are, in files of any kind; what is none is named."""

from dataclasses import replace

import numpy as np
import pytest

from data.prepare import prepare, problems
from data.settings import DataSettings
from data.sources import token_files
from data.sources.files import stdlib_files
from data.sources.records import read_documents
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, and the documents of a corpus as it gives them."""
    folder = tmp_path_factory.mktemp("tokens")
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 20_000][:40]
    texts = [document.text for document in read_documents(files, {})]
    tokenizer = train_tokenizer(texts, folder / "t.model", 400, seed=0)
    return tokenizer, [np.array(tokenizer.encode(text)) for text in texts]


def settings(made, tmp_path, **changes):
    usual = DataSettings(
        name="tokens", source="tokens", paths=[str(tmp_path / "files")], patterns=["*.bin", "*.npy"],
        tokenizer=str(made[0].path), vocab_size=400, validation_share=0.2, root=str(tmp_path / "prepared"),
    )  # fmt: skip
    return replace(usual, **changes)


def stream(made, with_bos=True) -> np.ndarray:
    tokenizer, documents = made
    begin = [tokenizer.bos_id] if with_bos else []
    return np.concatenate([np.array([*begin, *ids, tokenizer.eos_id]) for ids in documents])


def documents(prepared) -> list[list[int]]:
    splits = (prepared.train, prepared.val)
    return sorted(split.document(i).tolist() for split in splits for i in range(split.document_count))


def write(tmp_path, name, tokens):
    (tmp_path / "files").mkdir(exist_ok=True)
    np.save(tmp_path / "files" / name, tokens) if name.endswith("npy") else tokens.tofile(tmp_path / "files" / name)


@pytest.mark.parametrize("chunk", [2**22, 997])
@pytest.mark.parametrize(("name", "dtype"), [("a.npy", "int64"), ("a.bin", "uint16"), ("a.bin", "uint32")])
def test_documents_are_what_lies_between_eos(made, tmp_path, name, dtype, chunk, monkeypatch):
    monkeypatch.setattr(token_files, "CHUNK", chunk)
    for number, with_bos in enumerate((True, False)):
        write(tmp_path, f"{number}{name}", stream(made, with_bos).astype(dtype))
    prepared = prepare(settings(made, tmp_path, token_dtype=dtype))
    tokenizer, own = made
    expected = sorted([tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id] for ids in own)
    assert documents(prepared) == sorted(expected * 2)
    entry = prepared.manifest["splits"]["train"]
    assert entry["bytes"] == int(tokenizer.token_bytes[prepared.train[0 : len(prepared.train)]].sum())


def test_a_preparations_own_shards_can_be_taken_over(made, tmp_path):
    write(tmp_path, "a.bin", stream(made).astype("uint16"))
    first = prepare(settings(made, tmp_path))
    again = prepare(settings(made, tmp_path, paths=[str(first.folder / "*.bin")], name="again"))
    assert documents(again) == documents(first)


def test_what_is_longer_than_a_document_can_be_becomes_several(made, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "LONGEST", 100)
    monkeypatch.setattr(token_files, "CHUNK", 70)
    ids = np.concatenate(made[1])
    write(tmp_path, "a.bin", ids.astype("uint16"))
    records = token_files.TokenRecords(files(tmp_path), "uint16", Tokenizer(made[0].path))
    parts = [record.content for record in records]
    assert np.array_equal(np.concatenate(parts), ids) and {len(part) for part in parts[:-1]} == {100}
    some = list(token_files.TokenRecords(files(tmp_path), "uint16", Tokenizer(made[0].path), start=(0, 7)))
    assert [r.name for r in some][:1] == ["files/a.bin#8"] and np.array_equal(some[0].content, parts[7])


def files(tmp_path):
    from data.sources.files import text_files

    return text_files([str(tmp_path / "files")], ["*"], 10**9)


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("a.bin", np.array([5, 400, 7], "uint16"), r"holds token 400, which .*t\.model does not have"),
        ("a.npy", np.array([5, -1, 7]), r"holds token -1, which .*t\.model does not have"),
        ("a.bin", np.array([5, 7, 9], "uint8"), r"is not an array of tokens \(a\.bin: its size of 3 bytes"),
        ("a.npy", np.array([[5, 7]]), r"is not an array of tokens .* is not one-dimensional"),
        ("a.npy", np.array([0.5]), r"is not an array of tokens .* is not an integer type"),
        ("a.npy", np.array([{}], dtype=object), r"a\.npy is not an array of tokens"),
    ],
)
def test_what_holds_no_tokens_is_named(made, tmp_path, name, tokens, message):
    write(tmp_path, name, tokens)
    with pytest.raises(ValueError, match=message):
        prepare(settings(made, tmp_path))


def test_the_tokenizer_and_the_type_are_asked_for(made, tmp_path):
    write(tmp_path, "a.bin", stream(made).astype("uint16"))
    assert problems(settings(made, tmp_path, tokenizer=None))[0].startswith(
        "data.tokenizer: is not set; name the token"
    )
    assert problems(settings(made, tmp_path, token_dtype="float32"))[0].startswith("data.token_dtype: float32 is un")
