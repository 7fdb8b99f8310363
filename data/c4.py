"""C4 as allenai publishes it: gzipped files of JSON lines, whose names say which split they belong to."""

from data.sources import SourceFile

TRAIN, VALIDATION = "c4-train.", "c4-validation."  # how the names of its files begin
HINT = (
    "huggingface.co/datasets/allenai/c4 has them in its folder en/ (git lfs pull --include 'en/c4-train.0000*,"
    "en/c4-validation.*'); data.paths names that folder"
)


def by_split(files: list[SourceFile]) -> list[SourceFile]:
    """The files, those of C4's validation split held out."""
    return [file._replace(held_out=file.name.rpartition("/")[2].startswith(VALIDATION)) for file in files]


def problems(files: list[SourceFile]) -> list[str]:
    """What is missing among the files of ``by_split``; a message each."""
    splits = {file.held_out for file in files}
    wanted = {False: TRAIN, True: VALIDATION}
    missing = [f"{begin}*.json.gz" for held_out, begin in wanted.items() if held_out not in splits]
    return [f"data.paths: there is no {' and no '.join(missing)}: {HINT}"] if missing else []
