"""Tokenizers: sentencepiece's and Hugging Face's, and the training of byte-pair encoding that gives texts back exactly.

    python -m data.tokenizer train --paths notes book.txt --vocab-size 8000 --out tokenizer.model

In one trained here a line break is one token, and so are four spaces, as suits source code; no other token crosses
a line break.
Whatever has no piece of its own is written as UTF-8 bytes.
"""

import argparse
import hashlib
import heapq
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

SPACE = "\u2581"  # sentencepiece's sign for a space
OWN_PIECES = ["\n", 4 * SPACE]
TRAINING_BYTES = 32_000_000


SPECIAL = "special_tokens.json"  # beside a tokenizer's copy: which tokens begin and end a text
FILES = ("tokenizer.model", "tokenizer.json")


class Tokenizer:
    """A sentencepiece model file, or a tokenizer.json of Hugging Face's.

    `bos` and `eos` name the tokens that begin and end a text. Without them they are those of special_tokens.json or
    tokenizer_config.json beside the file, or of the model itself. One without a bos token, such as T5's, begins a
    text with its eos token, as GPT-2's does.
    Raises ValueError if the file is no tokenizer, or has no such token, or no eos token.
    `token_bytes` (vocab_size,) int32 holds the UTF-8 bytes every token stands for, 0 for special ones.
    """

    def __init__(self, path: str | Path, bos: str | None = None, eos: str | None = None) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); name a tokenizer's file") from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._content, is_json = content, content.lstrip()[:1] == b"{"
        self._model: _SentencePiece | _HuggingFace = (_HuggingFace if is_json else _SentencePiece)(path, content)
        self.vocab_size: int = self._model.vocab_size
        names = _names_beside(self.path, is_json)
        bos, eos = bos or names.get("bos"), eos or names.get("eos")
        self.special: dict[str, str] = {key: name for key, name in (("bos", bos), ("eos", eos)) if name}
        """The names that `bos` and `eos` would need to be given elsewhere."""
        found = self._model.eos_id if eos is None else self._named(eos, "data.eos")
        if found < 0:
            raise ValueError(f"{path}: the tokenizer has no eos token; set data.eos to the one that ends a text")
        self.eos_id: int = found
        begin = self._model.bos_id if bos is None else self._named(bos, "data.bos")
        self.bos_id: int = begin if begin >= 0 else self.eos_id
        try:
            lengths = [self._model.bytes_of(token) for token in range(self.vocab_size)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: holds a piece that is no text ({error}); bring a whole copy") from None
        self.token_bytes = np.array(lengths, dtype=np.int32)
        self.token_bytes[[self.bos_id, self.eos_id]] = 0

    def _named(self, name: str, key: str) -> int:
        token = self._model.id_of(name)
        if token is None:
            raise ValueError(f"{key}: {self.path} has no token {name}; name one that it has")
        return token

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return self.encode_batch([text], threads=1)[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """Every text's tokens, int32 (n,), on all cores unless told otherwise."""
        return self._model.encode_batch(texts, threads or os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens, special ones dropped; bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(token) for token in ids])

    def copy_to(self, folder: Path) -> Path:
        """Write the tokenizer into `folder` under its usual name, with the names of its special tokens if need be."""
        path = folder / FILES[isinstance(self._model, _HuggingFace)]
        path.write_bytes(self._content)
        if self.special:
            (folder / SPECIAL).write_text(json.dumps(self.special) + "\n")
        return path


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, if there is one."""
    return next((folder / name for name in FILES if (folder / name).exists()), None)


def _names_beside(path: Path, is_json: bool) -> dict[str, str]:
    """The names of bos and eos as a file beside the tokenizer tells them; a model file knows its own."""
    files = [path.with_name(SPECIAL), *([path.with_name("tokenizer_config.json")] if is_json else [])]
    for file in files:
        if not file.exists():
            continue
        try:
            known = json.loads(file.read_text())
            found = {key: known.get(key) or known.get(f"{key}_token") for key in ("bos", "eos")}
            names = {key: name["content"] if isinstance(name, dict) else name for key, name in found.items() if name}
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{file}: cannot be read ({error!r}); mend or delete it") from None
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{file}: bos and eos are no names; mend or delete it")
        return names
    return {}


class _SentencePiece:
    def __init__(self, path: str | Path, content: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(content)
            self.vocab_size: int = self._model.vocab_size()
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no sentencepiece model ({error})") from None
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self._space_sign = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def id_of(self, piece: str) -> int | None:
        token = self._model.piece_to_id(piece)
        return None if self._model.is_unknown(token) and self._model.id_to_piece(token) != piece else token

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        ids = self._model.encode_as_numpy(list(texts), num_threads=threads)
        return [self._around_space_signs(t) if SPACE in t else i for t, i in zip(texts, ids, strict=True)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def _around_space_signs(self, text: str) -> np.ndarray:
        """A literal U+2581 would come back as a space, so it is written as its bytes."""
        parts: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            parts += self._space_sign if number else []
            parts += self._model.encode(part)
        return np.array(parts, dtype=np.int32)

    def bytes_of(self, token: int) -> int:
        if self._model.is_byte(token):
            return 1
        if self._model.is_control(token) or self._model.is_unknown(token) or self._model.is_unused(token):
            return 0
        return len(self._model.id_to_piece(token).replace(SPACE, " ").encode())


class _HuggingFace:
    """The library tokenizers. A text that spells a special token is text, as with sentencepiece."""

    bos_id = eos_id = -1  # the file does not say which of its tokens they are

    def __init__(self, path: str | Path, content: bytes) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{path}: a tokenizer.json needs the library tokenizers: pip install -r requirements-extra.txt"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
            self._byte_level = "ByteLevel" in json.dumps(json.loads(content).get("decoder"))
        except Exception as error:  # the library raises that class itself
            raise ValueError(f"{path}: no tokenizer of Hugging Face's ({str(error)[:200]})") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        self._added = self._model.get_added_tokens_decoder()
        self.vocab_size: int = 1 + max(self._model.get_vocab().values(), default=-1)

    def id_of(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        encoded = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def bytes_of(self, token: int) -> int:
        piece = self._model.id_to_token(token)
        if piece is None or (token in self._added and self._added[token].special):
            return 0
        if self._byte_level and token not in self._added:
            return len(piece)  # a letter for each byte
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return 1
        return len(piece.replace(SPACE, " ").encode())


def train_tokenizer(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    seed: int,
    sample_bytes: int = TRAINING_BYTES,
    coverage: float | None = None,
) -> Tokenizer:
    """Train a tokenizer on (a sample of) the texts and write it to `path`.

    The model is a function of the set of texts and the other arguments alone. `coverage` is the share of all
    characters that shall have a piece of their own (sentencepiece's 0.9995 when None); the others are bytes.
    Raises ValueError if the texts cannot fill such a vocabulary, or do not fit into it.
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
    unfinished = Path(f"{path}.tmp")
    unfinished.write_bytes(model.getvalue())
    unfinished.replace(path)
    return Tokenizer(path)


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """At most `max_bytes` of the texts (one at least): those that come first by a seeded hash."""
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
    return f"data.paths: no tokenizer could be trained on this text ({error})"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m data.tokenizer", description=__doc__.partition("\n")[0])
    train = p.add_subparsers(dest="command", required=True).add_parser("train", help="train one and write its model")
    train.add_argument("--paths", nargs="+", required=True, help="files, folders and globs")
    train.add_argument("--source", default="text", choices=("text", "records", "c4"), help="what the files hold")
    train.add_argument("--patterns", nargs="+", default=["*.txt", "*.md", "*.py"], help="files taken from folders")
    train.add_argument("--column", default="text", help="of JSON lines and Parquet (default: text)")
    train.add_argument("--vocab-size", type=int, default=32000, help="pieces (default: 32000)")
    train.add_argument("--coverage", type=float, help="share of characters with a piece of their own (default: 0.9995)")
    train.add_argument(
        "--sample-bytes", type=int, default=TRAINING_BYTES, help=f"text used (default: {TRAINING_BYTES})"
    )
    train.add_argument("--seed", type=int, default=0, help="chooses the sample (default: 0)")
    train.add_argument("--out", type=Path, required=True, help="the model to write")
    return p


def main() -> None:
    from data.corpus import Corpus
    from data.settings import DataSettings, examine

    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = DataSettings(
        source=args.source, paths=args.paths, patterns=args.patterns, column=args.column, max_bytes=2**63,
        vocab_size=args.vocab_size, seed=args.seed,
    )  # fmt: skip
    try:
        if args.coverage is not None and not 0 < args.coverage <= 1:
            raise ValueError(f"--coverage: {args.coverage} must be above 0 and at most 1")
        files, found = examine(settings)
        if found:
            raise ValueError("\n".join(found))
        texts = (document.text for document in Corpus(files, settings, survey=False).documents(files))
        made = train_tokenizer(texts, args.out, args.vocab_size, args.seed, args.sample_bytes, args.coverage)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.out}: {made.vocab_size} pieces, {made.sha256[:12]}")


if __name__ == "__main__":
    main()
