"""C4 as allenai publishes it: gzipped files of JSON lines, whose names say which split they belong to."""

import gzip
import json
from collections.abc import Iterable, Iterator

from data.sources import Document, SourceFile

TRAIN, VALIDATION = "c4-train.", "c4-validation."  # how the names of its files begin
HINT = (
    "huggingface.co/datasets/allenai/c4 has them in its folder en/ (git lfs pull --include 'en/c4-train.0000*,"
    "en/c4-validation.*'); data.paths names that folder"
)


def read_c4(files: Iterable[SourceFile]) -> Iterator[Document]:
    """Yield a document `file#line` for every line's `text`.

    Raises ValueError naming the file that is cut short or no such file.
    """
    for file in files:
        number = 0
        try:
            with gzip.open(file.path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield Document(f"{file.name}#{number}", json.loads(line)["text"])
        except (EOFError, gzip.BadGzipFile, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"data.paths: {file.path} cannot be read after line {number} ({error}); download it again, for "
                "without git lfs pull it is a pointer of a few lines"
            ) from None


def is_validation(name: str) -> bool:
    """Whether a file or document of this name belongs to C4's validation split."""
    return name.rpartition("/")[2].startswith(VALIDATION)


def problems(files: list[SourceFile]) -> list[str]:
    """What is missing among the files; a message each."""
    splits = {is_validation(file.name) for file in files}
    wanted = {False: TRAIN, True: VALIDATION}
    missing = [f"{begin}*.json.gz" for held_out, begin in wanted.items() if held_out not in splits]
    return [f"data.paths: there is no {' and no '.join(missing)}: {HINT}"] if missing else []
