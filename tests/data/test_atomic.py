"""A file has its old content or its new one, whatever happens while it is written."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import atomic
from data.atomic import UNFINISHED, fsync, sha256, write_atomic

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("content", ["", "a", "é\n\r\n\u2028", b"", b"\0\xff", b"x" * 10**6])
def test_the_content_is_written_as_it_is(tmp_path, content):
    file = tmp_path / "file.json"
    for _ in range(2):  # new, and over another content
        write_atomic(file, content)
        assert file.read_bytes() == (content if isinstance(content, bytes) else content.encode())
        assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("failing", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_leaves_the_old_content(tmp_path, monkeypatch, failing, code):
    def fail(*given):
        raise OSError(code, os.strerror(code))

    write_atomic(tmp_path / "file", "old")
    with monkeypatch.context() as patched, pytest.raises(OSError) as failed:
        patched.setattr(os if failing == "fsync" else Path, failing, fail)
        write_atomic(tmp_path / "file", "new")
    assert failed.value.errno == code and (tmp_path / "file").read_text() == "old"
    write_atomic(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "new"


WRITES = """
import sys
from pathlib import Path
from data.atomic import write_atomic
for number in range(10**9):
    write_atomic(Path(sys.argv[1]), str(number % 10) * 10**6)
"""


def test_a_reader_and_a_kill_find_one_content_and_all_of_it(tmp_path):
    file = tmp_path / "file"
    for pause in (0.0, 0.01, 0.02, 0.05):
        write_atomic(file, "0" * 10**6)
        process = subprocess.Popen([sys.executable, "-c", WRITES, str(file)], cwd=REPO)
        deadline = time.monotonic() + 20
        while file.read_text()[0] == "0" and time.monotonic() < deadline:
            pass
        for _ in range(20):
            assert len(text := file.read_text()) == 10**6 and len(set(text)) == 1
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(text := file.read_text()) == 10**6 and len(set(text)) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"file", f"file{UNFINISHED}"}


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_file_has_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_said_once_and_used(tmp_path, monkeypatch, caplog, code):
    def cannot(descriptor):
        raise OSError(code, os.strerror(code))

    atomic._log_once.cache_clear()
    monkeypatch.setattr(os, "fsync", cannot)
    for content in ("a", "b"):
        write_atomic(tmp_path / "file", content)
        fsync(tmp_path)
        assert (tmp_path / "file").read_text() == content
    (message,) = caplog.messages
    assert os.strerror(code) in message
