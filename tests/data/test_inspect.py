"""data.inspect shows the documents as they were, and finds what is damaged."""

import json
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
    assert end.value.code == 0 and f"document 2, {name}: " in out and text[:300] in out and text[:301] not in out
    assert f"… and {len(text) - 300:,} characters more" in out and "all checksums are right" in out
    shards = prepared.manifest["splits"]["train"]["shards"]
    assert len(shards) > 1 and all(f"train  {shard['name']}: " in out for shard in shards)


@pytest.mark.parametrize("file", ["train-00000.bin", "train-00001.names", "val-00000.index.npy"])
def test_a_flipped_byte_is_found(prepared, capsys, file):
    content = bytearray((prepared.folder / file).read_bytes())
    content[-1] ^= 1
    (prepared.folder / file).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        inspect.main([str(prepared.folder)])
    assert end.value.code == 1 and f"{prepared.folder / file}: has another checksum" in capsys.readouterr().out


def test_what_does_not_fit_is_found_even_with_the_checksums_of_it(prepared):
    folder = prepared.folder
    (folder / "train-00000.bin").write_bytes(
        b"\xff\xff" * (prepared.manifest["splits"]["train"]["shards"][0]["tokens"])
    )
    found = " ".join(inspect.damages(load(folder)))
    assert "holds token 65535, beyond the vocabulary of 400" in found and "does not lie between bos and eos" in found


def test_a_document_that_is_not_there_and_a_folder_that_is_none_are_named(prepared, tmp_path):
    with pytest.raises(SystemExit, match=r"--document: train has documents 0 to \d+, not 1000"):
        inspect.main([str(prepared.folder), "--document", "1000"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(SystemExit, match=r"manifest\.json: cannot be read"):
        inspect.main([str(tmp_path / "other")])
