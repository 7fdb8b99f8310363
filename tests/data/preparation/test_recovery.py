"""A broken file ends a preparation, and costs no file before it."""

import gzip
import json
import logging
import os
from dataclasses import replace

import pytest

from data import prepare as preparing
from data.preparation import corpus_writer
from data.prepare import prepare
from data.settings import DataSettings
from data.sources import corpus as corpora
from data.sources import open_text
from data.sources.files import stdlib_files
from data.train_tokenizer import train_tokenizer

FILES, EACH, BROKEN = 5, 8, 2


@pytest.fixture(scope="module")
def texts():
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 4_000]
    return [file.path.read_text() for file in files[: FILES * EACH]]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(texts, path, 400, seed=0)
    return str(path)


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch):
    """No survey beforehand, as of a large corpus; small batches, a commit behind each."""
    monkeypatch.setattr(corpora, "SURVEY_BYTES", -1)
    monkeypatch.setattr(corpora, "BATCH_CHARS", 5000)
    monkeypatch.setattr(corpus_writer, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", lambda number: None)  # no power is cut here
    monkeypatch.setattr(open_text, "BLOCK_BYTES", 1000)  # so that lines before a broken place are read


@pytest.fixture
def taken(monkeypatch):
    """The names of all documents that are tokenised."""
    take, names = corpus_writer.CorpusWriter._add, []

    def taking(writing, batch, encoded):
        names.extend(encoded.names)
        take(writing, batch, encoded)

    monkeypatch.setattr(corpus_writer.CorpusWriter, "_add", taking)
    return names


def path_of(folder, number):
    return folder / "corpus" / f"{number}.json.gz"


def lines_of(path):
    return gzip.decompress(path.read_bytes()).splitlines()


@pytest.fixture
def broken(texts, tmp_path):
    """Files of texts, one of them cut short, and what it was."""
    (tmp_path / "corpus").mkdir()
    for number in range(FILES):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number * EACH : (number + 1) * EACH])
        path_of(tmp_path, number).write_bytes(gzip.compress("".join(lines).encode()))
    whole = path_of(tmp_path, BROKEN).read_bytes()
    path_of(tmp_path, BROKEN).write_bytes(whole[: len(whole) * 3 // 4])
    return tmp_path, whole


def settings(folder, tokenizer, root="prepared"):
    return DataSettings(
        name="own", source="records", paths=[str(folder / "corpus")], patterns=["*"], tokenizer=tokenizer,
        vocab_size=400, validation_share=0.2, shard_tokens=3000, workers=1, root=str(folder / root),
    )  # fmt: skip


def fails(own):
    said = rf"{BROKEN}\.json\.gz cannot be read after line \d+ .*, or remove that file\n.*\.tmp keeps the tokens of"
    with pytest.raises(ValueError, match=said):
        prepare(own)


def assert_as_prepared_at_once(folder, own, prepared):
    fresh = prepare(settings(folder, own.tokenizer, root="fresh"))
    assert prepared.fingerprint == fresh.fingerprint and prepared.folder.name == fresh.folder.name
    names = {p.name for p in fresh.folder.iterdir()}
    assert {p.name for p in prepared.folder.iterdir()} == names and "files.json" not in names
    for name in names - {"manifest.json"}:
        assert (prepared.folder / name).read_bytes() == (fresh.folder / name).read_bytes()


@pytest.mark.parametrize("mend", ["bring it back", "take it away"])
def test_a_broken_file_costs_itself_and_nothing_before_it(broken, tokenizer, mend, taken, caplog):
    folder, whole = broken
    own = settings(folder, tokenizer)
    fails(own)
    assert len(taken) > BROKEN * EACH  # some of the broken file too
    taken.clear()
    fails(own)
    assert len(taken) < EACH  # as long as nothing is mended, it is tried again from there
    taken.clear()
    if mend == "bring it back":
        path_of(folder, BROKEN).write_bytes(whole)
    else:
        path_of(folder, BROKEN).unlink()
    with caplog.at_level(logging.INFO):
        prepared = prepare(own)
    assert f"the first {BROKEN} files are the same as " in caplog.text and "resuming after" in caplog.text
    assert min(int(name.split("/")[1][0]) for name in taken) >= BROKEN - 1
    assert len(taken) < (FILES - BROKEN + 1) * EACH
    assert [p.name for p in (folder / "prepared").iterdir() if ".tmp" in p.name] == []
    assert_as_prepared_at_once(folder, own, prepared)


def test_where_a_file_before_it_is_another_too_all_begins_anew(broken, tokenizer, taken):
    folder, whole = broken
    own = settings(folder, tokenizer)
    fails(own)
    taken.clear()
    path_of(folder, BROKEN).write_bytes(whole)
    path_of(folder, 0).write_bytes(path_of(folder, 1).read_bytes())
    prepared = prepare(own)
    assert len(taken) == FILES * EACH
    assert len(list((folder / "prepared").glob(".own-*.tmp"))) == 1  # which the next preparation names
    assert_as_prepared_at_once(folder, own, prepared)


@pytest.mark.parametrize("same", [True, False])
def test_a_tokenizer_of_its_own_is_trained_again_and_has_to_be_the_same(broken, same, taken, monkeypatch, caplog):
    folder, whole = broken
    own = settings(folder, None)
    sample = [path_of(folder, number) for number in range(BROKEN)]
    texts = [json.loads(line)["text"] for path in sample for line in lines_of(path)]
    train = preparing.train_tokenizer
    monkeypatch.setattr(preparing, "train_tokenizer", lambda _, *given: train(iter(texts), *given))
    fails(own)
    taken.clear()
    path_of(folder, BROKEN).write_bytes(whole)
    if not same:
        texts = texts[5:]
    prepared = prepare(own)
    assert (len(taken) == FILES * EACH) == (not same)
    assert ("differs from the earlier one; preparing from the start" in caplog.text) == (not same)
    assert_as_prepared_at_once(folder, own, prepared)


def test_what_can_be_gone_on_with_itself_is_not_taken_by_another(broken, tokenizer, monkeypatch):
    folder, whole = broken
    path_of(folder, BROKEN).write_bytes(whole)
    own, commit = settings(folder, tokenizer), corpus_writer.CorpusWriter._commit

    def killed(writing):
        commit(writing)
        if writing.state.place[0] == BROKEN:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(corpus_writer.CorpusWriter, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(own)
    (left,) = (folder / "prepared").glob(".own-*.tmp")
    before = (left / "state.json").read_bytes()
    prepare(replace(own, patterns=["[01].json.gz"]))
    assert (left / "state.json").read_bytes() == before
    assert_as_prepared_at_once(folder, own, prepare(own))
