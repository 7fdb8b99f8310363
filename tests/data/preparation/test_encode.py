"""A pool of processes encodes batches in order, in little memory, and ends with the process that made it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.preparation.encode import BATCHES_PER_WORKER, encoders
from data.sources.documents import Batch, Record
from data.sources.files import stdlib_files
from data.sources.parse_record import Parser
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer

REPO = Path(__file__).resolve().parents[3]
MARK = "ENCODES_FOR"

# Reads batches without end, and says when the first one is encoded. A script without a main guard, started once only.
ENDLESS = """
import itertools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands with SIGINT ignored
print("started", flush=True)
from data.preparation.encode import encoders
from data.sources.documents import Batch, Record
from data.sources.parse_record import Parser
from data.tokenizer import Tokenizer

batches = (Batch([Record(0, number, "name", "a text")], 0) for number in itertools.count(1))
with encoders(Tokenizer(sys.argv[1]), Parser("text"), workers=2) as encode:
    for _ in encode(batches):
        print("encoded", flush=True)
"""


@pytest.fixture(scope="module")
def texts():
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 4_000]
    return [file.path.read_text() for file in files[:60]]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "t.model", 400, seed=0)


def batches_of(texts):
    for number, text in enumerate(texts, start=1):
        yield Batch([Record(0, number, f"d{number}", text), Record(0, number, "bad", None, "broken")], number)


@pytest.fixture
def mark(monkeypatch, tmp_path):
    """Of this test's processes, in their environment."""
    monkeypatch.setenv(MARK, str(tmp_path))
    return f"{MARK}={tmp_path}".encode()


def marked(mark):
    """The marked processes besides this one that are alive: process id → command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


def workers_of(mark):
    return [process for process, command in marked(mark).items() if "encode_worker" in command]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_encode_as_this_process_does_and_in_order(texts, tokenizer):
    found = []
    for workers in (1, 3):
        with encoders(tokenizer, Parser("text"), workers) as encode:
            found.append(list(encode(batches_of(texts))))
    for (batch, here), (other_batch, there), text in zip(*found, texts, strict=True):
        assert batch == other_batch and here.names == there.names == [batch.records[0].name]
        assert np.array_equal(here.tokens, there.tokens) and here.tokens.dtype == there.tokens.dtype == np.uint16
        assert there.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert here[2:] == there[2:] and [record.problem for record in there.problems] == ["broken"]


def test_only_a_few_batches_are_read_ahead(texts, tokenizer):
    read = []

    def counted():
        for batch in batches_of(texts):
            read.append(batch)
            yield batch

    with encoders(tokenizer, Parser("text"), workers=2) as encode:
        for taken, _ in enumerate(encode(counted()), start=1):
            assert len(read) - taken < 2 * BATCHES_PER_WORKER


def test_an_error_of_the_reader_ends_the_workers(texts, tokenizer, mark):
    def broken():
        yield from batches_of(texts[:5])
        raise ValueError("a broken file")

    with pytest.raises(ValueError, match="a broken file"), encoders(tokenizer, Parser("text"), workers=2) as encode:
        for _ in encode(broken()):
            pass
    assert not workers_of(mark)


def test_a_killed_worker_is_an_error_that_says_so(texts, tokenizer, mark):
    with (
        pytest.raises(OSError, match=r"a process that tokenises ended with code -9; .* lower data\.workers"),
        encoders(tokenizer, Parser("text"), workers=2) as encode,
    ):
        for _ in encode(batches_of(texts)):
            for process in workers_of(mark):
                os.kill(process, signal.SIGKILL)
    wait_until(lambda: not workers_of(mark))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_made_them(tokenizer, mark, number, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "script.py"), str(tokenizer.path)]
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert [process.stdout.readline() for _ in range(2)] == ["started\n", "encoded\n"]
    assert len(workers_of(mark)) == 2
    process.send_signal(number)
    try:
        assert "started" not in process.communicate(timeout=60)[0]
    finally:
        process.kill()
    wait_until(lambda: not marked(mark))


def test_a_worker_imports_no_torch_and_shares_the_niceness(texts, tokenizer, mark, tmp_path):
    """Torch would cost seconds and hundreds of megabytes in each of them."""
    with encoders(tokenizer, Parser("text"), workers=2) as encode:
        for _ in encode(batches_of(texts[:8])):
            workers = workers_of(mark)
        maps = [Path(f"/proc/{process}/maps").read_text() for process in workers]
        nice = [int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[16]) for process in workers]
    assert len(workers) == 2 and not any("libtorch" in text for text in maps)
    assert nice == [os.nice(0)] * 2


def test_a_tokenizer_with_named_ends_is_the_same_in_a_worker(texts, tokenizer, tmp_path):
    """The names of bos and eos may be in the settings alone."""
    (tmp_path / "other.model").write_bytes(tokenizer.path.read_bytes())
    named = Tokenizer(tmp_path / "other.model", bos="</s>", eos="<s>")
    assert json.dumps(named.special) and named.bos_id == tokenizer.eos_id
    with encoders(named, Parser("text"), workers=2) as encode:
        for _, encoded in encode(batches_of(texts[:4])):
            assert (encoded.tokens[0], encoded.tokens[-1]) == (named.bos_id, named.eos_id)
