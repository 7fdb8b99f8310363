"""Download the corpora of ``benchmarks.quality``: ``python -m benchmarks.corpora [--into runs/corpora]``.

    docs    the documentation of six Python packages, as source text (reStructuredText, Markdown, plain text)
    c       the C and C++ sources of four other Python packages, without generated files

pip downloads source archives of fixed versions, so that the text is the same on every machine.
"""

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CORPORA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # package versions, file suffixes
    "docs": (
        ("Django==5.1.4", "SQLAlchemy==2.0.36", "salt==3006.9", "Sphinx==8.1.3", "celery==5.4.0", "sympy==1.13.3"),
        (".rst", ".txt", ".md"),
    ),
    "c": (
        ("grpcio==1.68.0", "PyNaCl==1.5.0", "pycryptodome==3.21.0", "uvloop==0.21.0"),
        (".c", ".h", ".cc"),
    ),
}
GENERATED = (".upb.", ".upbdefs.", ".upb_minitable.", "uvloop/loop.c", "grpc/_cython/cygrpc", "_table")
LARGEST = 400_000  # bytes; larger files are mostly tables and are left out


def fetch(requirement: str, into: Path) -> Path:
    """Return the path of a package's source archive in the folder ``into``, after a download by pip if it is missing.

    ``requirement`` is NAME==VERSION. An archive of another version in ``into`` is used too.
    """
    name = requirement.partition("==")[0].lower()
    found = [file for file in into.glob("*.tar.gz") if file.name.lower().startswith(f"{name}-")]
    if not found:
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(into)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        return fetch(requirement, into)
    return found[0]


def texts(archive: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of the files in ``archive`` that end in one of ``suffixes``, sorted by name.

    Generated files, and files of more than 400,000 bytes, are left out.
    """
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            wanted = member.isfile() and PurePosixPath(member.name).suffix in suffixes and member.size <= LARGEST
            if wanted and not any(part in member.name for part in GENERATED):
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path("runs/corpora"), help="output folder (default: %(default)s)")
    arguments = parser.parse_args()
    archives = arguments.into / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for corpus, (requirements, suffixes) in CORPORA.items():
        size = 0
        for requirement in requirements:
            for name, text in texts(fetch(requirement, archives), suffixes):
                file = arguments.into / corpus / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text)
                size += len(text)
        print(f"{corpus}: {size / 1e6:.1f} MB in {arguments.into / corpus}")


if __name__ == "__main__":
    main()
