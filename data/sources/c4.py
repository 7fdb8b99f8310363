"""C4 as published by allenai: gzipped JSON lines; the name of a file gives its split."""

from data.sources.files import SourceFile

TRAIN, VALIDATION = "c4-train.", "c4-validation."  # the beginnings of the files' names
C4_HINT = (
    "get the folder en/ of huggingface.co/datasets/allenai/c4 (git lfs pull --include 'en/c4-train.0000*,"
    "en/c4-validation.*') and set data.paths to it"
)


def c4_by_split(files: list[SourceFile]) -> list[SourceFile]:
    """`files`, with `held_out` set for the files of C4's validation split (c4-validation.*)."""
    return [file._replace(held_out=file.name.rpartition("/")[2].startswith(VALIDATION)) for file in files]


def c4_problems(files: list[SourceFile]) -> list[str]:
    """One message if `files`, as from `c4_by_split`, have no file of a split; else an empty list."""
    splits = {file.held_out for file in files}
    wanted = {False: TRAIN, True: VALIDATION}
    missing = [f"{begin}*.json.gz" for held_out, begin in wanted.items() if held_out not in splits]
    return [f"data.paths: there is no {' and no '.join(missing)}; {C4_HINT}"] if missing else []
