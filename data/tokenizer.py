"""Tokenizers of sentencepiece and of Hugging Face, with one interface."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data.atomic import write_atomic
from data.special_tokens import SPECIAL, eos_beside, names_beside
from data.text_encoding import decode
from data.tokenizer_backends import SPACE, HuggingFace, SentencePiece

FILES = ("tokenizer.model", "tokenizer.json")
MOST_PADDING = 1024
"""Maximum number of embedding rows without a token; some models pad the vocabulary to a multiple of 64 to 1024."""


class Tokenizer:
    """A tokenizer, from a sentencepiece model or from a tokenizer.json in Hugging Face's format.

    Args:
        path: The file of the tokenizer.
        bos: The name of the token that begins a text. None: as special_tokens.json next to the file says, else the
            sentencepiece model, or tokenizer_config.json or special_tokens_map.json next to a tokenizer.json. If none
            of them names a token (as for T5), texts begin with the eos token.
        eos: The name of the token that ends a text. None: as for `bos`, and for a tokenizer.json at last as
            generation_config.json or config.json next to it says.
        look_beside: Whether to read the files next to the tokenizer.

    Raises:
        ValueError: The file or a file next to it cannot be read, the file is not a tokenizer, it lacks a token given as
            `bos` or `eos`, or no eos token is known.

    Attributes:
        bos_id: The id of the token that begins a text.
        eos_id: The id of the token that ends a text.
        sha256: The hash of the file, 64 hex digits.
        vocab_size: One more than the largest token id.
        token_bytes: (vocab_size,) int32, the number of UTF-8 bytes of each token; 0 for special tokens.
        special: The `bos` and `eos` to pass when a copy of the file is opened without the files next to it.
    """

    def __init__(
        self, path: str | Path, bos: str | None = None, eos: str | None = None, look_beside: bool = True
    ) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); choose a tokenizer file") from None
        self.sha256, self._content, text = hashlib.sha256(content).hexdigest(), content, _json_text(content)
        self._model: SentencePiece | HuggingFace
        self._model = HuggingFace(path, text) if text else SentencePiece(path, content)
        self.vocab_size: int = self._model.vocab_size
        names = names_beside(self.path, is_json=bool(text)) if look_beside else {}
        bos, eos = bos or names.get("bos"), eos or names.get("eos")
        if eos is None and text and look_beside and self.has(token := eos_beside(self.path)):
            eos = self._model.piece_of(token)
        self.special: dict[str, str] = {key: name for key, name in (("bos", bos), ("eos", eos)) if name}
        found = self._model.eos_id if eos is None else self._named(eos, "data.eos")
        if found < 0:
            raise ValueError(f"{path} has no eos token; set data.eos to the token that ends a text")
        self.eos_id: int = found
        begin = self._model.bos_id if bos is None else self._named(bos, "data.bos")
        self.bos_id: int = begin if begin >= 0 else self.eos_id
        try:
            lengths = [self._model.bytes_of(token) for token in range(self.vocab_size)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} has a token that is not valid UTF-8 ({error}); get a complete copy") from None
        self.token_bytes = np.array(lengths, dtype=np.int32)
        self.token_bytes[[self.bos_id, self.eos_id]] = 0

    def has(self, token: int) -> bool:
        """Whether there is a token with this id: a vocabulary may have gaps."""
        return 0 <= token < self.vocab_size and self._model.piece_of(token) is not None

    def fits(self, rows: int) -> bool:
        """Whether a model with this number of embedding rows has a row for bos, eos and every token of a text.

        Other special tokens need no row, because no text is encoded to them.
        """
        return max(self.bos_id, self.eos_id) < rows and not self.token_bytes[rows:].any()

    def _named(self, name: str, key: str) -> int:
        token = self._model.id_of(name)
        if token is None:
            raise ValueError(f"{key}: {self.path} has no token {name}; name one that it has")
        return token

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens.

        Raises:
            ValueError: The tokenizer fails on the text.
        """
        return self.encode_batch([text], threads=1)[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """The token ids of each text, int32 (n,), without special tokens.

        Args:
            threads: The number of threads of sentencepiece; all cores for None. Hugging Face's library ignores it.

        Raises:
            ValueError: The tokenizer fails on a text.
        """
        return self._encode(texts, threads, continues=False)

    def encode_pairs(
        self, prompts: Sequence[str], responses: Sequence[str], threads: int | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The token ids of each prompt, as from ``encode_batch``, and of the response that follows it, int32 (n,) each.

        Together, the two arrays decode to the two texts with nothing in between. A tokenizer that puts a space before
        every text, such as LLaMA 2's, puts no space before a response that follows a prompt.

        Args:
            threads: As for ``encode_batch``.

        Raises:
            ValueError: The tokenizer fails on a text.
        """
        given, learnt = self.encode_batch(prompts, threads), self._encode(responses, threads, continues=True)
        return given, [after if prompt else self._encode([response], 1, continues=False)[0]
                       for prompt, response, after in zip(prompts, responses, learnt, strict=True)]  # fmt: skip

    def _encode(self, texts: Sequence[str], threads: int | None, continues: bool) -> list[np.ndarray]:
        """As ``encode_batch``; with `continues`, the token ids of texts that follow other texts."""
        encode, sign, threads = self._model.encode_batch, self._model.space_sign, threads or os.cpu_count() or 1
        try:
            if sign is None or not any(SPACE in text for text in texts):
                return encode(texts, threads, continues)
            # A literal U+2581 is encoded as its bytes, because it would be decoded to a space.
            parts = [text.split(SPACE) for text in texts]
            firsts = encode([first for first, *_ in parts], threads, continues)
            others = iter(encode([part for _, *after in parts for part in after], threads, continues=True))
            return [
                np.concatenate([first, *(ids for _ in after for ids in (sign, next(others)))], dtype=np.int32)
                for first, (_, *after) in zip(firsts, parts, strict=True)
            ]
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"{self.path} cannot encode a text ({str(error)[:200]})") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._model.decode([int(token) for token in ids])

    def is_kept(self, text: str, *parts: np.ndarray) -> bool:
        """Whether the concatenation of `parts`, arrays (n,) of token ids, decodes to exactly `text`."""
        return self._model.is_exact or self.decode(np.concatenate(parts).tolist()) == text

    @cached_property
    def space_after(self) -> int | None:
        """The id of bos if the tokenizer puts a space before every text, else None.

        The space is not in the text, but `token_bytes` of the first token after bos includes it.
        """
        _, (letter,) = self.encode_pairs(["a"], ["a"])
        added = self.token_bytes[self.encode("a")].sum() - self.token_bytes[letter].sum()
        return self.bos_id if added == 1 else None

    @property
    def encoding(self) -> int:
        """The version of the encoding, 1 or 2; a dataset that was prepared with another version is not reused.

        2 for a tokenizer that adds or drops spaces, or encodes U+2581 like a space: for some texts, the first version
        of this class gave other tokens. 1 for all other tokenizers.
        """
        return 2 if self._model.changes_spaces else 1

    def copy_to(self, folder: Path) -> Path:
        """Write the tokenizer into `folder` as tokenizer.model or tokenizer.json, and return the path.

        Also writes `special`, if not empty, as special_tokens.json.
        """
        path = folder / FILES[isinstance(self._model, HuggingFace)]
        write_atomic(path, self._content)
        if self.special:
            write_atomic(folder / SPECIAL, json.dumps(self.special) + "\n")
        return path


def find_tokenizer(folder: Path) -> Path | None:
    """The path of tokenizer.model or tokenizer.json in `folder`; None if there is neither."""
    return next((folder / name for name in FILES if (folder / name).exists()), None)


def _json_text(content: bytes) -> str:
    """The text of a file if it begins like JSON; otherwise empty."""
    try:
        text = decode(content)
    except UnicodeDecodeError:
        text = content.decode("latin-1") if content.lstrip()[:1] == b"{" else ""
    return text if text.lstrip()[:1] == "{" else ""
