"""SIGKILL at random moments inside preparation: what is written stays, and the end is the same to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data.preparation.corpus_writer import STATE
from data.prepare import prepare
from data.settings import DataSettings
from data.sources.files import stdlib_files

REPO = Path(__file__).resolve().parents[3]
DOCUMENTS = 120

# Writes the names of the documents it takes, and takes its time: half of it where files are flushed.
SCRIPT = """
import json, os, sys, time
import data.sources.corpus, data.preparation.corpus_writer
from data.prepare import prepare
from data.settings import DataSettings

log = open(sys.argv[2], "a", buffering=1)
data.sources.corpus.BATCH_CHARS = 2**15
data.preparation.corpus_writer.COMMIT_SECONDS, data.preparation.corpus_writer.BYTES_PER_WORKER = 0.0, 2**15
add, fsync = data.preparation.corpus_writer.CorpusWriter._add, os.fsync

def slow_add(writer, batch, encoded):
    for name in encoded.names:
        log.write(name + "\\\\n")
    time.sleep(0.05)
    add(writer, batch, encoded)
    time.sleep(0.05)

def slow_fsync(number):
    fsync(number)
    time.sleep(0.01)

data.preparation.corpus_writer.CorpusWriter._add, os.fsync = slow_add, slow_fsync
prepare(DataSettings(**json.loads(sys.argv[1])))
""".replace("\\\\n", "\\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Settings for some files of real text, and their preparation, undisturbed."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "corpus").mkdir()
    files = [file for file in stdlib_files(10**9) if 200 < file.size < 20_000][:DOCUMENTS]
    for number, file in enumerate(files):
        shutil.copyfile(file.path, folder / "corpus" / f"{number:03d}.py")
    settings = DataSettings(
        name="own", source="text", paths=[str(folder / "corpus")], vocab_size=400, shard_tokens=40_000, workers=2,
        root=str(folder / "undisturbed"),
    )  # fmt: skip
    return settings, prepare(settings).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def found(root: Path) -> tuple[dict, str]:
    """What a killed preparation has left in `root`, and when that was."""
    (work,) = root.glob(".own-*.tmp") if not list(root.glob("own-*/manifest.json")) else root.glob("own-*")
    if (work / "manifest.json").exists():
        return {"documents": DOCUMENTS}, "at the end"
    state = json.loads((work / STATE).read_text()) if (work / STATE).exists() else {"documents": 0}
    in_commit = (work / f"{STATE}.tmp").exists()
    return state, "in a commit" if in_commit else "between commits" if state["documents"] else "before one"


def kill_and_go_on(settings: DataSettings, undisturbed: Path, folder: Path, kills: int, seed: int) -> Counter[str]:
    """Preparations killed at random moments until `kills` of them died; returns in what they were, and how often."""
    draw, moments, rounds = random.Random(seed), Counter[str](), 0
    while sum(moments.values()) < kills:
        root, attempt = folder / str(rounds), 0
        done, rounds = 0, rounds + 1
        names: list[str] = []
        while True:
            own, log = DataSettings(**{**vars(settings), "root": str(root)}), folder / f"{rounds}-{attempt}.log"
            command = [sys.executable, "-c", SCRIPT, json.dumps(vars(own)), str(log)]
            process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
            deadline = time.monotonic() + 60
            while process.poll() is None and not log.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            dies = sum(moments.values()) < kills
            if dies:
                time.sleep(draw.uniform(0, 1.5 if attempt else 2))
                process.send_signal(signal.SIGKILL)
            _, errors = process.communicate(timeout=120)
            taken = log.read_text().splitlines()
            assert taken[: len(names) - done] == names[done : done + len(taken)]  # goes on just behind what is written
            names = names[:done] + taken
            attempt += 1
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, errors
            state, moment = found(root)
            moments[moment] += 1
            assert state["documents"] >= done
            done = state["documents"]
        assert len(set(names)) == len(names) == DOCUMENTS
        (made,) = (path for path in root.iterdir() if not path.name.endswith(".lock"))
        assert made.name == undisturbed.name
        assert contents(made) == contents(undisturbed) | {f.name: b"" for f in made.glob(".seen-*")}
        before, after = (json.loads((f / "manifest.json").read_text()) for f in (undisturbed, made))
        assert {**before, "settings": None} == {**after, "settings": None}
    return moments


def test_five_kills_lose_nothing(corpus, tmp_path):
    moments = kill_and_go_on(*corpus, tmp_path, kills=5, seed=0)
    assert moments.total() == 5


@pytest.mark.slow
def test_forty_kills_lose_nothing(corpus, tmp_path):
    """Two minutes: pytest -m slow -s tests/data/preparation/test_kills.py shows where the kills hit."""
    moments = kill_and_go_on(*corpus, tmp_path, kills=40, seed=int(os.environ.get("SEED", "1")))
    print("\n40 kills:", ", ".join(f"{count} {moment}" for moment, count in moments.most_common()))
    assert min(moments["in a commit"], moments["between commits"]) > 0


def test_a_kill_while_all_is_put_in_its_place_costs_nothing(corpus, tmp_path, monkeypatch):
    settings, undisturbed = corpus
    own = DataSettings(**{**vars(settings), "root": str(tmp_path), "workers": 1})

    def killed(plan):
        (plan.work_folder / STATE).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.prepare.put_in_place", killed)
        prepare(own)
    monkeypatch.setattr("data.prepare.CorpusWriter", None)  # which nobody needs any more
    made = prepare(own).folder
    assert contents(made) == contents(undisturbed) | {f.name: b"" for f in made.glob(".seen-*")}


def test_files_that_are_shorter_than_they_were_mean_a_fresh_start(corpus, tmp_path, caplog, monkeypatch):
    settings, undisturbed = corpus
    own = DataSettings(**{**vars(settings), "root": str(tmp_path), "workers": 1})
    monkeypatch.setattr("data.sources.corpus.BATCH_CHARS", 2**15)
    monkeypatch.setattr("data.preparation.corpus_writer.COMMIT_SECONDS", 0)

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data.prepare.check", fail)
        prepare(own)
    (work,) = tmp_path.glob(".own-*.tmp")
    os.truncate(work / "train-00000.bin", 1000)
    os.truncate(max(work.glob("train-*.bin")), 10)
    assert prepare(own).folder.name == undisturbed.name
    assert "is shorter than it was; preparing from the start" in caplog.text
