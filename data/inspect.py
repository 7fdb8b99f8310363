"""What a preparation holds: its counts, its shards held to their checksums, and documents decoded.

python -m data.inspect prepared/stdlib-83b67effc85a --document 0 1 17
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import sha256
from data.shards.reader import Tokens
from data.token_dataset import PreparedDataset, describe, load

BLOCK = 2**24


def damages(prepared: PreparedDataset) -> Iterator[str]:
    """What is wrong in the files, a line each: another checksum, or tokens and index that do not fit each other."""
    for split, entry in prepared.manifest["splits"].items():
        for shard in entry["shards"]:
            for name, file in shard["files"].items():
                if sha256(prepared.folder / name) != file["sha256"]:
                    yield f"{prepared.folder / name}: has another checksum than the manifest"
        yield from (f"{split}: {problem}" for problem in _unfit(prepared, getattr(prepared, split), entry))


def _unfit(prepared: PreparedDataset, tokens: Tokens, entry: dict[str, Any]) -> Iterator[str]:
    counts = {"documents": tokens.document_count, "tokens": len(tokens), "bytes": tokens.text_bytes}
    for key, count in counts.items():
        if entry[key] != count:
            yield f"holds {count} {key} instead of {entry[key]}"
    lengths = tokens.document_lengths
    if lengths.min() < 2:
        yield f"the index is not in order at document {int(lengths.argmin())}"
        return
    for start in range(0, len(tokens), BLOCK):
        if (largest := int(tokens[start : start + BLOCK].max())) >= prepared.tokenizer.vocab_size:
            yield f"holds token {largest}, beyond the vocabulary of {prepared.tokenizer.vocab_size}"
    for number in np.linspace(0, len(lengths) - 1, num=min(len(lengths), 1000)).astype(int).tolist():
        ids = tokens.document(number)
        if (ids[0], ids[-1]) != (prepared.tokenizer.bos_id, prepared.tokenizer.eos_id):
            yield f"document {number} does not lie between bos and eos"


def show(prepared: PreparedDataset, split: str, number: int, chars: int) -> str:
    """A document's name, size and text, for people."""
    tokens: Tokens = getattr(prepared, split)
    start, stop = tokens.document_bounds(number)
    (name,) = tokens.documents(start, stop)
    text = prepared.tokenizer.decode(tokens[start:stop])
    cut = f"\n… and {len(text) - chars:,} characters more" if len(text) > chars else ""
    return f"--- {split} document {number}, {name}: {stop - start:,} tokens\n{text[:chars]}{cut}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.inspect", description=__doc__.partition("\n")[0])
    p.add_argument("folder", type=Path, help="of a preparation (prepared/…)")
    p.add_argument("--split", default="train", choices=("train", "val"), help="default: train")
    p.add_argument(
        "--document", type=int, nargs="*", default=[0, 1], metavar="N", help="documents to show (default: 0 1)"
    )
    p.add_argument("--chars", type=int, default=500, help="of each document, at the most (default: 500)")
    p.add_argument("--no-checksums", action="store_true", help="do not read the whole shards")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    try:
        prepared = load(args.folder)
        count = getattr(prepared, args.split).document_count
        if wrong := [n for n in args.document if not 0 <= n < count]:
            raise ValueError(f"--document: {args.split} has documents 0 to {count - 1}, not {wrong[0]}")
    except ValueError as error:
        sys.exit(str(error))
    print(describe(prepared.manifest, prepared.folder))
    for split, entry in prepared.manifest["splits"].items():
        for shard in entry["shards"]:
            print(f"{split}  {shard['name']}: {shard['tokens']:,} tokens of {shard['documents']:,} documents")
    for reason, skipped in prepared.manifest["corpus"].get("skipped_counts", {}).items():
        print(f"skipped {skipped:,} {reason}")
    for number in args.document:
        print(show(prepared, args.split, number, args.chars))
    if not args.no_checksums:
        found = list(damages(prepared))
        print("\n".join(found) or "all checksums are right, and tokens and index fit each other")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
