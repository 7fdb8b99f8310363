"""A run folder that cannot be written is refused before anything is read, with its key; nothing is left behind."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.runs.folder import RunFolder
from pretrain.runs.writable import require_writable
from tests.helpers import without_rights

LONG = "n" * 300


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a file, a folder, and links to nothing and to itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


def contents(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("root", "name", "message"),
    [
        ("file", "x", "run.root=file: file cannot be written (it is a file)"),
        ("file/deeper", "x", "run.root=file/deeper: file cannot be written (it is a file)"),
        ("folder/../file", "x", "run.root=folder/../file: "),
        (".", "file", "run.name=file: file cannot be written (it is a file)"),
        (".", "file/x", "run.name=file/x: file cannot be written (it is a file)"),
        ("/proc/x", "x", "run.root=/proc/x: /proc/x cannot be written ("),
        ("/proc", "x", "run.name=x: /proc/x cannot be written ("),
        ("gone", "x", "run.root=gone: gone cannot be written ("),
        ("loop", "x", "run.root=loop: loop cannot be written ("),
        (".", LONG, f"run.name={LONG[:40]}…: a name of 300 bytes is too long for this disk; shorten run.name"),
        (".", "é" * 140, "a name of 280 bytes is too long for this disk; shorten run.name"),
        (".", f"fine/{LONG}", "a name of 300 bytes is too long for this disk; shorten run.name"),
        (LONG, "x", "a name of 300 bytes is too long for this disk; shorten run.root"),
        (".", "/".join(["n" * 200] * 30), "too long for this disk; shorten run.name"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_with_its_key(place, root, name, message):
    before = contents(place)
    with pytest.raises(ConfigError) as error:
        require_writable(root, name)
    assert message in str(error.value)
    assert contents(place) == before


def test_a_folder_without_permission_is_refused(place):
    with without_rights(place):
        Path("mine").mkdir()
        require_writable("mine", "x")
        Path("mine").chmod(0o500)
        with pytest.raises(ConfigError, match=r"run\.name=x: mine/x cannot be written \(Permission denied\)"):
            require_writable("mine", "x")


@pytest.mark.parametrize("name", ["x", "a/b/c", "n" * 255, "é" * 127, "données (1)", "my run", "%s", "-x", "2024_111"])
def test_a_folder_that_can_be_written_leaves_nothing_behind(place, name):
    before = contents(place)
    for root in (".", "new/root", "folder", str(place / "absolute")):
        require_writable(root, name)
    assert contents(place) == before
    (place / "folder" / "run").mkdir()
    require_writable("folder", "run")
    assert (place / "folder" / "run").is_dir()


@pytest.mark.parametrize("command", ["train", "preflight", "sweep"])
def test_commands_refuse_it_before_the_data_are_prepared(root, place, command):
    text = [f"data.paths={root / 'README.md'}", "data=text", "model.vocab_size=300", f"data.root={place}/prepared"]
    arguments = [*text, f"run.root={place}/file", *(["train.seed=0,1"] if command == "sweep" else [])]
    result = subprocess.run(
        [sys.executable, "-m", f"pretrain.{command}", *arguments], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and result.stderr.startswith(f"error: run.root={place}/file: ")
    assert not (place / "prepared").exists()


@pytest.mark.parametrize("nameless", [True, False])
def test_processes_that_check_at_the_same_time_do_not_refuse_each_other(tmp_path, monkeypatch, nameless):
    """As the ranks of a run and the jobs of a sweep do; threads make and remove folders in the same way.

    Network file systems have no temporary files without names.
    """
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", nameless)
    configs = [load([f"run.root={tmp_path}/a/b", f"run.name=job-{number}/run"]) for number in range(2)]

    def check(number):
        for _ in range(100):
            run = configs[number % 2].run
            assert RunFolder(configs[number % 2]).check(configs[number % 2]) == []
            require_writable(run.root, run.name)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(4)))
