"""Search folders and globs for files, and report everything that the search leaves out."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

EXCLUDED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
NAMED = 1000  # paths kept per remark, to name some of them and to count each of them once

HIDDEN, EXCLUDED = "hidden folders left out", "folders of caches and installed packages left out"
READ_ALREADY, UNREADABLE = "links to folders that are already read", "unreadable paths left out"
BROKEN, SPECIAL = "broken links left out", "sockets, pipes and devices left out"
UNMATCHED, AGAIN = "files left out that match no pattern", "further paths to a file that is already included"
ODD_NAME = "names that are not UTF-8, written with escapes"


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """The first `limit` of `names` and the number of further names, for messages: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def readable(path: str | Path) -> str:
    """`path` as text that can be written in UTF-8: bytes that are not UTF-8 become escapes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


class Remarks:
    """Counts the paths with each remark, such as "broken links left out", and names some of them."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, None]] = {}
        self._further: dict[str, int] = {}

    def add(self, remark: str, path: str | Path) -> None:
        paths, name = self._paths.setdefault(remark, {}), readable(path).replace("\n", "\\n")
        if len(paths) < NAMED:
            paths[name] = None
        elif name not in paths:
            self._further[remark] = self._further.get(remark, 0) + 1

    def __str__(self) -> str:
        """One line with the count and the first paths of each remark; empty without remarks."""
        lines = []
        for remark, paths in self._paths.items():
            count = len(paths) + self._further.get(remark, 0)
            more = f" and {count - 8:,} more" if count > 8 else ""
            lines.append(f"{remark}: {count:,} ({', '.join(sorted(paths)[:8])}{more})")
        return "; ".join(lines)


class FileSearch:
    """Finds regular files under folders by their names. Paths that are left out are added to `remarks`.

    Links to folders are followed, but each folder is searched once, and links come after real folders. So a file is
    found under its real path if the searched folder contains that path.

    Args:
        patterns: Globs for the names of files.
        remarks: Collects the paths that are left out, with the reasons.
    """

    def __init__(self, patterns: Iterable[str], remarks: Remarks) -> None:
        self._patterns, self._remarks = list(patterns), remarks

    def expand(self, path: Path) -> list[Path]:
        """The paths that match the glob `path`. `**` stands for any number of folders that are not hidden."""
        parts = path.parts
        if "**" not in parts:
            return [Path(match) for match in sorted(glob.glob(str(path)))]
        at = parts.index("**")
        tops = [top for top in self.expand(Path(*parts[:at])) if top.is_dir()]
        rest = Path(*parts[at + 1 :]) if at + 1 < len(parts) else Path("*")
        folders = [folder for top in tops for folder, _ in self.walk(top, excluded=set())]
        return [match for folder in folders for match in self.expand(Path(glob.escape(str(folder))) / rest)]

    def files_in(self, folder: Path) -> list[Path]:
        """The files below a folder whose names match a pattern: regular files by path, then links by path."""
        files, links = list[Path](), list[Path]()
        for _, entries in self.walk(folder, EXCLUDED_FOLDERS):
            for entry in entries:
                if (remark := self._file_remark(entry)) is None:
                    (links if entry.is_symlink() else files).append(Path(entry.path))
                else:
                    self._remarks.add(remark, entry.path)
        return sorted(files) + sorted(links)

    def walk(self, top: Path, excluded: set[str]) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
        """`top` and every folder below it, each with its entries that are not folders.

        Hidden folders and folders with `excluded` names are left out.
        """
        seen, folders, links = set[tuple[int, int]](), [top], list[Path]()
        while folders or links:
            if not folders:
                links.sort(reverse=True)
                folders.append(links.pop())
            folder, entries = folders.pop(), list[os.DirEntry[str]]()
            if (listed := self._entries(folder, seen)) is None:
                continue
            for entry in listed:
                if not _is_folder(entry):
                    entries.append(entry)
                elif entry.name.startswith("."):
                    self._remarks.add(HIDDEN, entry.path)
                elif entry.name in excluded:
                    self._remarks.add(EXCLUDED, entry.path)
                else:
                    (links if entry.is_symlink() else folders).append(Path(entry.path))
            yield folder, entries

    def _entries(self, folder: Path, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]] | None:
        """A folder's entries. None for a folder that cannot be read, or whose device and inode are in `seen`."""
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                self._remarks.add(READ_ALREADY, folder)
                return None
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError:
            self._remarks.add(UNREADABLE, folder)
            return None

    def _file_remark(self, entry: os.DirEntry[str]) -> str | None:
        """The reason why an entry that is not a folder is left out; None if it is included."""
        if entry.is_symlink() and (problem := file_problem(entry.path)):
            return problem
        if not any(fnmatch(entry.name, pattern) for pattern in self._patterns):
            return UNMATCHED
        return file_problem(entry.path)


def file_problem(path: str | Path) -> str | None:
    """The reason to leave out a path, as for `Remarks.add`; None for a regular file or a link to one."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else SPECIAL
    except (FileNotFoundError, NotADirectoryError):
        return BROKEN
    except (OSError, ValueError):
        return UNREADABLE


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
