"""Nothing of a corpus is left out, merged or renamed without being named and counted in one line of the log."""

import errno
import logging
import os
import socket

import pytest

from data.sources import files
from data.sources.files import text_files

PATTERNS, ENOUGH = ["*.txt"], 10**9


@pytest.fixture(autouse=True)
def _log_again(caplog):
    """A line is logged once in a process; here once in a test."""
    caplog.set_level(logging.INFO)
    files._log_once.cache_clear()


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    return root


def found(*paths, patterns=PATTERNS):
    return [file.name for file in text_files(map(str, paths), patterns, ENOUGH)]


def link_to_folder(root):
    write(root.parent, "other/b/f.txt")
    (root / "link").symlink_to("../other")


def link_to_parent(root):
    (root / "a" / "up").symlink_to("..")


def link_to_itself(root):
    (root / "a" / "self").symlink_to("self")


def two_links_in_a_circle(root):
    write(root, "b/g.txt")
    (root / "a" / "to_b").symlink_to("../b")
    (root / "b" / "to_a").symlink_to("../a")


def link_above(root):
    (root / "above").symlink_to(root.parent)


def link_to_a_link(root):
    write(root.parent, "other/f.txt")
    (root / "first").symlink_to("second")
    (root / "second").symlink_to("../other")


def broken_link(root):
    (root / "a" / "broken.txt").symlink_to("/nowhere/blob")


def broken_link_of_any_name(root):
    (root / "a" / "disk").symlink_to("/nowhere/disk")


def link_to_a_file_that_is_there(root):
    (root / "again.txt").symlink_to("a/f.txt")


def link_to_a_file_elsewhere(root):
    write(root.parent, "other/blob")
    (root / "f.txt").symlink_to("../other/blob")


def hidden_folder(root):
    write(root, ".git/g.txt")


def hidden_link(root):
    write(root.parent, "other/f.txt")
    (root / ".link").symlink_to("../other")


def hidden_file(root):
    write(root, "a/.f.txt")


def packages(root):
    write(root, "site-packages/g.txt", "b/__pycache__/h.txt")


def pipe(root):
    os.mkfifo(root / "a" / "pipe.txt")


def bound_socket(root):
    here = os.getcwd()
    os.chdir(root)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s.txt")
    os.chdir(here)


def no_pattern(root):
    write(root, "a/f.rst", "a/g.png", "README")


def odd_name(root):
    for name in (b"\xe9.txt", b"\xe8.txt"):
        with open(os.path.join(os.fsencode(root), name), "w") as file:
            file.write(name.hex())


CASES = {
    link_to_folder: (["r/a/f.txt", "r/link/b/f.txt"], ""),
    link_to_parent: (["r/a/f.txt"], "links to folders that are already read: 1 (R/a/up)"),
    link_to_itself: (["r/a/f.txt"], "unreadable paths left out: 1 (R/a/self)"),
    two_links_in_a_circle: (["r/a/f.txt", "r/b/g.txt"], "already read: 2 (R/a/to_b, R/b/to_a)"),
    link_above: (["r/a/f.txt"], "links to folders that are already read: 1 (R/above/r)"),
    link_to_a_link: (["r/a/f.txt", "r/first/f.txt"], "links to folders that are already read: 1 (R/second)"),
    broken_link: (["r/a/f.txt"], "broken links left out: 1 (R/a/broken.txt)"),
    broken_link_of_any_name: (["r/a/f.txt"], "broken links left out: 1 (R/a/disk)"),
    link_to_a_file_that_is_there: (["r/a/f.txt"], "further paths to a file that is already included: 1 (R/again.txt)"),
    link_to_a_file_elsewhere: (["r/a/f.txt", "r/f.txt"], ""),
    hidden_folder: (["r/a/f.txt"], "hidden folders left out: 1 (R/.git)"),
    hidden_link: (["r/a/f.txt"], "hidden folders left out: 1 (R/.link)"),
    hidden_file: (["r/a/.f.txt", "r/a/f.txt"], ""),
    packages: (["r/a/f.txt"], "caches and installed packages left out: 2 (R/b/__pycache__, R/site-packages)"),
    pipe: (["r/a/f.txt"], "sockets, pipes and devices left out: 1 (R/a/pipe.txt)"),
    bound_socket: (["r/a/f.txt"], "sockets, pipes and devices left out: 1 (R/s.txt)"),
    no_pattern: (["r/a/f.txt"], "files left out that match no pattern: 3 (R/README, R/a/f.rst, R/a/g.png)"),
    odd_name: (
        ["r/\\udce8.txt", "r/\\udce9.txt", "r/a/f.txt"],
        "names that are not UTF-8, written with escapes: 2 (R/\\udce8.txt, R/\\udce9.txt)",
    ),
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_is_beside_the_files_is_followed_or_named(tmp_path, caplog, make):
    root = write(tmp_path / "r", "a/f.txt")
    make(root)
    names, remark = CASES[make]
    assert found(root) == names
    assert found(root) == names  # and the line is not repeated
    assert len(caplog.messages) == (1 if remark else 0)
    if remark:
        assert caplog.messages[0].startswith("data.paths: ") and remark.replace("R/", f"{root}/") in caplog.messages[0]


def test_all_remarks_are_in_one_line(tmp_path, caplog):
    root = write(tmp_path / "r", "a/f.txt")
    for make in (broken_link, hidden_folder, pipe, no_pattern):
        make(root)
    assert found(root) == ["r/a/f.txt"]
    (message,) = caplog.messages
    assert message.count(": 1 (") == 3 and message.count("; ") == 3


def test_many_paths_are_counted_and_the_first_named(tmp_path, caplog):
    root = write(tmp_path / "r", "f.txt", *(f"{number:04}.png" for number in range(1234)))
    assert found(root) == ["r/f.txt"]
    assert "match no pattern: 1,234 (" in caplog.text and " and 1,226 more)" in caplog.text


@pytest.mark.parametrize("glob", ["**/*.txt", "**", "*/**/*.txt", "a/../**/f*"])
def test_globs_end_where_links_go_in_circles(tmp_path, glob):
    """Followed again and again, two such links in a folder are 2^40 paths."""
    root = write(tmp_path / "r", "a/f.txt", "a/.hidden/g.txt")
    for name in ("one", "two"):
        (root / "a" / name).symlink_to("..")
        (root / name).symlink_to(".")
    assert found(root / glob) == ["r/a/f.txt"]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*/*.txt", ["r/a/f.txt", "r/link/f.txt"]),
        ("**/*.md", ["r/a/b/d.md", "r/e.md"]),
        ("**/b", ["r/a/b/c.txt"]),
        ("a/**", ["r/a/b/c.txt", "r/a/b/d.md", "r/a/f.txt"]),
        ("**/[c-f].*", ["r/a/b/c.txt", "r/a/b/d.md", "r/a/f.txt", "r/e.md", "r/link/f.txt"]),
    ],
)
def test_globs_find_files_and_folders(tmp_path, glob, names):
    root = write(tmp_path / "r", "a/f.txt", "a/b/c.txt", "a/b/d.md", "e.md")
    write(tmp_path, "other/f.txt")
    (root / "link").symlink_to("../other")
    prefix = "a/" if glob.startswith("a/") else "r/"
    assert found(root / glob) == [name.replace("r/a/", prefix) if prefix == "a/" else name for name in names]


def test_what_a_glob_cannot_read_is_named(tmp_path, caplog):
    root = write(tmp_path / "r", "f.txt")
    os.mkfifo(root / "g.txt")
    (root / "h.txt").symlink_to("/nowhere")
    assert found(root / "*.txt") == ["r/f.txt"]
    assert "broken links left out: 1" in caplog.text and "sockets, pipes and devices left out: 1" in caplog.text


def test_a_folder_that_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
    root, scan = write(tmp_path / "r", "f.txt", "closed/g.txt"), os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert found(root) == ["r/f.txt"]
    assert f"unreadable paths left out: 1 ({root}/closed)" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no file or folder P; check data.paths"),
        ("broken", "P is a link to /nowhere/blob, which does not exist; check data.paths"),
        ("pipe", "P is a socket, pipe or device, not a file; check data.paths"),
        ("circle", "P cannot be read (Too many levels of symbolic links); check data.paths"),
        ("f.txt/g.txt", "there is no file or folder P; check data.paths"),
        ("x" * 300, "P cannot be read (File name too long); check data.paths"),
        ("nul\0", "P cannot be read (embedded null byte); check data.paths"),
        ("*.rst", "no file matches P; check data.paths"),
        ("folder", "P contains no *.txt file; check data.paths or data.patterns"),
        ("\udce9", "there is no file or folder P; check data.paths"),
    ],
)
def test_a_path_that_leads_to_no_file_is_refused(tmp_path, name, message):
    write(tmp_path, "f.txt")
    (tmp_path / "broken").symlink_to("/nowhere/blob")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError) as error:
        found(tmp_path / "f.txt", str(tmp_path / name))
    shown = str(tmp_path / name).encode("utf-8", "backslashreplace").decode()
    assert str(error.value) == f"data.paths: {message.replace('P', shown)}"


def test_a_file_keeps_its_own_name_where_links_lead_to_it_as_well(tmp_path):
    """The name decides the order and the split of the names: links that are added must not change it."""
    root = write(tmp_path / "r", "m/f.txt")
    (root / "a").symlink_to("m")
    (root / "b.txt").symlink_to("m/f.txt")
    assert found(root) == ["r/m/f.txt"]


def test_files_that_are_also_for_validation_are_named(tmp_path, caplog):
    root = write(tmp_path / "r", "a.txt", "held/b.txt")
    both = [root, root / "held"]
    train, own = (text_files([str(path)], PATTERNS, ENOUGH) for path in both)
    assert [(file.name, file.held_out) for file in files.with_held_out(train, own)] == [
        ("r/a.txt", False),
        ("held/b.txt", True),
    ]
    assert "1 file of data.paths is used only for validation (r/held/b.txt)" in caplog.text


def test_a_line_of_the_log_stays_one_line(tmp_path, caplog):
    root = write(tmp_path / "r", "a.txt", "b\n.png")
    assert found(root) == ["r/a.txt"] and f"{root}/b\\n.png" in caplog.messages[0]


def test_files_left_out_for_their_size_are_named(tmp_path, caplog):
    root = write(tmp_path / "r", "a.txt", "b.txt")
    (file,) = text_files([str(root)], PATTERNS, 13)
    other = {"r/a.txt": "r/b.txt", "r/b.txt": "r/a.txt"}[file.name]
    assert f"left out 1 of 2 files (0.0 MB: {other}) to stay within data.max_bytes=13" in caplog.text
