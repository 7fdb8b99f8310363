"""data.inspect shows the documents as they were, and finds what is damaged."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import inspect
from data.prepare import prepare
from data.settings import DataSettings
from data.token_dataset import load

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def prepared(tmp_path):
    return prepare(
        DataSettings(
            name="own",
            source="text",
            paths=[str(REPO / "models")],
            vocab_size=400,
            validation_share=0.2,
            shard_tokens=5000,
            root=str(tmp_path),
        )
    )


def test_it_shows_counts_shards_and_documents_and_that_all_is_well(prepared, capsys):
    with pytest.raises(SystemExit) as end:
        inspect.main([str(prepared.folder), "--document", "2", "--chars", "300"])
    out = capsys.readouterr().out
    (name,) = prepared.train.documents(*prepared.train.document_bounds(2))
    text = (REPO / name).read_text()
    assert end.value.code == 0 and f"document 2, {name}: " in out and "all checksums are correct" in out
    assert f" tokens\n{text[:300]}\n… and {len(text) - 300:,} characters more\n" in out
    shards = prepared.manifest["splits"]["train"]["shards"]
    assert len(shards) > 1 and all(f"train  {shard['name']}: " in out for shard in shards)


@pytest.mark.parametrize("file", ["train-00000.bin", "train-00001.names", "val-00000.index.npy"])
def test_a_flipped_byte_is_found(prepared, capsys, file):
    content = bytearray((prepared.folder / file).read_bytes())
    content[-1] ^= 1
    (prepared.folder / file).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        inspect.main([str(prepared.folder)])
    assert end.value.code == 1 and f"{prepared.folder / file}: its checksum differs" in capsys.readouterr().out


def test_what_does_not_fit_is_found_even_with_the_checksums_of_it(prepared):
    folder = prepared.folder
    (folder / "train-00000.bin").write_bytes(
        b"\xff\xff" * (prepared.manifest["splits"]["train"]["shards"][0]["tokens"])
    )
    found = " ".join(inspect.damages(load(folder)))
    assert "has token 65535, beyond the vocabulary of 400" in found
    assert "does not begin with bos and end with eos" in found


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        inspect.main(list(arguments))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_a_document_that_is_not_there_and_a_folder_that_is_no_dataset_are_named(prepared, tmp_path, capsys):
    err = refused(capsys, str(prepared.folder), "--document", "1000")
    assert re.match(r"--document: train has documents 0 to \d+, not 1000", err)
    assert refused(capsys, str(prepared.folder), "--chars", "-5") == "--chars: -5 must be at least 0\n"
    assert refused(capsys, "nowhere").startswith("there is no folder nowhere; name a prepared dataset")
    assert f"name one of {prepared.folder}\n" in refused(capsys, str(tmp_path))
    (tmp_path / "other").mkdir()
    assert "other is not a prepared dataset, because it has no manifest.json" in refused(
        capsys, str(tmp_path / "other")
    )
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({}))
    assert "manifest.json: cannot be read" in refused(capsys, str(tmp_path / "other"))


def test_without_numbers_the_first_documents_are_shown(prepared, capsys):
    with pytest.raises(SystemExit) as end:
        inspect.main([str(prepared.folder), "--split", "val"])
    count = min(2, prepared.val.document_count)
    assert end.value.code == 0 and capsys.readouterr().out.count("--- val document") == count


def test_a_closed_pipe_ends_it_without_a_word(prepared):
    command = [sys.executable, "-m", "data.inspect", str(prepared.folder), "--chars", "100000", "--document"]
    numbers = [str(number % prepared.train.document_count) for number in range(200)]  # more than a pipe holds
    run = subprocess.Popen([*command, *numbers], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout and run.stdout.readline().startswith(bytes(prepared.folder))
    run.stdout.close()
    assert run.stderr and run.stderr.read() == b""
    run.wait(timeout=60)


def test_characters_that_the_terminal_lacks_are_escaped(prepared):
    command = [sys.executable, "-m", "data.inspect", str(prepared.folder), "--chars", "1000000", "--document"]
    numbers = map(str, range(prepared.train.document_count))
    run = subprocess.run(
        [*command, *numbers], cwd=REPO, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (run.returncode, run.stderr) == (0, b"") and b"\\u" in run.stdout
