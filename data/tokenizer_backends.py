"""The backends of ``data.tokenizer.Tokenizer``: the libraries sentencepiece and tokenizers (Hugging Face)."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

SPACE = "\u2581"  # stands for a space in the pieces of sentencepiece, and of tokenizers converted from it
SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]


class SentencePiece:
    """A tokenizer of the library sentencepiece. ``HuggingFace`` has the same interface.

    Args:
        path: the model's file, for messages only.
        content: the bytes of that file.

    Raises:
        ValueError: `content` is not a sentencepiece model.

    Attributes:
        bos_id: the id of the token that begins a text; -1 if the model names none.
        eos_id: the id of the token that ends a text; -1 if the model names none.
        space_sign: the ids of the three byte tokens with which a U+2581 in a text is encoded; None if the tokenizer
            has no byte tokens, or needs none because it decodes U+2581 unchanged.
    """

    SPACES_AS_THEY_ARE = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
    """normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false } of sentencepiece_model.proto.

    Appended to a model, it overrides these two fields, because the last value of a field that occurs twice is used
    (Protocol Buffers, Encoding, "Last One Wins").
    """

    def __init__(self, path: str | Path, content: bytes) -> None:
        self._content, self._model = content, sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(content)
            self.vocab_size: int = self._model.vocab_size()
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a sentencepiece model ({error}); choose a .model file or a tokenizer.json"
            ) from None
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        space = [self._model.piece_to_id(piece) for piece in SPACE_BYTES]
        self.space_sign = space if all(self._model.is_byte(token) for token in space) else None

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The model for a text that follows another text: it keeps spaces unchanged."""
        model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(self._content + self.SPACES_AS_THEY_ARE)
        return model

    @cached_property
    def is_exact(self) -> bool:
        """Whether every text is known to decode unchanged: no normalization, and a token for every byte."""
        try:
            from sentencepiece import sentencepiece_model_pb2

            model: Any = sentencepiece_model_pb2.ModelProto.FromString(self._content)  # type: ignore[attr-defined]
        except Exception:  # without protobuf, or if it fails on the model, decoded texts are compared instead
            return False
        normalizer, trainer = model.normalizer_spec, model.trainer_spec
        changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
        changes = changes or not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix
        changes = changes or model.denormalizer_spec.precompiled_charsmap
        return not changes and sum(map(self._model.is_byte, range(self.vocab_size))) == 256

    def piece_of(self, token: int) -> str | None:
        """The name of the token with this id; None if there is none."""
        return None if self._model.is_unused(token) else self._model.id_to_piece(token)

    @property
    def changes_spaces(self) -> bool:
        """Whether the tokenizer adds or drops spaces, or encodes U+2581 like a space."""
        text = "a  a "
        return self.space_sign is None or self._model.encode(text) != self._continuing.encode(text)

    def id_of(self, piece: str) -> int | None:
        """The id of the token with this name; None if there is none."""
        token = self._model.piece_to_id(piece)
        return None if self._model.is_unknown(token) and self._model.id_to_piece(token) != piece else token

    def encode_batch(self, texts: Sequence[str], threads: int, continues: bool) -> list[np.ndarray]:
        """The token ids of each text, int32 (n,).

        Args:
            threads: the number of threads; HuggingFace ignores it.
            continues: whether each text follows another text, and gets no space before it.
        """
        model = self._continuing if continues else self._model
        return model.encode_as_numpy(list(texts), num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def bytes_of(self, token: int) -> int:
        """The number of UTF-8 bytes of a token; 0 for special tokens."""
        if self._model.is_byte(token):
            return 1
        if self._model.is_control(token) or self._model.is_unknown(token) or self._model.is_unused(token):
            return 0
        return len(self._model.id_to_piece(token).replace(SPACE, " ").encode())


class HuggingFace:
    """A tokenizer of the library tokenizers. As in sentencepiece, text that spells a special token is encoded as text.

    Args:
        path: the tokenizer.json, for messages only.
        text: the content of that file.

    Raises:
        ValueError: the library is missing, or `text` is not a tokenizer.
    """

    bos_id = eos_id = -1  # unknown: tokenizer.json does not say which tokens begin and end a text

    def __init__(self, path: str | Path, text: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{path} needs the library tokenizers, which is not installed; run "
                ".venv/bin/pip install -r requirements-extra.txt"
            ) from None
        self._from_text, self._letters = tokenizers.Tokenizer.from_str, tokenizers.pre_tokenizers.ByteLevel.alphabet
        try:
            self._spec = json.loads(text)
            self._model = self._opened(text)
            self._byte_level = "ByteLevel" in json.dumps(self._spec.get("decoder"))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(
                f"{path} is not a Hugging Face tokenizer ({str(error)[:200]}); set data.tokenizer to a tokenizer.json "
                "or a sentencepiece model"
            ) from None
        self._added = self._model.get_added_tokens_decoder()
        self.vocab_size: int = 1 + max(self._model.get_vocab().values(), default=-1)
        steps = json.dumps([self._spec.get("normalizer"), self._spec.get("pre_tokenizer")], ensure_ascii=False)
        space = [self._model.token_to_id(piece) for piece in SPACE_BYTES]
        falls_back = self._spec.get("model", {}).get("byte_fallback") and None not in space
        self.space_sign = space if falls_back and SPACE in steps else None

    def _opened(self, text: str) -> Any:
        model = self._from_text(text)
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True
        return model

    @cached_property
    def _continuing(self) -> Any:
        """The tokenizer for a text that follows another text: it puts no space before the text."""
        steps = {key: _without_prefix(self._spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
        return self._opened(json.dumps(self._spec | steps))

    def piece_of(self, token: int) -> str | None:
        return self._model.id_to_token(token)

    @cached_property
    def is_exact(self) -> bool:
        """Whether every text is known to decode unchanged: byte-level tokenizers, such as GPT-2's and Llama 3's."""
        first, model = self._spec.get("pre_tokenizer") or {}, self._spec["model"]
        *splits, last = first.get("pretokenizers") or [first]
        kinds = [step.get("type") for step in (last, self._spec.get("decoder") or {}, model)]
        return (
            kinds == ["ByteLevel", "ByteLevel", "BPE"]
            and model["vocab"].keys() >= {*self._letters()}
            and not (self._spec.get("normalizer") or last.get("add_prefix_space"))
            and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
            and all(token.special for token in self._added.values())
            and all((step.get("type"), step.get("behavior")) == ("Split", "Isolated") for step in splits)
        )

    @property
    def changes_spaces(self) -> bool:
        steps = [self._spec.get(key) for key in ("normalizer", "pre_tokenizer")]
        return self.space_sign is not None or steps != [_without_prefix(step) for step in steps]

    def id_of(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def encode_batch(self, texts: Sequence[str], threads: int, continues: bool) -> list[np.ndarray]:
        model = self._continuing if continues else self._model
        encoded = model.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def bytes_of(self, token: int) -> int:
        piece = self._model.id_to_token(token)
        if piece is None or (token in self._added and self._added[token].special):
            return 0
        if self._byte_level and token not in self._added:
            return len(piece)  # one letter per byte
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return 1
        return len(piece.replace(SPACE, " ").encode())


def _without_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json without the parts that put a space before a text."""
    if isinstance(step, list):
        return [part for part in map(_without_prefix, step) if part is not None]
    if not isinstance(step, dict):
        return step
    kind = step.get("type")
    if kind == "Prepend":
        return None
    changes: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    kept = {key: _without_prefix(part) for key, part in step.items()}
    if kind == "Metaspace":
        kept.pop("add_prefix_space", None)  # in old files, where it contradicts the new key
    return kept | changes.get(str(kind), {})
