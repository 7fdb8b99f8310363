"""One corpus in many formats is the same documents and the same tokens; what cannot be read is named or counted."""

import gzip
import json
import os
import sys
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.prepare import prepare, problems
from data.settings import DataSettings
from data.sources import records
from data.sources.files import stdlib_files
from data.sources.records import read_documents
from data.train_tokenizer import train_tokenizer

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def texts() -> list[str]:
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 20_000][:60]
    return [document.text for document in read_documents(files, {})]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(texts, path, VOCAB_SIZE, seed=0)
    return str(path)


def lines(texts) -> bytes:
    return "".join(json.dumps({"url": "http://a", "text": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def write_json(folder, texts):
    (folder / "a.jsonl").write_bytes(lines(texts[:20]))
    (folder / "b.json").write_bytes(lines(texts[20:]))


def write_gz(folder, texts):
    members = gzip.compress(lines(texts[:20])) + gzip.compress(lines(texts[20:40]))  # as `cat` makes one file of two
    (folder / "a.json.gz").write_bytes(members)
    (folder / "b.json.gz").write_bytes(gzip.compress(lines(texts[40:])))


def write_zst(folder, texts):
    (folder / "a.jsonl.zst").write_bytes(zstd(lines(texts[:20])) + zstd(lines(texts[20:])))


def write_parquet(folder, texts):
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)


def write_text(folder, texts):
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())


FORMATS = {"json": write_json, "gz": write_gz, "zst": write_zst, "parquet": write_parquet, "text": write_text}


def settings(tmp_path, tokenizer, **changes) -> DataSettings:
    usual = DataSettings(
        name="own",
        source="records",
        paths=[str(tmp_path / "corpus")],
        patterns=["*"],
        tokenizer=tokenizer,
        vocab_size=VOCAB_SIZE,
        validation_share=0.2,
        root=str(tmp_path / "prepared"),
    )
    return replace(usual, **changes)


def streams(prepared) -> list[list[int]]:
    return [split[0 : len(split)].tolist() for split in (prepared.train, prepared.val)]


@pytest.fixture(scope="module")
def reference(texts, tokenizer, tmp_path_factory):
    """The token streams of the corpus as text files."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "corpus").mkdir()
    write_text(folder / "corpus", texts)
    return streams(prepare(settings(folder, tokenizer, source="text")))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_tokens(form, texts, tokenizer, reference, tmp_path):
    (tmp_path / "corpus").mkdir()
    FORMATS[form](tmp_path / "corpus", texts)
    source = "text" if form == "text" else "records"
    for workers, shard_tokens in ((1, 2**28), (2, 3000)):
        found = prepare(settings(tmp_path, tokenizer, source=source, workers=workers, shard_tokens=shard_tokens))
        assert streams(found) == reference
        assert found.manifest["corpus"]["documents"] == len(texts)


def test_c4s_own_files_give_the_same_tokens(texts, tokenizer, tmp_path):
    """Its validation file is held out instead of a share: the documents, in the order of the files, are all there."""
    (tmp_path / "corpus").mkdir()
    for name, part in (("c4-train.00000-of-01024", texts[:50]), ("c4-validation.00000-of-00008", texts[50:])):
        (tmp_path / "corpus" / f"{name}.json.gz").write_bytes(gzip.compress(lines(part)))
    prepared = prepare(settings(tmp_path, tokenizer, source="c4"))
    for split, part in ((prepared.train, texts[:50]), (prepared.val, texts[50:])):
        tokens = [split.document(i) for i in range(split.document_count)]
        assert [prepared.tokenizer.decode(ids) for ids in tokens] == part


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["saved", "files"])
def test_a_dataset_of_hugging_faces_gives_the_same_tokens(kind, streaming, texts, tokenizer, reference, tmp_path):
    folder = tmp_path / "corpus"
    if kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
    else:
        folder.mkdir()
        write_parquet(folder, texts)
    own = settings(tmp_path, tokenizer, source="datasets", paths=[], dataset=str(folder), streaming=streaming)
    assert streams(prepare(own)) == reference


def test_a_dataset_that_cannot_be_had_is_one_clear_message(tokenizer, tmp_path, monkeypatch):
    own = settings(tmp_path, tokenizer, source="datasets", paths=[], dataset=str(tmp_path / "nobody" / "here"))
    with pytest.raises(ValueError, match=r"data\.dataset: .*nobody/here"):
        prepare(own)

    def unreachable(*arguments, **more):
        raise ConnectionError("Couldn't reach 'nobody/here' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"data\.dataset: nobody/here cannot be loaded .* check the name and"):
        prepare(replace(own, dataset="nobody/here"))
    assert problems(replace(own, dataset=None))[0].startswith("data.dataset: ")
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"content": ["a", "b"]}).save_to_disk(folder)
    with pytest.raises(
        ValueError, match=r"data\.column=text: .* has no such column; choose one of its columns \(content\)"
    ):
        prepare(replace(own, dataset=str(folder)))


def test_lines_without_a_text_are_counted_and_named_and_nothing_else_is_lost(texts, tokenizer, tmp_path, caplog):
    (tmp_path / "corpus").mkdir()
    bad = [b'{"text": ', b"[1]", b'{"text": 5}', b'{"text": ""}', b'{"no": "a"}', b"\xff\xfe", b'{"text": "\\ud800"}']
    bad += [b"[" * 100_000]
    content = b"".join(line + b"\n" for pair in zip(lines(texts).splitlines(), bad, strict=False) for line in pair)
    (tmp_path / "corpus" / "a.jsonl").write_bytes(content)
    prepared = prepare(settings(tmp_path, tokenizer))
    assert prepared.manifest["corpus"]["documents"] == len(bad)
    assert prepared.manifest["corpus"]["skipped"] == {
        "not JSON": ["corpus/a.jsonl#2", "corpus/a.jsonl#16"],
        "without a text": [f"corpus/a.jsonl#{line}" for line in (4, 6, 8, 10)],
        "not UTF-8": ["corpus/a.jsonl#12"],
        "with half of a surrogate pair": ["corpus/a.jsonl#14"],
    }
    counts = prepared.manifest["corpus"]["skipped_counts"]
    assert counts == {"not JSON": 2, "without a text": 4, "not UTF-8": 1, "with half of a surrogate pair": 1}
    assert "4 without a text (corpus/a.jsonl#4" in caplog.text
    with pytest.raises(ValueError, match=r"no document was found .*without a text.*check data\.paths and data\.column"):
        prepare(settings(tmp_path, tokenizer, column="content"))


def test_a_line_beyond_all_measure_is_skipped_without_being_held(texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100_000)
    (tmp_path / "corpus").mkdir()
    rows = lines(texts).splitlines(keepends=True)
    (tmp_path / "corpus" / "a.jsonl").write_bytes(rows[0] + b"x" * 1_000_000 + b"\n" + b"".join(rows[1:]))
    prepared = prepare(settings(tmp_path, tokenizer))
    assert prepared.manifest["corpus"]["documents"] == len(texts)
    assert prepared.manifest["corpus"]["skipped"] == {"longer than 100000 bytes": ["corpus/a.jsonl#2"]}


@pytest.mark.parametrize("form", ["gz", "zst", "parquet"])
def test_a_file_cut_short_is_named_and_nothing_is_left(form, texts, tokenizer, tmp_path):
    (tmp_path / "corpus").mkdir()
    FORMATS[form](tmp_path / "corpus", texts)
    file = sorted((tmp_path / "corpus").iterdir())[0]
    os.truncate(file, file.stat().st_size - 20)
    with pytest.raises(ValueError, match=rf"data\.paths: .*{file.name} cannot be read after (line|row) \d+"):
        prepare(settings(tmp_path, tokenizer))
    assert not list((tmp_path / "prepared").glob(".*.tmp"))


def test_a_column_that_is_not_there_is_named_with_those_that_are(texts, tokenizer, tmp_path):
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus", texts)
    with pytest.raises(
        ValueError,
        match=r"data\.column=content: .*a\.parquet has no such column; choose one of its columns \(id, text\)",
    ):
        prepare(settings(tmp_path, tokenizer, column="content"))


def test_validation_files_of_their_own_are_held_out_and_never_trained_on(texts, tokenizer, tmp_path):
    for folder, part in (("corpus", texts), ("held", texts[50:])):
        (tmp_path / folder).mkdir()
        write_json(tmp_path / folder, part)
    own = settings(tmp_path, tokenizer, validation_paths=[str(tmp_path / "held")])
    prepared = prepare(own)
    decoded = [
        [prepared.tokenizer.decode(split.document(i)) for i in range(split.document_count)]
        for split in (prepared.train, prepared.val)
    ]
    assert decoded == [texts[:50], texts[50:]]
    assert prepared.manifest["corpus"]["skipped_counts"] == {"also in the validation files": 10}


def test_a_large_text_file_is_read_in_pieces_to_the_same_documents(texts, tmp_path, monkeypatch):
    content = "é日\r\n".join(texts) * 2
    (tmp_path / "a.txt").write_bytes(content.encode())
    (file,) = records_files(tmp_path / "a.txt")
    whole = [r.content for r in records.text_records(0, file, 2**16)]
    monkeypatch.setattr(records, "CHUNK_BYTES", 1001)
    pieces = [r.content for r in records.text_records(0, file, 2**16)]
    assert pieces == whole and "".join(pieces) == content and len(pieces) > 5
    (tmp_path / "a.txt").write_bytes(content.encode() + b"\xff")
    assert [r.problem for r in records.text_records(0, file, 2**16)] == ["not UTF-8"]


def records_files(path):
    from data.sources.files import text_files

    return text_files([str(path)], ["*"], 10**9)


def test_reading_goes_on_behind_any_record(texts, tmp_path):
    (tmp_path / "corpus").mkdir()
    for write in (write_json, write_parquet, write_zst):
        write(tmp_path / "corpus", texts)
    files = records_files(tmp_path / "corpus")
    everything = list(records.Records(files, "text"))
    assert len(everything) == 3 * len(texts)
    for number in range(0, len(everything), 11):
        last = everything[number]
        assert list(records.Records(files, "text", start=(last.file, last.number))) == everything[number + 1 :]


def test_shards_end_where_they_are_full_and_the_index_spans_them(texts, tokenizer, reference, tmp_path):
    (tmp_path / "corpus").mkdir()
    write_json(tmp_path / "corpus", texts)
    prepared = prepare(settings(tmp_path, tokenizer, shard_tokens=3000))
    entries = prepared.manifest["splits"]["train"]["shards"]
    assert len(entries) > 10 and all(entry["tokens"] >= 3000 for entry in entries[:-1])
    tokens, train = prepared.train, np.array(reference[0])
    draw = np.random.default_rng(0)
    for start, stop in np.sort(draw.integers(0, len(train) + 1, (200, 2)), axis=1).tolist():
        assert np.array_equal(tokens[start:stop], train[start:stop])
    ends = np.flatnonzero(train == prepared.tokenizer.eos_id) + 1
    assert [tokens.document_bounds(i)[1] for i in range(tokens.document_count)] == ends.tolist()
    names = [name for i in range(tokens.document_count) for name in tokens.documents(*tokens.document_bounds(i))]
    assert names == tokens.documents(0, len(tokens)) and len(set(names)) == tokens.document_count
    assert tokens.document_lengths.sum() == len(tokens)


def test_a_library_that_is_not_there_is_named_with_the_way_to_it(texts, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus", texts)
    for library in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ValueError,
        match=r"need pyarrow, which is not installed; run \.venv/bin/pip install -r requirements-extra\.txt",
    ):
        prepare(settings(tmp_path, tokenizer))
    with pytest.raises(
        ValueError, match=r"data\.source=datasets needs .* \.venv/bin/pip install -r requirements-extra\.txt"
    ):
        prepare(settings(tmp_path, tokenizer, source="datasets", paths=[], dataset="some/name"))
