"""A small corpus that is prepared while it is read."""

import pytest

from data.settings import DataSettings
from data.sources.files import stdlib_files


@pytest.fixture(scope="module")
def texts():
    files = [file for file in stdlib_files(10**9) if 2_000 < file.size < 8_000][:18]
    return [file.path.read_text() for file in files]


@pytest.fixture
def settings(texts, tmp_path):
    """Of some files of real text; three shards or so, and the end of the second epoch within the run."""
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / f"{number:03d}.txt").write_text(text)
    return DataSettings(
        name="own", source="text", paths=[str(tmp_path / "corpus")], vocab_size=400, shard_tokens=20_000, workers=1,
        root=str(tmp_path / "prepared"), validation_share=0.2,
    )  # fmt: skip
