"""One process at a time, also where the file system has no locks."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.file_lock import LockHeld, file_lock

REPO = Path(__file__).resolve().parents[2]
LACKING = [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP]


def without_locks(monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def add_one(folder, code):
    """Read a number, wait, and write it back with one added, under the lock."""
    if code:
        without_locks(pytest.MonkeyPatch(), code)
    for _ in range(5):
        with file_lock(folder / ".x.lock", on_wait=lambda text: None):
            count = int((folder / "count").read_text())
            time.sleep(0.002)
            (folder / "count").write_text(str(count + 1))


@pytest.mark.parametrize("code", [0, *LACKING])
def test_no_two_processes_hold_it_at_once(tmp_path, code):
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=add_one, args=(tmp_path, code)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "15"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("count", ".x.lock")] == []


@pytest.mark.parametrize("code", [0, *LACKING])
def test_who_does_not_wait_is_told_which_file_shows_it(tmp_path, monkeypatch, caplog, code):
    if code:
        without_locks(monkeypatch, code)
    lock, file = tmp_path / ".x.lock", tmp_path / (".x.owner.lock" if code else ".x.lock")
    with file_lock(lock), pytest.raises(LockHeld, match=f"{file} is held by another") as held, file_lock(lock):
        pytest.fail("it is held twice")
    with file_lock(lock):
        pass
    assert (f"delete {file}" in str(held.value)) == bool(code)
    assert ("has no locks" in caplog.text) == bool(code) == (os.strerror(code) in caplog.text)


HOLDS = """
import errno, fcntl, os, sys, time
from pathlib import Path
from data.file_lock import file_lock
code = int(sys.argv[2])
def flock(descriptor, operation):
    raise OSError(code, os.strerror(code))
if code:
    fcntl.flock = flock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("code", [0, errno.ENOLCK])
def test_a_killed_process_does_not_hold_it_forever(tmp_path, monkeypatch, code):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / ".x.lock"), json.dumps(code)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "held\n"
    if code:
        without_locks(monkeypatch, code)
    with pytest.raises(LockHeld), file_lock(tmp_path / ".x.lock"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with file_lock(tmp_path / ".x.lock"):
        pass


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EINVAL])
def test_another_error_is_not_taken_for_a_lack_of_locks(tmp_path, monkeypatch, code):
    without_locks(monkeypatch, code)
    with pytest.raises((OSError, LockHeld)), file_lock(tmp_path / ".x.lock"):
        pass
    assert not (tmp_path / ".x.owner.lock").exists()
