"""The assets of a Hugging Face model, its files besides the weights: settings, chat template, tokenizer.

A run that starts from such a model copies these files to its folder, and an export of the run copies them again.
"""

import json
import shutil
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from data.atomic import sha256
from data.tokenizer import FILES
from pretrain.inference.hf_llama import CONFIG, read_config

ASSETS_FOLDER = "hf_assets"  # in a run's folder: files of the model that the run started from
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *FILES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip

FREE = ("attention_dropout", "use_cache")  # settings in config.json that models.llama does not have
REPLACED = ("dtype", "rope_parameters")  # newer names of settings that an export writes with older names


def find_assets(path: Path) -> list[Path]:
    """The assets of the model in the folder ``path``; [] if the folder has no config.json."""
    if not (path / CONFIG).exists():
        return []
    return [path / name for name in (CONFIG, GENERATION, *TOKENIZER_FILES) if (path / name).exists()]


def copy_assets(assets: Iterable[Path], folder: Path) -> None:
    """Copy ``assets``, files or folders, into ``folder``, which is created if necessary."""
    for asset in assets:
        folder.mkdir(parents=True, exist_ok=True)
        # Only the contents: permissions are those of new files.
        for file in [path for path in asset.rglob("*") if path.is_file()] if asset.is_dir() else [asset]:
            copy = folder / file.relative_to(asset.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def other_settings(folder: Path, ours: Container[str]) -> dict[str, Any]:
    """The settings in ``folder``/config.json that an export keeps unchanged, such as ``eos_token_id``.

    Args:
        ours: the names of the settings that the export writes itself, from the exported model and weights.
    """
    config = {key: value for key, value in read_config(folder).items() if value is not None}
    return {key: value for key, value in config.items() if key in FREE or not (key in ours or key in REPLACED)}


def end_ids(folder: Path) -> list[int]:
    """The tokens at which transformers' ``generate`` stops for the model in ``folder``; [] if no file names any.

    They are ``eos_token_id`` in generation_config.json. Without this file, they are ``eos_token_id`` in config.json.

    Raises:
        ValueError: a file cannot be read, or ``eos_token_id`` is neither a number nor a list of numbers.
    """
    file = next((folder / name for name in (GENERATION, CONFIG) if (folder / name).exists()), None)
    if file is None:
        return []
    try:
        stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from None
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"{file}: eos_token_id={stated} is neither a token id nor a list of token ids; correct it")
    return ends


def has_tokenizer(folder: Path, tokenizer: Path) -> bool:
    """Whether the tokenizer in ``folder`` has the same content as the file ``tokenizer``."""
    return any(sha256(folder / name) == sha256(tokenizer) for name in FILES if (folder / name).exists())
