"""Which files become a corpus, and what is read from them."""

import sysconfig
from pathlib import Path

import pytest

from data.sources.files import stdlib_files, text_files
from data.sources.records import read_documents

PATTERNS = ["*.txt", "*.md", "*.py"]
ENOUGH = 10**9


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def names(files) -> list[str]:
    return [file.name for file in files]


def test_the_standard_library_is_its_modules_without_installed_packages():
    files = stdlib_files(ENOUGH)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names(files))
    assert names(files) == sorted(names(files))
    assert not [n for n in names(files) if "site-packages" in n or "__pycache__" in n or not n.endswith(".py")]
    assert 5e6 < sum(file.size for file in files) < 1e8


def test_a_standard_library_without_tests_or_with_packages_inside_is_listed(tmp_path, monkeypatch):
    write(tmp_path, {"os.py": "x", "json/__init__.py": "y", "site-packages/torch/nn.py": "z", "README": "r"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert names(stdlib_files(ENOUGH)) == ["json/__init__.py", "os.py"]


def test_a_standard_library_without_source_is_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.source: .*data=text"):
        stdlib_files(ENOUGH)


def test_tests_are_left_out_first_when_the_limit_bites(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, {f"{folder}/{i}.py": "x" * 100 for folder in ("a", "test") for i in range(10)})
    kept = names(text_files([str(tmp_path)], PATTERNS, 1350))
    assert len([n for n in kept if "/a/" in n]) == 10
    assert len([n for n in kept if "/test/" in n]) == 3
    assert "left out 7 of 20 files" in caplog.text and "data.max_bytes=1350" in caplog.text


def test_the_choice_under_a_limit_hardly_moves_when_a_file_is_added(tmp_path):
    write(tmp_path, {f"{i}.txt": "x" * 10 for i in range(100)})
    before = set(names(text_files([str(tmp_path)], PATTERNS, 500)))
    write(tmp_path, {"new.txt": "x" * 10})
    after = set(names(text_files([str(tmp_path)], PATTERNS, 500)))
    assert len(before) == len(after) == 50
    assert len(before - after) <= 1


def test_files_folders_and_globs_are_found_once_and_named_from_where_the_search_began(tmp_path):
    write(
        tmp_path,
        {
            "notes/a.md": "a",
            "notes/deep/b.txt": "b",
            "notes/deep/c.rst": "c",
            "notes/.git/d.md": "d",
            "notes/__pycache__/e.py": "e",
            "one.log": "one",
        },
    )
    everything = [str(tmp_path / "notes"), str(tmp_path / "one.log"), str(tmp_path / "notes" / "**" / "*.rst")]
    files = text_files([*everything, str(tmp_path / "notes/a.md")], PATTERNS, ENOUGH)
    assert names(files) == ["notes/a.md", "notes/deep/b.txt", "notes/deep/c.rst", "one.log"]


def test_home_and_relative_paths_are_understood(tmp_path, monkeypatch):
    write(tmp_path, {"home/n/a.txt": "a", "here/b.txt": "b"})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    assert names(text_files(["~/n", "b.txt"], PATTERNS, ENOUGH)) == ["b.txt", "n/a.txt"]


def test_hidden_folders_are_left_out_aloud(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, {"a.txt": "a", ".venv/b.py": "b"})
    assert names(text_files([str(tmp_path)], PATTERNS, ENOUGH)) == [f"{tmp_path.name}/a.txt"]
    assert str(tmp_path / ".venv") in caplog.text


def test_every_path_that_leads_nowhere_is_named_at_once(tmp_path):
    write(tmp_path, {"empty/picture.png": "p"})
    bad = [str(tmp_path / name) for name in ("missing", "empty", "no*match")]
    with pytest.raises(ValueError) as error:
        text_files(bad, PATTERNS, ENOUGH)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(line.startswith("data.paths: ") for line in lines)
    assert all(path in line for path, line in zip(bad, lines, strict=True))
    assert "*.txt, *.md, *.py" in lines[1] and "data.patterns" in lines[1]


def test_no_paths_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"data\.paths: is empty"):
        text_files([], PATTERNS, ENOUGH)


def test_text_is_read_byte_for_byte_and_what_is_skipped_is_named(tmp_path):
    exact = "one\r\ntwo\rthree\0\n\n  é日\ufeff"
    write(tmp_path, {"a.txt": exact, "b.txt": "é".encode("latin-1"), "c.txt": ""})
    skipped: dict[str, list[str]] = {}
    documents = list(read_documents(text_files([str(tmp_path)], PATTERNS, ENOUGH), skipped))
    assert [(name, text) for name, text, _ in documents] == [(f"{tmp_path.name}/a.txt", exact)]
    assert skipped == {"not UTF-8": [f"{tmp_path.name}/b.txt"], "empty": [f"{tmp_path.name}/c.txt"]}


def test_a_file_that_vanishes_before_it_is_read_is_skipped_with_the_reason(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    files = text_files([str(tmp_path)], PATTERNS, ENOUGH)
    (tmp_path / "a.txt").unlink()
    skipped: dict[str, list[str]] = {}
    assert [document.text for document in read_documents(files, skipped)] == ["b"]
    assert skipped == {"No such file or directory": [f"{tmp_path.name}/a.txt"]}


@pytest.mark.parametrize("text", ["line\n" * 50, "a long line without any end" * 10, "x" * 41, "\n" * 100])
def test_long_files_are_cut_behind_line_ends_and_nothing_is_lost(tmp_path, text):
    write(tmp_path, {"a.txt": text})
    parts = list(read_documents(text_files([str(tmp_path / "a.txt")], PATTERNS, ENOUGH), {}, part_chars=40))
    assert "".join(part.text for part in parts) == text
    assert [part.name for part in parts] == [f"a.txt#{i + 1}" for i in range(len(parts))]
    assert all(0 < len(part.text) <= 40 for part in parts)
    assert all(part.text.endswith("\n") for part in parts[:-1] if "\n" in part.text)


def test_a_file_of_just_the_length_of_a_part_stays_whole(tmp_path):
    write(tmp_path, {"a.txt": "x" * 40})
    files = text_files([str(tmp_path / "a.txt")], PATTERNS, ENOUGH)
    assert [document.name for document in read_documents(files, {}, part_chars=40)] == ["a.txt"]
