"""Files beside those of a run never matter, whatever they are; a run's own files have the modes that the umask says."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.directory import newest_good, path_of
from pretrain.inference.hf_export import export
from pretrain.inference.pretrained import load_pretrained
from tests.pretrain.checkpoint.test_directory import copied, finished, overrides, train  # noqa: F401


def file(name, content=b"", mode=0o644):
    def put(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    return put


BESIDE = {
    "NFS, a file that was deleted while open": file(".nfs000000000000000100000001"),
    "macOS": file(".DS_Store"),
    "macOS, beside the tensors": file("._shard-00001-model-00001-of-00001.safetensors", b"\0\5\x16\7"),
    "Windows": file("Thumbs.db"),
    "Synology": file("@eaDir/state.json@SynoEAStream"),
    "an editor": file("state.json~", b"{}"),
    "another editor": file(".state.json.swp"),
    "a copy": file("state (1).json", b'{"format": 1}'),
    "checksums": file("SHA256SUMS", b"0  state.json\n"),
    "tensors of others": file("extra.safetensors", b"none"),
    "half-written": file("manifest.json.tmp", b"{"),
    "unreadable": file("secret", b"x", mode=0),
    "a name that is not UTF-8": file(os.fsdecode(b"\xff\xfe")),
    "a link to nothing": lambda folder: (folder / "link").symlink_to("nowhere"),
    "a link to itself": lambda folder: (folder / "loop").symlink_to("loop"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
}


@pytest.mark.parametrize("put", BESIDE.values(), ids=BESIDE)
def test_a_file_that_the_manifest_does_not_name_takes_nothing_away(copied, put):  # noqa: F811
    folder = copied[0] / "checkpoints"
    newest = path_of(folder, 8)
    put(newest)
    put(folder)
    assert newest_good(folder) == (newest, [])
    load_pretrained(newest)


def test_a_run_resumes_and_prunes_with_all_of_them_in_its_folders(copied, overrides, finished, tmp_path):  # noqa: F811
    path, where = copied
    shutil.copytree(finished.path, tmp_path / "clean" / "finished", symlinks=True)
    for put in BESIDE.values():
        for folder in (path, path / "checkpoints", *(path / "checkpoints").glob("step-*")):
            put(folder)
    (path / "notes.tmp").write_text("mine")
    (path / "checkpoints" / "step-00000016").write_text("a file")
    (path / "checkpoints" / "step-00000008-copy").mkdir()
    folder, _ = train(overrides(*where, "train.steps=12", "train.keep_last=1"))
    clean, _ = train(overrides(f"run.root={tmp_path / 'clean'}", "run.name=finished", "train.steps=12"))
    ours, theirs = (load_file(next(path_of(f.checkpoints, 12).glob("shard*"))) for f in (folder, clean))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (path / "notes.tmp").read_text() == "mine" and (path / "checkpoints" / "manifest.json.tmp").exists()
    left = {p.name for p in folder.checkpoints.glob("step-*")}
    assert left == {"step-00000012", "step-00000016", "step-00000008-copy"}


def test_a_folder_with_hidden_files_alone_is_a_new_run_s(overrides, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    for name in (".DS_Store", ".nfs000000000000000100000001", ".gitkeep"):
        (tmp_path / "run" / name).touch()
    folder, trainer = train(overrides(f"run.root={tmp_path}", "run.name=run", "train.steps=2", "optim.warmup_steps=1"))
    assert trainer.step == 2 and (folder.path / ".gitkeep").exists()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_all_files_have_the_modes_of_the_umask_whatever_the_corpus_has(overrides, root, tmp_path, umask):  # noqa: F811
    shutil.copytree(root / "optim", tmp_path / "text", ignore=shutil.ignore_patterns("__pycache__"))
    for text in (tmp_path / "text").iterdir():
        text.chmod(0o400)
    before = os.umask(umask)
    try:
        own = [
            f"run.root={tmp_path / 'runs'}",
            f"data.root={tmp_path / 'prepared'}",
            f"data.paths=[{tmp_path / 'text'}]",
        ]
        folder, _ = train(overrides(*own, "run.name=run", "train.steps=5", "train.profile=1", "train.sample_tokens=2"))
        export(folder.path, tmp_path / "runs" / "exported")
    finally:
        os.umask(before)
    ours = [path for top in ("runs", "prepared") for path in Path(tmp_path, top).rglob("*") if not path.is_symlink()]
    modes = {path: path.stat().st_mode & 0o777 for path in ours}
    assert len(modes) > 25
    assert {
        path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    } == {}
