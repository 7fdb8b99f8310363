"""A preparation holds exactly the text, is made once, and is never taken for what it is not."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.shards.writer
from data.prepare import prepare, problems
from data.settings import DataSettings
from data.token_dataset import FORMAT, PreparedDataset, load

REPO = Path(__file__).resolve().parents[2]


def texts(prepared: PreparedDataset, split: str) -> dict[str, str]:
    """The documents of a split as the shards have them: name → decoded text."""
    tokens, tokenizer = getattr(prepared, split), prepared.tokenizer
    ids = tokens[0 : len(tokens)]
    begins, ends = (np.flatnonzero(ids == special).tolist() for special in (tokenizer.bos_id, tokenizer.eos_id))
    assert len(begins) == len(ends) == tokens.document_count and begins[0] == 0 and ends[-1] == len(ids) - 1
    assert begins[1:] == [end + 1 for end in ends[:-1]]
    found = {}
    for begin, end in zip(begins, ends, strict=True):
        (name,) = tokens.documents(begin, end + 1)
        found[name] = tokenizer.decode(ids[begin + 1 : end])
    return found


def folders(settings: DataSettings) -> list[str]:
    return sorted(entry for entry in os.listdir(settings.root) if not entry.endswith(".lock"))


def test_the_shards_hold_every_document_exactly_in_one_split(settings, library):
    prepared = prepare(settings)
    train, val = texts(prepared, "train"), texts(prepared, "val")
    assert not set(train) & set(val)
    assert train | val == {f"corpus/{name}": text for name, text in library.items()}
    assert 3 <= len(val) <= 25
    for split, documents in (("train", train), ("val", val)):
        tokens, entry = getattr(prepared, split), prepared.manifest["splits"][split]
        text_bytes = sum(len(text.encode()) for text in documents.values())
        assert tokens.text_bytes == entry["bytes"] == text_bytes
        assert prepared.tokenizer.token_bytes[tokens[0 : len(tokens)]].sum() == text_bytes
        assert (entry["documents"], entry["tokens"]) == (len(documents), len(tokens))
    assert prepared.tokenizer.vocab_size == settings.vocab_size


def test_a_second_call_reuses_what_is_there(settings):
    first = prepare(settings)
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    second = prepare(settings)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == before
    assert folders(settings) == [first.folder.name]
    assert re.fullmatch(r"own-[0-9a-f]{12}", first.folder.name)


def test_the_same_text_elsewhere_or_touched_is_the_same_preparation(settings, tmp_path):
    first = prepare(settings)
    os.utime(tmp_path / "corpus" / "00.py")
    assert prepare(settings).folder == first.folder
    shutil.copytree(tmp_path / "corpus", tmp_path / "elsewhere" / "corpus")
    assert prepare(replace(settings, paths=[str(tmp_path / "elsewhere" / "corpus")])).folder == first.folder
    assert folders(settings) == [first.folder.name]


def test_the_same_preparation_made_twice_has_the_same_bytes(settings, tmp_path):
    first, second = prepare(settings), prepare(replace(settings, root=str(tmp_path / "other")))
    assert first.fingerprint == second.fingerprint and first.folder.name == second.folder.name
    for name in ("tokenizer.model", "train-00000.bin", "val-00000.bin", "train-00000.index.npy", "train-00000.names"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 420}, "vocab_size 400 → 420"),
        ({"validation_share": 0.5}, "validation_share 0.2 → 0.5"),
        ({"seed": 1}, "seed 0 → 1"),
        ({"patterns": ["0*.py"]}, "corpus "),
        ({"max_bytes": 100_000}, "corpus "),
    ],
)
def test_a_changed_setting_is_prepared_beside_the_old_and_named(settings, caplog, change, said):
    first = prepare(settings)
    caplog.set_level(logging.INFO)
    second = prepare(replace(settings, **change))
    assert second.fingerprint != first.fingerprint
    assert folders(settings) == sorted([first.folder.name, second.folder.name])
    (message,) = [m for m in caplog.messages if "cannot be reused" in m]
    assert str(first.folder) in message and said in message and message.count("→") == 1
    assert prepare(settings).folder == first.folder


def test_a_changed_file_is_noticed_even_at_the_same_length(settings, tmp_path):
    first = prepare(settings)
    path = tmp_path / "corpus" / "00.py"
    path.write_bytes(path.read_bytes().swapcase())
    assert prepare(settings).folder != first.folder


def test_an_added_or_renamed_file_moves_no_other_between_the_splits(settings, tmp_path):
    before = prepare(settings)
    (tmp_path / "corpus" / "00.py").rename(tmp_path / "corpus" / "zz.py")
    (tmp_path / "corpus" / "aa.py").write_text("a new file\n" * 20)
    after = prepare(settings)
    for split in ("train", "val"):
        old, new = texts(before, split), texts(after, split)
        assert set(old.values()) == set(new.values()) - {"a new file\n" * 20}


def test_copies_of_a_document_are_never_in_both_splits(settings, tmp_path, library):
    for name, text in library.items():
        (tmp_path / "corpus" / f"copy-{name}").write_bytes(text.encode())
    prepared = prepare(settings)
    train, val = texts(prepared, "train"), texts(prepared, "val")
    assert len(train) + len(val) == 2 * len(library)
    assert not set(train.values()) & set(val.values())


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_splits_have_a_document_whatever_the_share(settings, share):
    prepared = prepare(replace(settings, validation_share=share))
    assert min(prepared.train.document_count, prepared.val.document_count) == 1


def test_one_long_file_is_enough_and_one_short_file_is_not(settings, tmp_path, library, caplog):
    caplog.set_level(logging.INFO)
    text = "".join(library.values())
    (tmp_path / "book.txt").write_bytes(text.encode())
    prepared = prepare(replace(settings, paths=[str(tmp_path / "book.txt")]))
    parts = texts(prepared, "train") | texts(prepared, "val")
    assert "".join(parts[f"book.txt#{i + 1}"] for i in range(len(parts))) == text
    assert "files longer than 65536 characters were split: 1 file gave" in caplog.text
    assert f"{len(parts)} documents in total" in caplog.text

    (tmp_path / "note.txt").write_text("only this")
    with pytest.raises(ValueError, match=r"data\.paths: has only one document"):
        prepare(replace(settings, paths=[str(tmp_path / "note.txt")]))


def test_a_tokenizer_brought_along_is_used_and_its_changes_noticed(settings, tmp_path):
    first = prepare(settings)
    model = tmp_path / "mine.model"
    shutil.copyfile(first.folder / "tokenizer.model", model)
    brought = replace(settings, tokenizer=str(model))
    second = prepare(brought)
    assert second.folder != first.folder
    assert second.tokenizer.sha256 == first.tokenizer.sha256 and second.fingerprint == first.fingerprint

    other = prepare(replace(settings, seed=1, validation_share=0.5))
    shutil.copyfile(other.folder / "tokenizer.model", model)
    third = prepare(brought)
    assert third.folder != second.folder and third.tokenizer.sha256 == other.tokenizer.sha256


def test_a_vocabulary_unlike_the_tokenizers_is_refused(settings):
    model = str(prepare(settings).folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"data\.vocab_size: is 32000, but .* has 400 tokens; set it to 400"):
        prepare(replace(settings, tokenizer=model, vocab_size=32_000))


def test_a_vocabulary_too_large_for_the_corpus_is_refused_and_leaves_nothing(settings):
    with pytest.raises(ValueError, match=r"data\.vocab_size: 1000000 is too large"):
        prepare(replace(settings, vocab_size=1_000_000))
    assert folders(settings) == []


def test_all_problems_of_the_settings_are_told_at_once():
    bad = DataSettings(
        name="../up",
        source="text",
        paths=["/no/such/folder", "/nor/this"],
        tokenizer="/no/such.model",
        vocab_size=0,
        validation_share=1.0,
    )
    keys = ["name", "vocab_size", "validation_share", "paths", "paths", "tokenizer"]
    found = problems(bad)
    assert [line.split(":")[0] for line in found] == [f"data.{key}" for key in keys]
    with pytest.raises(ValueError) as error:
        prepare(bad)
    assert str(error.value).splitlines() == found
    assert problems(DataSettings()) == []
    assert problems(DataSettings(source="web"))[0].startswith("data.source: 'web'")
    (problem,) = problems(DataSettings(max_bytes=1))
    assert problem.startswith("data.max_bytes=1 is smaller than every file with text; raise it to at least ")


def test_a_folder_with_nothing_readable_is_refused(settings, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "odd" / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data\.paths: none of 2 files is readable text"):
        prepare(replace(settings, paths=[str(tmp_path / "odd")]))


def test_skipped_files_are_counted_and_named_in_one_line(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name in ("latin1.txt", "latin2.txt"):
        (tmp_path / "corpus" / name).write_bytes("é".encode("latin-1"))
    (tmp_path / "corpus" / "empty.txt").touch()
    prepared = prepare(settings)
    (message,) = [m for m in caplog.messages if m.startswith("skipped")]
    assert "2 not UTF-8 (corpus/latin1.txt, corpus/latin2.txt)" in message and "1 empty (corpus/empty.txt)" in message
    assert prepared.manifest["corpus"]["skipped"]["empty"] == ["corpus/empty.txt"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def swap_case(path: Path) -> None:
    path.write_bytes(path.read_bytes().swapcase())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-00000.bin", truncate),
        ("val-00000.bin", Path.unlink),
        ("train-00000.index.npy", truncate),
        ("val-00000.names", truncate),
        ("tokenizer.model", swap_case),
        ("tokenizer.model", Path.unlink),
        ("manifest.json", truncate),
        ("manifest.json", Path.unlink),
        ("manifest.json", lambda path: path.write_text("[]")),
        ("manifest.json", lambda path: path.write_text(json.dumps({"format": FORMAT}))),
    ],
)
def test_a_damaged_preparation_is_refused_naming_the_file_and_the_mend(settings, file, damage):
    folder = prepare(settings).folder
    damage(folder / file)
    mend = rf"{re.escape(str(folder / file))}: .*delete the folder {re.escape(str(folder))} to prepare it again"
    with pytest.raises(ValueError, match=mend):
        prepare(settings)
    with pytest.raises(ValueError, match=mend):
        load(folder)
    shutil.rmtree(folder)
    assert prepare(settings).folder == folder


def test_another_format_is_refused(settings):
    folder = prepare(settings).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match=f"has format 99, but this version reads {FORMAT}; delete the folder"):
        load(folder)


SCRIPT = """
import json, sys, time
import data.shards.writer
from data.prepare import DataSettings, prepare

add, pause = data.shards.writer.ShardWriter.add, float(sys.argv[2])
def slow_add(*arguments):
    time.sleep(pause)
    add(*arguments)
data.shards.writer.ShardWriter.add = slow_add
prepared = prepare(DataSettings(**json.loads(sys.argv[1])))
print(prepared.folder, prepared.fingerprint, len(prepared.train))
"""


def start(settings: DataSettings, pause: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, json.dumps(vars(settings)), str(pause)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_processes_at_once_make_one_preparation(settings):
    runs = [start(settings, pause=0.01) for _ in range(3)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(folders(settings)) == 1


def test_an_interrupted_preparation_is_gone_on_with(settings, monkeypatch, caplog):
    whole = prepare(replace(settings, root=str(Path(settings.root) / "undisturbed")))
    add, added = data.shards.writer.ShardWriter.add, []

    def interrupt(shard, name, *more):
        if len(added) == 40:
            raise KeyboardInterrupt
        added.append(name)
        add(shard, name, *more)

    monkeypatch.setattr("data.sources.corpus.BATCH_CHARS", 2**14)
    monkeypatch.setattr("data.preparation.corpus_writer.COMMIT_SECONDS", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.shards.writer.ShardWriter.add", interrupt)
        prepare(settings)
    assert folders(settings) == [".own-" + folders(settings)[0][5:-4] + ".tmp", "undisturbed"]
    caplog.set_level(logging.INFO)
    prepared = prepare(settings)
    (message,) = [m for m in caplog.messages if m.startswith("resuming after")]
    assert 30 <= int(message.split()[2]) < 40
    assert folders(settings) == [prepared.folder.name, "undisturbed"]
    assert prepared.fingerprint == whole.fingerprint and prepared.folder.name == whole.folder.name


def test_a_file_that_changes_during_preparation_is_noticed(settings, tmp_path, monkeypatch):
    def append(texts, *arguments, **keywords):
        (tmp_path / "corpus" / "59.py").write_text("other")
        return train(texts, *arguments, **keywords)

    import data.prepare

    train = data.prepare.train_tokenizer
    monkeypatch.setattr(data.prepare, "train_tokenizer", append)
    with pytest.raises(ValueError, match=r"corpus/59\.py changed during preparation"):
        prepare(settings)
    assert folders(settings) == []
