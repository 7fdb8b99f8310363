"""A corpus of real text, and the settings to prepare it."""

import pytest

from data.settings import DataSettings
from data.sources.files import stdlib_files
from data.sources.records import read_documents

VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def library() -> dict[str, str]:
    """Sixty files of real text, below 20 kB each."""
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 20_000][:60]
    return {f"{number:02d}.py": document.text for number, document in enumerate(read_documents(files, {}))}


@pytest.fixture
def settings(tmp_path, library) -> DataSettings:
    (tmp_path / "corpus").mkdir()
    for name, text in library.items():
        (tmp_path / "corpus" / name).write_bytes(text.encode())
    return DataSettings(
        name="own",
        source="text",
        paths=[str(tmp_path / "corpus")],
        vocab_size=VOCAB_SIZE,
        validation_share=0.2,
        root=str(tmp_path / "prepared"),
    )
