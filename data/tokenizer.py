"""Sentencepiece tokenizers: byte-pair encoding that gives every text back exactly, and its training.

A line break is one token, and so are four spaces, as suits source code; no other token crosses a line break.
Whatever has no piece of its own is written as UTF-8 bytes.
"""

import hashlib
import heapq
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

SPACE = "\u2581"  # sentencepiece's sign for a space
OWN_PIECES = ["\n", 4 * SPACE]
TRAINING_BYTES = 32_000_000


class Tokenizer:
    """A sentencepiece model file.

    One without a bos token, such as T5's, begins a text with its eos token, as GPT-2's does.
    Raises ValueError if the file is no sentencepiece model or has no eos token.
    `token_bytes` (vocab_size,) int32 holds the UTF-8 bytes every token stands for, 0 for special ones.
    """

    def __init__(self, path: str | Path) -> None:
        model = Path(path).read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError(f"{path}: no sentencepiece model ({error})") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{path}: the tokenizer has no eos token; bring one that has")
        self.bos_id: int = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
        self.token_bytes = np.array([self._bytes(token) for token in range(self.vocab_size)], dtype=np.int32)
        self._space_sign = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return self.encode_batch([text], threads=1)[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """Every text's tokens, int32 (n,), on all cores unless told otherwise."""
        threads = threads or os.cpu_count() or 1
        ids = self._model.encode_as_numpy(list(texts), num_threads=threads)
        return [self._around_space_signs(t) if SPACE in t else i for t, i in zip(texts, ids, strict=True)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens, special ones dropped; bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(token) for token in ids])

    def _around_space_signs(self, text: str) -> np.ndarray:
        """A literal U+2581 would come back as a space, so it is written as its bytes."""
        parts: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            parts += self._space_sign if number else []
            parts += self._model.encode(part)
        return np.array(parts, dtype=np.int32)

    def _bytes(self, token: int) -> int:
        if self._model.is_byte(token):
            return 1
        if self._model.is_control(token) or self._model.is_unknown(token) or self._model.is_unused(token):
            return 0
        return len(self._model.id_to_piece(token).replace(SPACE, " ").encode())


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int, seed: int) -> Tokenizer:
    """Train a tokenizer on (a sample of) the texts and write it to `path`.

    The model is a function of the set of texts, `vocab_size` and `seed` alone.
    Raises ValueError if the texts cannot fill such a vocabulary, or do not fit into it.
    """
    sample = _sample(texts, TRAINING_BYTES, seed)
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
        )
    except RuntimeError as error:
        raise ValueError(_vocabulary_problem(str(error), vocab_size)) from None
    Path(path).write_bytes(model.getvalue())
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
