"""What lies in the folders of preparations: what cannot be there is refused early, what is not ours does not matter."""

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import data.prepare
from data.inspect import damages
from data.prepare import find, prepare, problems
from data.settings import DataSettings
from data.shards.writer import ShardWriter
from data.sources.files import stdlib_files
from data.token_dataset import load
from tests.helpers import without_rights

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders") / "corpus"
    folder.mkdir()
    for number, file in enumerate([file for file in stdlib_files(10**9) if 200 < file.size < 5_000][:30]):
        shutil.copyfile(file.path, folder / f"{number:02d}.py")
    return str(folder)


@pytest.fixture
def settings(corpus, tmp_path):
    return DataSettings(
        name="own", source="text", paths=[corpus], vocab_size=400, validation_share=0.2, workers=1,
        root=str(tmp_path / "prepared"),
    )  # fmt: skip


@contextmanager
def unprivileged(settings):
    """Not as root: yields a folder for the test, and settings with the corpus in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(settings.paths[0], folder / "corpus")
    try:
        with without_rights(folder):
            yield folder, replace(settings, paths=[str(folder / "corpus")])
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(folder)


def a_file(folder):
    (folder / "file").touch()
    return folder / "file"


def a_link(folder, target):
    (folder / "link").symlink_to(target)
    return folder / "link"


def read_only(folder):
    (folder / "locked").mkdir(mode=0o555)
    return folder / "locked"


def a_fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


# What data.root is, made in a folder → words of the message.
ROOTS = {
    "a file": (a_file, "is a file"),
    "below a file": (lambda folder: a_file(folder) / "prepared", "is a file"),
    "far below a file": (lambda folder: a_file(folder) / "a" / "b", "is a file"),
    "a link to a file": (lambda folder: a_link(folder, a_file(folder)), "is a file"),
    "a link to nothing": (lambda folder: a_link(folder, folder / "gone"), "is a broken link"),
    "a link to itself": (lambda folder: a_link(folder, "link"), "is a broken link"),
    "below a link to nothing": (lambda folder: a_link(folder, folder / "gone") / "a", "is a broken link"),
    "a pipe": (a_fifo, "is a file"),
    "a device": (lambda folder: Path("/dev/null"), "is a file"),
    "read-only": (read_only, "cannot write"),
    "below a read-only folder": (lambda folder: read_only(folder) / "a" / "b", "cannot write"),
    "on a file system of the kernel": (lambda folder: Path("/proc/prepared"), "cannot write"),
    "a folder of the kernel": (lambda folder: Path("/proc/self"), "cannot write"),
    "a name that is too long": (lambda folder: folder / ("n" * 256), "longer than 255 bytes"),
    "a name of too many bytes": (lambda folder: folder / ("é" * 128), "longer than 255 bytes"),
    "too long further up": (lambda folder: folder / ("n" * 300) / "a", "longer than 255 bytes"),
    "a path that is too long": (lambda folder: folder.joinpath(*["n" * 200] * 30), "cannot write"),
    "a null byte": (lambda folder: folder / "a\0b", "cannot write"),
}


def never_read(*given):
    raise AssertionError("the corpus is read")


@pytest.mark.parametrize("kind", ROOTS)
def test_a_root_that_cannot_be_is_refused_before_the_corpus_is_read(settings, monkeypatch, kind):
    make, words = ROOTS[kind]
    monkeypatch.setattr(data.prepare, "Corpus", never_read)
    with unprivileged(settings) as (folder, own):
        own = replace(own, root=str(make(folder)))
        (problem,) = problems(own)
        assert problem.startswith("data.root: ") and words in problem and problem.endswith("choose another folder")
        assert len(problem) < 500 and "Errno" not in problem
        with pytest.raises(ValueError) as refused:
            prepare(own)
        assert str(refused.value) == problem and find(own) is None
        assert not [path for path in folder.rglob("*") if "write-test" in path.name]


@pytest.mark.parametrize("make", [lambda f: f, lambda f: f / "a" / "b", lambda f: a_link(f, f / "..")])
def test_a_root_that_can_be_made_is_no_problem_and_is_not_made_by_asking(settings, tmp_path, make):
    (tmp_path / "own").mkdir()
    root = make(tmp_path / "own")
    before = sorted(tmp_path.rglob("*"))
    assert problems(replace(settings, root=str(root))) == [] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["n" * 234, "n" * 300, "ä" * 117, "日" * 78, "n" * 5000])
def test_a_name_that_makes_too_long_a_folder_is_refused_with_the_bytes_to_save(settings, monkeypatch, name):
    monkeypatch.setattr(data.prepare, "Corpus", never_read)
    (problem,) = problems(replace(settings, name=name))
    assert problem.startswith("data.name: ") and len(problem) < 300
    assert f"shorten data.name by at least {len(name.encode()) - 233} bytes" in problem
    with pytest.raises(ValueError, match=r"data\.name: "):
        prepare(replace(settings, name=name))


@pytest.mark.parametrize("name", ["n" * 233, "ä" * 116, "日" * 77])
def test_the_longest_names_are_prepared(settings, name):
    assert prepare(replace(settings, name=name)).folder.name.startswith(name)


def test_the_corpora_of_a_mixture_are_checked_too(settings, tmp_path):
    model = str(prepare(settings).folder / "tokenizer.model")
    parts = [{"weight": 1, "paths": settings.paths, "name": "n" * 240}, {"weight": 1, "paths": settings.paths}]
    own = replace(settings, source="mixture", paths=[], tokenizer=model, mixture=parts, root=str(a_file(tmp_path)))
    found = problems(own)
    assert [line.split(":")[0] for line in found] == ["data.name", "data.root", "data.root"]
    assert found[0].endswith(f"(in {'n' * 240})") and found[2].endswith("(in own-1)")


def test_a_complete_preparation_is_opened_where_nothing_can_be_written(settings):
    with unprivileged(settings) as (folder, own):
        own = replace(own, root=str(folder / "prepared"))
        prepared = prepare(own)
        for path in [*(folder / "prepared").rglob("*"), folder / "prepared"]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert problems(own) == []
        assert prepare(own).fingerprint == find(own).fingerprint == prepared.fingerprint
        assert problems(replace(own, seed=1))[0].startswith("data.root: cannot write to ")


def test_a_full_disk_is_said_and_what_is_written_stays(settings, monkeypatch, caplog):
    undisturbed = prepare(replace(settings, root=f"{settings.root}-other"))
    add, added = ShardWriter.add, []

    def until_full(shard, *given):
        if len(added) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        added.append(given)
        add(shard, *given)

    monkeypatch.setattr("data.sources.corpus.BATCH_CHARS", 2**12)
    monkeypatch.setattr("data.preparation.corpus_writer.COMMIT_SECONDS", 0)
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", until_full)
        with pytest.raises(ValueError, match=rf"^data\.root: {settings.root} is full; free space, and the same"):
            prepare(settings)
    with caplog.at_level("INFO"):
        assert prepare(settings).fingerprint == undisturbed.fingerprint
    assert "resuming after" in caplog.text


# Files beside ours.


def a_socket(folder):
    with socket.socket(socket.AF_UNIX) as own:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        try:
            own.bind("a.socket")
        finally:
            os.chdir(here)


def unreadable(folder):
    (folder / "unreadable").write_text("?")
    (folder / "unreadable").chmod(0)


def other_names(folder):
    (folder / "special_tokens.json").write_text('{"bos": "</s>", "eos": "<unk>"}')


# What lies in a folder besides our files.
STRAY = {
    "deleted while open": lambda folder: (folder / ".nfs000000000001").write_bytes(b"x" * 100),
    "of a desktop": lambda folder: (folder / ".DS_Store").touch(),
    "of an editor": lambda folder: (folder / "manifest.json~").write_text("{"),
    "half a manifest": lambda folder: (folder / "manifest.json.tmp").write_text('{"form'),
    "a folder": lambda folder: (folder / "a folder" / "in it").mkdir(parents=True),
    "a link to nothing": lambda folder: (folder / "link").symlink_to("gone"),
    "a link to its own folder": lambda folder: (folder / "link").symlink_to("."),
    "a pipe": a_fifo,
    "a socket": a_socket,
    "an unreadable file": unreadable,
    "a name that is no text": lambda folder: (folder / os.fsdecode(b"\xff\xfe")).touch(),
    "another shard": lambda folder: (folder / "train-00009.bin").write_bytes(b"123"),
    "another tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "other ends of documents": other_names,
    "broken names of special tokens": lambda folder: (folder / "special_tokens.json").write_text("{"),
    "another mark": lambda folder: (folder / ".seen-0123456789abcdef").touch(),
}


@pytest.mark.parametrize("kind", STRAY)
def test_a_file_beside_ours_does_not_matter_in_a_complete_preparation(settings, kind):
    prepared = prepare(settings)
    STRAY[kind](prepared.folder)
    for opened in (prepare(settings), find(settings), load(prepared.folder)):
        assert opened.fingerprint == prepared.fingerprint and list(damages(opened)) == []
        assert (opened.tokenizer.bos_id, opened.tokenizer.eos_id) == (
            prepared.tokenizer.bos_id,
            prepared.tokenizer.eos_id,
        )


@pytest.mark.parametrize("kind", [kind for kind in STRAY if "names" not in kind and "ends" not in kind])
def test_a_file_beside_ours_does_not_matter_while_it_is_made(settings, monkeypatch, kind):
    undisturbed = prepare(replace(settings, root=f"{settings.root}-other"))
    check = data.prepare.check

    def with_a_stray_file(writer, shards, corpus):
        (work,) = Path(settings.root).glob(".own-*.tmp")
        STRAY[kind](work)
        check(writer, shards, corpus)

    monkeypatch.setattr(data.prepare, "check", with_a_stray_file)
    prepared = prepare(settings)
    assert prepared.fingerprint == undisturbed.fingerprint and prepared.folder.name == undisturbed.folder.name
    assert find(settings) is not None


def test_a_file_that_cannot_be_deleted_does_not_end_a_preparation(settings, monkeypatch):
    """NFS keeps a deleted file that is open as .nfs…, and refuses to delete that."""
    unlink = Path.unlink

    def busy(path, *given, **keywords):
        if path.name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        unlink(path, *given, **keywords)

    monkeypatch.setattr(Path, "unlink", busy)
    test_a_file_beside_ours_does_not_matter_while_it_is_made(settings, monkeypatch, "deleted while open")
    assert (find(settings).folder / ".nfs000000000001").exists()


# What lies in data.root under names like ours.
ROOT_STRAY = {
    "a file with a folder's name": lambda root: (root / "own-0123456789ab").touch(),
    "an empty folder": lambda root: (root / "own-0123456789ab").mkdir(),
    "a folder without a readable manifest": lambda root: [
        (root / "own-0123456789ab").mkdir(), (root / "own-0123456789ab" / "manifest.json").write_text("[]"),
    ],
    "a manifest that is a folder": lambda root: (root / "own-0123456789ab" / "manifest.json").mkdir(parents=True),
    "a manifest that is a link to nothing": lambda root: [
        (root / "own-0123456789ab").mkdir(), (root / "own-0123456789ab" / "manifest.json").symlink_to("gone"),
    ],
    "a file with a work folder's name": lambda root: (root / ".own-0123456789abcdef.tmp").touch(),
    "an empty work folder": lambda root: (root / ".own-0123456789abcdef.tmp").mkdir(),
    "a link to nothing": lambda root: (root / "own-0123456789ab").symlink_to("gone"),
    "of a file system": lambda root: (root / "lost+found").mkdir(mode=0),
    "an earlier lock": lambda root: (root / ".own.lock").write_text("123"),
}  # fmt: skip


@pytest.mark.parametrize("source", ["text", "records"])
@pytest.mark.parametrize("kind", ROOT_STRAY)
def test_what_lies_in_the_root_does_not_matter(settings, tmp_path, kind, source):
    (tmp_path / "records").mkdir()
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(Path(settings.paths[0]).iterdir())]
    (tmp_path / "records" / "a.jsonl").write_text("\n".join(lines))
    if source == "records":
        settings = replace(settings, source="records", paths=[str(tmp_path / "records")], patterns=["*.jsonl"])
    Path(settings.root).mkdir()
    ROOT_STRAY[kind](Path(settings.root))
    assert prepare(settings).fingerprint == prepare(replace(settings, root=str(tmp_path / "other"))).fingerprint


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_files_and_folders_have_the_modes_of_the_umask(settings, tmp_path, umask):
    model = tmp_path / "t.model"
    shutil.copyfile(prepare(settings).folder / "tokenizer.model", model)
    before = os.umask(umask)
    try:
        roots = [prepare(replace(settings, root=str(tmp_path / name), tokenizer=own)).folder.parent
                 for name, own in (("trained", None), ("given", str(model)))]  # fmt: skip
    finally:
        os.umask(before)
    for path in [path for root in roots for path in [root, *root.rglob("*")] if not path.name.endswith(".lock")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


# File systems without locks.

WITHOUT_LOCKS = """
import fcntl, json, os, sys
from data.prepare import main, prepare
from data.settings import DataSettings
def flock(descriptor, operation):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))
fcntl.flock = flock
prepared = prepare(DataSettings(**json.loads(sys.argv[1])))
print(prepared.folder, prepared.fingerprint)
"""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_prepared_on(settings, code):
    """Three processes at once make one preparation there too."""
    command = [sys.executable, "-c", WITHOUT_LOCKS, json.dumps(vars(settings)), str(code)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, cwd=REPO, **pipes) for _ in range(3)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert any("has no locks" in said and os.strerror(code) in said for _, said in outputs)
    assert sorted(path.name.partition("-")[0] for path in Path(settings.root).iterdir()) == [".own.lock", "own"]
