"""Train a byte-pair encoding tokenizer that restores every text exactly.

    python -m data.train_tokenizer --paths notes book.txt --vocab-size 8000 --out tokenizer.model

For source code, a line break is one token and four spaces are one token; no other token contains a line break. A
character without a token of its own is encoded as its UTF-8 bytes, one token per byte.
"""

import argparse
import hashlib
import heapq
import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from data.atomic import write_atomic
from data.checks import examine
from data.settings import DataSettings
from data.sources.corpus import Corpus
from data.tokenizer import Tokenizer
from data.tokenizer_backends import SPACE
from data.wording import exit_with

OWN_PIECES = ["\n", 4 * SPACE]
TRAINING_BYTES = 32_000_000


def train_tokenizer(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    seed: int,
    sample_bytes: int = TRAINING_BYTES,
    coverage: float | None = None,
) -> Tokenizer:
    """Train a sentencepiece tokenizer on the texts, or on a sample of them, and write it to `path`.

    The model depends on the texts and the other arguments, not on the order of the texts.

    Args:
        vocab_size: The number of tokens, including special tokens and the 256 tokens of single bytes.
        seed: Chooses the sample.
        sample_bytes: Maximum number of UTF-8 bytes to train on; a single text may exceed it.
        coverage: Share of the characters of the text that have a token of their own; None: 0.9995. Rarer characters
            are encoded as bytes.

    Raises:
        ValueError: The texts cannot fill a vocabulary of this size, or need a larger one.
        OSError: `path` cannot be written.
    """
    sample = _sample(texts, sample_bytes, seed)
    lines = (line for text in sample for line in re.split(r"(?=\n)", text) if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            user_defined_symbols=OWN_PIECES,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=2**30,
            num_threads=4,  # a constant: the model file records it, though the pieces do not depend on it
            minloglevel=2,
            **({} if coverage is None else {"character_coverage": coverage}),  # type: ignore[arg-type]
        )
    except RuntimeError as error:
        raise ValueError(_vocabulary_problem(str(error), vocab_size)) from None
    write_atomic(Path(path), model.getvalue())
    return Tokenizer(path)


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """The texts with the smallest seeded hashes: at most `max_bytes` in total, but at least one text."""
    heap: list[tuple[int, str]] = []
    total = 0
    for text in texts:
        content = text.encode()
        priority = hashlib.blake2b(content, key=str(seed).encode(), digest_size=8).digest()
        heapq.heappush(heap, (-int.from_bytes(priority, "big"), text))
        total += len(content)
        while total > max_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def _vocabulary_problem(error: str, vocab_size: int) -> str:
    if found := re.search(r"too high .* value <= (\d+)", error):
        return f"data.vocab_size: {vocab_size} is too large for this text; it can fill {found[1]} at most"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"data.vocab_size: {vocab_size} is too small; this text needs {found[1]} at least"
    if "sentences_.empty" in error:
        return "data.paths: there is no text to train a tokenizer on; check data.paths and data.validation_share"
    return f"data.paths: no tokenizer can be trained on this text ({error}); give more text"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.train_tokenizer", description=__doc__.partition("\n")[0])
    p.add_argument("--paths", nargs="+", required=True, help="files, folders and globs")
    p.add_argument(
        "--source", default="text", choices=("text", "records", "c4"), help="content of the files (default: text)"
    )
    p.add_argument(
        "--patterns", nargs="+", default=["*.txt", "*.md", "*.py"],
        help="files taken from folders (default: *.txt *.md *.py)",
    )  # fmt: skip
    p.add_argument("--column", default="text", help="column of the text in JSON lines and Parquet (default: text)")
    p.add_argument("--vocab-size", type=int, default=32000, help="number of tokens (default: 32000)")
    p.add_argument("--coverage", type=float, help="share of characters with a token of their own (default: 0.9995)")
    p.add_argument(
        "--sample-bytes", type=int, default=TRAINING_BYTES, help=f"maximum bytes of text (default: {TRAINING_BYTES})"
    )
    p.add_argument("--seed", type=int, default=0, help="chooses the sample (default: 0)")
    p.add_argument("--out", type=Path, required=True, help="the model to write")
    return p


def main() -> None:
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = DataSettings(
        source=args.source, paths=args.paths, patterns=args.patterns, column=args.column, max_bytes=2**63,
        vocab_size=args.vocab_size, seed=args.seed,
    )  # fmt: skip
    try:
        if args.coverage is not None and not 0 < args.coverage <= 1:
            raise ValueError(f"--coverage: {args.coverage} must be above 0 and at most 1")
        if args.sample_bytes < 1:
            raise ValueError(f"--sample-bytes: {args.sample_bytes} must be at least 1")
        if not args.out.absolute().parent.is_dir():
            raise ValueError(f"--out: there is no folder {args.out.absolute().parent}; make it first")
        files, found = examine(settings)
        if found:
            raise ValueError("\n".join(found))
        texts = (document.text for document in Corpus(files, settings, survey=False).documents(files))
        made = train_tokenizer(texts, args.out, args.vocab_size, args.seed, args.sample_bytes, args.coverage)
    except ValueError as error:
        exit_with(str(error), args)
    except OSError as error:
        place = error.filename or args.out
        exit_with(f"--out: {place} cannot be written ({error.strerror}); choose another place", args)
    print(f"{args.out}: {made.vocab_size} pieces, SHA-256 {made.sha256[:12]}…")


if __name__ == "__main__":
    main()
