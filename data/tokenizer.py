"""Tokenizers of sentencepiece and of Hugging Face, with one interface."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

SPACE = "\u2581"  # sentencepiece's sign for a space
OWN_PIECES = ["\n", 4 * SPACE]


SPECIAL = "special_tokens.json"  # beside a tokenizer's copy: which tokens begin and end a text
FILES = ("tokenizer.model", "tokenizer.json")
MOST_PADDING = 1024
"""How many more embedding rows than tokens count as padding; models are padded to multiples of 64 to 1024."""


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
        if eos is None and is_json and self.has(token := _eos_beside(self.path)):
            eos = self._model.piece_of(token)
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

    def has(self, token: int) -> bool:
        """Whether there is a token of this number: a vocabulary may have gaps."""
        return 0 <= token < self.vocab_size and self._model.piece_of(token) is not None

    def fits(self, rows: int) -> bool:
        """Whether a model with this number of embedding rows takes every token that a text can have.

        Special tokens beyond the rows do no harm, because no text is encoded to them, except for bos and eos.
        """
        return max(self.bos_id, self.eos_id) < rows and not self.token_bytes[rows:].any()

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
    """The names of bos and eos from the files beside the tokenizer, each from the first that has it.

    Hugging Face keeps them in one of two files; a sentencepiece model contains its own.
    """
    names: dict[str, str] = {}
    for file in [SPECIAL, *(("tokenizer_config.json", "special_tokens_map.json") if is_json else ())]:
        if not path.with_name(file).exists():
            continue
        try:
            known = json.loads(path.with_name(file).read_text(encoding="utf-8"))
            found = {key: known.get(key) or known.get(f"{key}_token") for key in ("bos", "eos")}
            found = {key: name["content"] if isinstance(name, dict) else name for key, name in found.items() if name}
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{path.with_name(file)}: cannot be read ({error!r}); correct or delete it") from None
        if not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{path.with_name(file)}: bos and eos are no names of tokens; correct or delete it")
        names = {**found, **names}
    return names


def _eos_beside(path: Path) -> int:
    """The first eos id in the files beside the tokenizer that say how its model generates; -1 if there is none."""
    for file in ("generation_config.json", "config.json"):
        try:
            found = json.loads(path.with_name(file).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found = found[0] if isinstance(found, list) and found else found
        if type(found) is int:
            return found
    return -1


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

    def piece_of(self, token: int) -> str | None:
        return None if self._model.is_unused(token) else self._model.id_to_piece(token)

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

    def piece_of(self, token: int) -> str | None:
        return self._model.id_to_token(token)

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
