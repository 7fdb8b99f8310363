"""Start a run from the weights at ``train.init_from``: the checks before it, and the files that it takes along."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from data.atomic import sha256
from data.tokenizer import Tokenizer
from models.llama import Llama
from pretrain.inference.hf_assets import copy_assets, find_assets
from pretrain.inference.hf_llama import CONFIG, read_shapes, read_weights
from pretrain.inference.pretrained import find_pretrained

logger = logging.getLogger(__name__)

FREE = ("initializer_range", "max_position_embeddings")  # settings that the run may have otherwise


def read_weights_at(path: str | Path) -> Iterable[tuple[str, Tensor]]:
    """The weights by our names of a model that ``find_pretrained`` finds, or in one safetensors file."""
    path = Path(path)
    return read_weights(path) if path.is_file() else find_pretrained(path).weights()


def init_problems(path: str, model: Llama, arguments: dict[str, Any], tokenizer: str | None = None) -> list[str]:
    """Why a run cannot start from the weights at ``path``, a line each; reads no weights.

    Args:
        model: of the run, before its linears are converted; may be on the meta device.
        arguments: the keyword arguments that ``model`` was made with.
        tokenizer: the file that data.tokenizer names.
    """
    try:
        if Path(path).is_file():
            return _shape_problems(path, read_shapes(Path(path)), model)
        found = find_pretrained(path)
        if problems := _tokenizer_problems(path, found.arguments["vocab_size"], tokenizer):
            return problems
        if problems := _setting_problems(path, found.arguments, arguments):
            return problems
        return _shape_problems(path, read_shapes(found.path), model) if (found.path / CONFIG).exists() else []
    except ValueError as error:
        return [f"train.init_from: {line}" for line in str(error).splitlines()]


def _tokenizer_problems(path: str, rows: int, tokenizer: str | None) -> list[str]:
    if tokenizer is None or not Path(tokenizer).is_file():  # data.tokenizer is checked with the data
        return []
    try:
        own = Tokenizer(tokenizer)
    except ValueError:
        return []
    if own.fits(rows):
        return []
    return [
        f"train.init_from={path} has {rows} embedding rows, but data.tokenizer={tokenizer} has {own.vocab_size} "
        "tokens; name the tokenizer that the model was trained with"
    ]


def _setting_problems(path: str, stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line with every setting that would make the run's model the one that is stored."""

    def explicit(arguments: dict[str, Any]) -> dict[str, Any]:
        heads = arguments["num_key_value_heads"] or arguments["num_attention_heads"]
        return {**arguments, "num_key_value_heads": heads}

    stored, wanted = explicit(stored), explicit(wanted)
    unlike = {key: value for key, value in stored.items() if key not in FREE and wanted[key] != value}
    changes = " ".join(f"model.{key}={str(value).lower()}" for key, value in unlike.items())
    return [f"train.init_from={path} is a model of another shape; set {changes}"] if unlike else []


def _shape_problems(path: str, stored: dict[str, tuple[int, ...]], model: Llama) -> list[str]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.tie_word_embeddings and "lm_head.weight" not in stored:
        del wanted["lm_head.weight"]
    unlike = [
        f"{name} is {stored.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the model"
        for name in sorted(stored.keys() | wanted.keys()) if stored.get(name) != wanted.get(name)
    ]  # fmt: skip
    more = f", and {len(unlike) - 1} more" if len(unlike) > 1 else ""
    return [f"train.init_from={path}: {unlike[0]}{more}; change model.*"] if unlike else []


def require_same_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Compare the run's ``tokenizer`` with the one that lies beside the weights at ``path``, if there is one.

    Raises:
        ValueError: they differ.
    """
    try:
        beside = find_pretrained(path).tokenizer().parent if Path(path).is_dir() else Path(path).parent
        files = sorted(beside.glob("tokenizer.*"))
    except ValueError:
        files = []
    if not files:
        logger.warning("there is no tokenizer beside train.init_from=%s to compare the run's with", path)
    elif all(sha256(file) != tokenizer.sha256 for file in files):
        raise ValueError(f"train.init_from={path} has another tokenizer than the run; set data.tokenizer={files[-1]}")


def keep_assets(path: str, folder: Path) -> None:
    """Copy the files beside the weights at ``path`` to ``folder``, so that the run can do without ``path``.

    They are the settings, generation settings, chat template and special tokens of a Hugging Face model; nothing is
    copied for a model without them.
    """
    source = Path(path).parent if Path(path).is_file() else find_pretrained(path).assets
    copy_assets(find_assets(source) if source else [], folder)
