"""Convert a sentencepiece tokenizer to Hugging Face's tokenizer.json and tokenizer_config.json.

The converted tokenizer gives the same tokens, with three differences. It puts the bos token before every text. It
encodes "<s>" or "</s>" in a text as the special token. It encodes U+2581 in a text like a space, because sentencepiece
uses this character for spaces.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

BPE = 2  # ModelType in sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces in the same file


def conversion_problem(path: Path) -> str | None:
    """Why the sentencepiece model at ``path`` cannot be converted; None if it can."""
    model = _read(path)
    if model.trainer_spec.model_type != BPE:
        return "it is not a byte-pair encoding"
    if model.trainer_spec.bos_id < 0:
        return "it has no bos token"
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        return "it changes the text before encoding it"
    if model.normalizer_spec.add_dummy_prefix and any(p.type == USER_DEFINED for p in model.pieces):
        return "it adds a space before a text and has user-defined pieces"
    return None


def tokenizer_json(path: Path) -> dict[str, Any]:
    """The content of tokenizer.json for the sentencepiece model at ``path``, which has no ``conversion_problem``."""
    model = _read(path)
    pieces = [(p.piece, p.type) for p in model.pieces]
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    unknown = next(piece for piece, kind in pieces if kind == UNKNOWN)
    prefix = model.normalizer_spec.add_dummy_prefix
    space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[piece], "content": piece, "special": kind != USER_DEFINED, "normalized": kind == USER_DEFINED,
             "single_word": False, "lstrip": False, "rstrip": False}
            for piece, kind in pieces if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": before if prefix else space,
        "pre_tokenizer": None,
        "post_processor": _bos_first(pieces[model.trainer_spec.bos_id][0], model.trainer_spec.bos_id),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False, "vocab": ids, "merges": _merges([p for p, kind in pieces if kind == NORMAL]),
        },
    }  # fmt: skip


def tokenizer_config(path: Path, positions: int) -> dict[str, Any]:
    """The content of tokenizer_config.json for the sentencepiece model at ``path``.

    ``positions`` is the length, in tokens, of the longest sequence in the model's training.
    """
    model = _read(path)
    spec = model.trainer_spec
    special = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: model.pieces[number].piece for name, number in special.items()},
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }


def _merges(pieces: list[str]) -> list[list[str]]:
    """Every pair of pieces whose concatenation is a piece, in sentencepiece's order of preference of the results.

    Pairs with the same result are ordered by the rank of their left part, so that "aaa" is merged from the left.
    """
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in rank and right in rank]
        merges += sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return [list(pair) for pair in merges]


def _bos_first(bos: str, number: int) -> dict[str, Any]:
    """The post-processor that puts the token ``bos`` before every text."""

    def template(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{kind: {"id": name, "type_id": 0}} for part in parts for kind, name in part.items()]

    start = {"SpecialToken": bos}
    return {
        "type": "TemplateProcessing",
        "single": template(start, {"Sequence": "A"}),
        "pair": template(start, {"Sequence": "A"}, start, {"Sequence": "B"}),
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def _read(path: Path) -> Any:
    model: Any = sentencepiece_model_pb2
    return model.ModelProto.FromString(path.read_bytes())
