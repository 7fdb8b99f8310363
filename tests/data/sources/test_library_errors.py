"""No error of a library reaches a user as it is: one message names the key, the file, the line or row, and the fix."""

import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.prepare import prepare
from data.settings import DataSettings
from data.sources.odd_files import find_odd_file
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer

TEXTS = [f"the river number {number} runs to the stone\n" for number in range(30)]
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(TEXTS, path, 290, seed=0)
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def lines(rows) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def parquet(column, name="text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), sink)
    return sink.getvalue().to_pybytes()


def refused(settings) -> str:
    with pytest.raises(ValueError) as error:
        prepare(settings)
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 800, message
    return message


GOOD_LINES, GOOD_PARQUET = lines(ROWS), parquet(TEXTS)

RECORDS = {
    "gz that breaks off": ({"b.jsonl.gz": gzip.compress(GOOD_LINES)[:-20]}, "data.paths: F cannot be read after line"),
    "gz that is none": ({"b.jsonl.gz": GOOD_LINES}, "data.paths: F cannot be read after line 0 (Not a gzipped file"),
    "gz with another byte": (
        {"b.jsonl.gz": gzip.compress(GOOD_LINES)[:40] + b"\xff" * 20 + gzip.compress(GOOD_LINES)[60:]},
        "data.paths: F cannot be read after line",
    ),
    "zst that breaks off": ({"b.jsonl.zst": zstd(GOOD_LINES)[:-20]}, "data.paths: F cannot be read after line"),
    "zst that is none": ({"b.jsonl.zst": GOOD_LINES}, "data.paths: F cannot be read after line 0"),
    "parquet that breaks off": ({"b.parquet": GOOD_PARQUET[:-20]}, "data.paths: F cannot be read after row 0"),
    "parquet that is empty": ({"b.parquet": b""}, "data.paths: F cannot be read after row 0"),
    "parquet with other bytes": (
        {"b.parquet": b"PAR1" + b"\xff" * 60 + GOOD_PARQUET[64:]},
        "data.paths: F cannot be read after row 0",
    ),
    "parquet without the column": (
        {"b.parquet": parquet(TEXTS, "content")},
        "data.column=text: F has no such column; choose one of its columns (content), or leave the file out",
    ),
    "parquet of numbers": ({"b.parquet": parquet([1, 2])}, "data.column=text: in F this column has the type int64"),
    "parquet of structs": (
        {"b.parquet": parquet([{"a": "x"}])},
        "data.column=text: in F this column has the type struct<a: string>",
    ),
    "parquet of lists": ({"b.parquet": parquet([["x"]])}, "data.column=text: in F this column has the type list<"),
    "parquet of bytes": ({"b.parquet": parquet([b"x"])}, "data.column=text: in F this column has the type binary"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_of_records_that_cannot_be_read_is_named(tokenizer, tmp_path, name):
    files, message = RECORDS[name]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_bytes(GOOD_LINES)
    for file, content in files.items():
        (tmp_path / "files" / file).write_bytes(content)
    found = refused(records_settings(tokenizer, tmp_path))
    (file,) = files
    assert found.startswith(message.replace("F", str(tmp_path / "files" / file), 1))


def records_settings(tokenizer, tmp_path):
    return DataSettings(
        source="records", paths=[str(tmp_path / "files")], patterns=["*"], tokenizer=tokenizer, vocab_size=290,
        root=str(tmp_path / "prepared"),
    )  # fmt: skip


COUNTED = {
    "unlike columns": ({"b.jsonl": lines([{"text": "x", "meta": {"url": "y"}}, {"text": "z"}])}, {}),
    "nested, numbers and null": (
        {"b.jsonl": lines([{"text": {"a": "x"}}, {"text": 5}, {"text": None}, {"text": ["x"]}])},
        {"without a text": 4},
    ),
    "a broken line": (
        {"b.jsonl": lines([b'{"text": "cut\n', b"\n", b"[1]\n", b"x" * 9])}, {"not JSON": 2, "without a text": 1},
    ),
    "a number of many digits": ({"b.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n"}, {"not JSON": 1}),
    "nested very deep": ({"b.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n"}, {"not JSON": 1}),
    "parquet with nulls": ({"b.parquet": parquet(["x", None, ""])}, {"without a text": 2}),
    "parquet of nulls alone": ({"b.parquet": parquet(pa.array([None, None]))}, {"without a text": 2}),
    "parquet of categories": ({"b.parquet": parquet(pa.array(["x", "y"]).dictionary_encode())}, {}),
    "parquet of large strings": ({"b.parquet": parquet(pa.array(["x", "y"], pa.large_string()))}, {}),
    "parquet with bytes for text": (
        {"b.parquet": parquet(pa.array([b"x", b"\xff", b"y"]).view(pa.string()))},
        {"not UTF-8": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_rows_that_differ_are_taken_or_counted(tokenizer, tmp_path, name):
    files, skipped = COUNTED[name]
    (tmp_path / "files").mkdir()
    for file, content in {"a.jsonl": GOOD_LINES, **files}.items():
        (tmp_path / "files" / file).write_bytes(content)
    corpus = prepare(records_settings(tokenizer, tmp_path)).manifest["corpus"]
    assert corpus["skipped_counts"] == skipped


DATASETS = {
    "unlike columns": (
        {"b.jsonl": lines([{"text": "x", "meta": {"url": "y"}}])},
        "b.jsonl, line 1, has other columns than the data before it (meta); fix or replace that file",
    ),
    "fewer columns": (
        {"a.jsonl": lines([{"text": "x", "meta": {"url": "y"}}]), "b.jsonl": lines([{"other": "x"}] * 9)},
        "b.jsonl, line 1, has other columns than the data before it (",
    ),
    "a broken line": ({"b.jsonl": lines([*ROWS, b'{"text": "cut\n'])}, "b.jsonl, line 31, is not JSON in UTF-8 ("),
    "a broken first line": ({"a.jsonl": lines([b'{"text"\n', *ROWS])}, "a.jsonl, line 1, is not JSON in UTF-8 ("),
    "another encoding": ({"b.jsonl": lines([b'{"text": "\xe9"}\n'])}, "b.jsonl, line 1, is not JSON in UTF-8 ("),
    "utf-16": ({"b.jsonl": GOOD_LINES.decode().encode("utf-16")}, "b.jsonl is UTF-16, but the library needs UTF-8"),
    "lines that are lists": ({"a.jsonl": lines([[1, 2]])}, "data."),
    "gz that breaks off": ({"b.jsonl.gz": gzip.compress(GOOD_LINES)[:-20]}, "b.jsonl.gz cannot be read after line"),
    "numbers": (
        {"a.jsonl": lines([{"text": 1}])},
        "data.column=text: in D this column has the type Value('int64'); choose one of text",
    ),
    "nested": (
        {"a.jsonl": lines([{"text": {"a": "x"}}])},
        "data.column=text: in D this column has the type {'a': Value('string')}; choose one of text",
    ),
    "another column": (
        {"a.jsonl": lines([{"content": "x"}])},
        "data.column=text: D has no such column; choose one of its columns (content)",
    ),
    "parquet that breaks off": ({"a.parquet": GOOD_PARQUET[:-20]}, "a.parquet cannot be read after row 0 ("),
    "parquet of unlike columns": (
        {"a.parquet": GOOD_PARQUET, "b.parquet": parquet([1, 2], "other")},
        "b.parquet has other columns than the data before it (text, other); fix or replace that file",
    ),
    "csv in another encoding": ({"a.csv": b"text\nx\n\xe9\n"}, "a.csv, line 3, is not UTF-8; fix or replace that file"),
    "no rows": ({"a.jsonl": b""}, "data.dataset: D cannot be read (it has no rows); "),
    "files of no known kind": ({"a.jsonl": None, "a.xyz": b"x"}, "data.dataset: D cannot be "),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_cannot_be_read_is_one_message(tokenizer, tmp_path, name, streaming, capfd, caplog):
    caplog.set_level(logging.ERROR)
    folder = tmp_path / "dataset"
    folder.mkdir()
    files, message = DATASETS[name]
    own = {} if any(file.endswith(("parquet", "csv")) for file in files) else {"a.jsonl": GOOD_LINES}
    for file, content in {**own, **files}.items():
        if content is not None:
            (folder / file).write_bytes(content)
    settings = DataSettings(
        source="datasets", dataset=str(folder), streaming=streaming, tokenizer=tokenizer, vocab_size=290,
        root=str(tmp_path / "prepared"),
    )  # fmt: skip
    found = refused(settings)
    assert found.startswith("data.") and str(folder) in found
    assert message.replace("D ", f"{folder} ") in found
    assert capfd.readouterr() == ("", "") and caplog.messages == []


def test_a_dataset_of_a_folder_that_is_called_like_a_builder_is_the_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").write_bytes(GOOD_LINES)
    settings = DataSettings(
        source="datasets", dataset="json", tokenizer=tokenizer, vocab_size=290, root=str(tmp_path / "prepared")
    )
    assert prepare(settings).manifest["corpus"]["documents"] == len(TEXTS)


@pytest.mark.parametrize("file", ["a.csv", "a.json"])
def test_a_tokenizer_is_trained_on_the_rows_of_a_dataset_of_any_kind(tmp_path, file):
    (tmp_path / "dataset").mkdir()
    content = json.dumps(ROWS, indent=1) if file == "a.json" else "text\n" + "".join(TEXTS)
    (tmp_path / "dataset" / file).write_text(content)
    settings = DataSettings(
        source="datasets", dataset=str(tmp_path / "dataset"), vocab_size=290, root=str(tmp_path / "prepared")
    )
    assert prepare(settings).manifest["corpus"]["documents"] == len(TEXTS)


def test_the_first_file_of_a_kind_with_other_columns_is_found(tmp_path):
    """A file that cannot be read comes before all that can; null and a missing value have any type."""
    contents = {
        "a.csv": b"text,url\nx,y\n", "b.csv": b'text,"url"\n', "c.jsonl": lines([{"other": 1}, {"other": None}]),
        "d.json": b'[\n{"text": "x"}\n]', "e.parquet": GOOD_PARQUET, "f.bin": b"\xff",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert find_odd_file(tmp_path) == ""
    (tmp_path / "g.csv").write_bytes(b"text,more\nx,y\n")
    expected = f"{tmp_path}/g.csv, line 1, has other columns than the data before it (url, more)"
    assert find_odd_file(tmp_path) == expected
    (tmp_path / "h.jsonl").write_bytes(lines([{"other": "x"}]))
    assert find_odd_file(tmp_path) == expected
    (tmp_path / "i.tsv").write_bytes("é".encode("latin-1"))
    assert find_odd_file(tmp_path) == f"{tmp_path}/i.tsv, line 1, is not UTF-8"
    assert find_odd_file(tmp_path / "nowhere") == ""


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data-00000-of-00001.arrow", b"cut", "D/data-00000-of-00001.arrow cannot be read after row 0 ("),
        ("data-00000-of-00001.arrow", None, "No such file or directory: 'D/data-00000-of-00001.arrow'"),
        ("state.json", b"{", "(JSONDecodeError: "),
        ("dataset_info.json", None, "cannot be read ("),
    ],
)
def test_a_saved_dataset_that_is_damaged_is_one_message(tokenizer, tmp_path, file, content, message, streaming):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    settings = DataSettings(
        source="datasets", dataset=str(folder), streaming=streaming, tokenizer=tokenizer, vocab_size=290,
        root=str(tmp_path / "prepared"),
    )  # fmt: skip
    found = refused(settings)
    assert found.startswith(f"data.dataset: {folder} cannot be read") and message.replace("D/", f"{folder}/") in found


TOKENIZERS = {
    "nothing": b"", "text": b"not a model", "zeros": b"\0" * 100, "an open brace": b"{", "another object": b"{}",
    "a list": b"[1]", "nested very deep": b'{"a":' * 100_000, "half of a character": b"{\xff",
    "an unknown model": b'{"model": {"type": "Other"}}', "a model without pieces": b'{"model": {"type": "BPE"}}',
    "merges without pieces": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    "an unknown step": b'{"normalizer": {"type": "X"}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name):
    (tmp_path / "t.model").write_bytes(TOKENIZERS[name])
    with pytest.raises(ValueError) as error:
        Tokenizer(tmp_path / "t.model")
    assert str(error.value).startswith(f"{tmp_path / 't.model'} is not a ") and len(str(error.value)) < 500


def test_a_text_that_a_tokenizer_fails_on_is_an_error_with_its_file(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}})
    )
    for path, eos, text in ((tmp_path / "tokenizer.json", "a", "b"), (tokenizer, None, "\ud800")):
        with pytest.raises(ValueError, match=rf"{path} cannot encode a text \("):
            Tokenizer(path, eos=eos).encode(text)
