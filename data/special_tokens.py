"""Find bos and eos in the files next to a tokenizer: the names of the tokens that begin and end a text."""

import json
from pathlib import Path

from data.text_encoding import decode

SPECIAL = "special_tokens.json"  # next to the copy of a tokenizer: the tokens that begin and end a text


def names_beside(path: Path, is_json: bool) -> dict[str, str]:
    """The names of the tokens `bos` and `eos`, each from the first file next to the tokenizer at `path` that has it.

    The first file is special_tokens.json. A key is missing if no file has it.

    Args:
        is_json: Whether the tokenizer is a tokenizer.json. If so, tokenizer_config.json and special_tokens_map.json are
            read too, where Hugging Face stores the names; a sentencepiece model contains them.

    Raises:
        ValueError: A file cannot be read, or a name in it is not a text.
    """
    names: dict[str, str] = {}
    for file in [SPECIAL, *(("tokenizer_config.json", "special_tokens_map.json") if is_json else ())]:
        if not path.with_name(file).exists():
            continue
        try:
            known = json.loads(decode(path.with_name(file).read_bytes()))
            found = {key: known.get(key) or known.get(f"{key}_token") for key in ("bos", "eos")}
            found = {key: name["content"] if isinstance(name, dict) else name for key, name in found.items() if name}
        except (OSError, ValueError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path.with_name(file)} cannot be read as a JSON object with the names of bos and eos ({error!r}); "
                "correct or delete the file"
            ) from None
        if not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{path.with_name(file)} has a bos or eos that is not a name; correct or delete the file")
        names = {**found, **names}
    return names


def eos_beside(path: Path) -> int:
    """The eos id in generation_config.json, else in config.json, next to the tokenizer at `path`; of a list, the first.

    -1 if neither file has an id or can be read.
    """
    for file in ("generation_config.json", "config.json"):
        try:
            found = json.loads(decode(path.with_name(file).read_bytes())).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        found = found[0] if isinstance(found, list) and found else found
        if type(found) is int:
            return found
    return -1
