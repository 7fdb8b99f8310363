"""Show a prepared dataset: its counts, decoded documents, and whether its files are intact.

python -m data.inspect prepared/stdlib-83b67effc85a --document 0 1 17
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import sha256
from data.shards.reader import Tokens
from data.sources.file_search import shorten
from data.token_dataset import MANIFEST, PreparedDataset, describe, load
from data.wording import counted

BLOCK = 2**24


def damages(prepared: PreparedDataset) -> Iterator[str]:
    """Yield one line per damage: a wrong checksum or count, or tokens that do not match the index or the vocabulary."""
    for split, entry in prepared.manifest["splits"].items():
        for shard in entry["shards"]:
            for name, file in shard["files"].items():
                if sha256(prepared.folder / name) != file["sha256"]:
                    yield f"{prepared.folder / name}: its checksum differs from the manifest's"
        yield from (f"{split}: {problem}" for problem in _index_problems(prepared, getattr(prepared, split), entry))


def _index_problems(prepared: PreparedDataset, tokens: Tokens, entry: dict[str, Any]) -> Iterator[str]:
    counts = {"documents": tokens.document_count, "tokens": len(tokens), "bytes": tokens.text_bytes}
    for key, count in counts.items():
        if entry[key] != count:
            yield f"has {count} {key} instead of {entry[key]}"
    lengths = tokens.document_lengths
    if lengths.min() < 2:
        yield f"the index is out of order at document {int(lengths.argmin())}"
        return
    for start in range(0, len(tokens), BLOCK):
        if (largest := int(tokens[start : start + BLOCK].max())) >= prepared.tokenizer.vocab_size:
            yield f"has token {largest}, beyond the vocabulary of {prepared.tokenizer.vocab_size}"
    for number in np.linspace(0, len(lengths) - 1, num=min(len(lengths), 1000)).astype(int).tolist():
        ids = tokens.document(number)
        if (ids[0], ids[-1]) != (prepared.tokenizer.bos_id, prepared.tokenizer.eos_id):
            yield f"document {number} does not begin with bos and end with eos"


def show(prepared: PreparedDataset, split: str, number: int, chars: int) -> str:
    """Document `number` (from 0) of `split` (train or val), to be printed: name, number of tokens, text.

    At most `chars` characters of the text are shown.
    """
    tokens: Tokens = getattr(prepared, split)
    start, stop = tokens.document_bounds(number)
    (name,) = tokens.documents(start, stop)
    text = prepared.tokenizer.decode(tokens[start:stop])
    cut = f"\n… and {len(text) - chars:,} characters more" if len(text) > chars else ""
    return f"--- {split} document {number}, {name}: {stop - start:,} tokens\n{text[:chars]}{cut}"


def _open(folder: Path, split: str, numbers: list[int] | None) -> tuple[PreparedDataset, list[int]]:
    """The dataset, and the numbers of the documents to show. Raises ValueError if either does not exist."""
    if folder.is_dir() and not (folder / MANIFEST).exists():
        below = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}"))
        hint = f"name one of {shorten(below)}" if below else "name the folder of a prepared dataset"
        raise ValueError(f"{folder} is not a prepared dataset, because it has no {MANIFEST}; {hint}")
    prepared = load(folder)
    count = getattr(prepared, split).document_count
    if wrong := [number for number in numbers or [] if not 0 <= number < count]:
        raise ValueError(f"--document: {split} has documents 0 to {count - 1}, not {wrong[0]}")
    return prepared, list(range(min(2, count))) if numbers is None else numbers


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.inspect", description=__doc__.partition("\n")[0])
    p.add_argument("folder", type=Path, help="a prepared dataset (prepared/…)")
    p.add_argument("--split", default="train", choices=("train", "val"), help="default: train")
    p.add_argument("--document", type=int, nargs="*", metavar="N", help="documents to show (default: the first two)")
    p.add_argument("--chars", type=int, default=500, help="maximum characters of each document (default: 500)")
    p.add_argument(
        "--no-checksums", action="store_true", help="skip the check of checksums and tokens, which reads all shards"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts and some documents of a prepared dataset, and check its files.

    Exits with 1 if checksums, counts or tokens are wrong, and with 2 and a message if the dataset cannot be opened or
    the arguments are wrong. `arguments` are the words after the command's name; None takes them from the command line.
    """
    args = parser().parse_args(arguments)
    try:
        if args.chars < 0:
            raise ValueError(f"--chars: {args.chars} must be at least 0")
        prepared, numbers = _open(args.folder, args.split, args.document)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(describe(prepared.manifest, prepared.folder))
    for split, entry in prepared.manifest["splits"].items():
        for shard in entry["shards"]:
            print(f"{split}  {shard['name']}: {shard['tokens']:,} tokens of {counted(shard['documents'], 'document')}")
    for reason, skipped in prepared.manifest["corpus"].get("skipped_counts", {}).items():
        print(f"skipped {skipped:,} {reason}")
    if changed := prepared.manifest["corpus"].get("changed", 0):
        print(f"the tokenizer changes {counted(changed, 'document')}: the tokens decode to another text")
    for number in numbers:
        print(show(prepared, args.split, number, args.chars))
    if not args.no_checksums:
        found = list(damages(prepared))
        found += [f"{prepared.folder} is damaged; delete the folder to prepare it again"] if found else []
        print("\n".join(found) or "all checksums are correct, and the tokens match the index")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback if a reader such as `head` closes the pipe
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may lack characters
    main()
