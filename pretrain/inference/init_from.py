"""Start a run from the weights at ``train.init_from``: checks of the weights, and the other files to copy."""

import hashlib
import logging
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.atomic import sha256
from data.tokenizer import Tokenizer
from models.llama import Llama
from pretrain.config.schema import ConfigError
from pretrain.inference.hf_assets import copy_assets, find_assets
from pretrain.inference.hf_llama import CONFIG, read_shapes, read_weights
from pretrain.inference.pretrained import find_pretrained

logger = logging.getLogger(__name__)

FREE = ("initializer_range", "max_position_embeddings")  # settings that may differ from the stored model


def read_weights_at(path: str | Path) -> Iterable[tuple[str, Tensor]]:
    """(name in ``models.llama.Llama``, tensor) for every weight of the model at ``path``.

    Args:
        path: a safetensors file, or a folder as for ``find_pretrained``.
    """
    path = Path(path)
    return read_weights(path) if path.is_file() else find_pretrained(path).weights()


class InitialWeights:
    """The weights at ``path``, to iterate over once: (name, tensor) as from ``read_weights_at``.

    The iteration also hashes the weights, for ``identity``.
    """

    def __init__(self, path: str | Path):
        self.path, self._digests = path, dict[str, str]()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_weights_at(self.path):
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            about = f"{name} {tensor.dtype} {list(tensor.shape)} ".encode()
            self._digests[name] = hashlib.sha256(about + hashlib.sha256(content.data).digest()).hexdigest()
            yield name, tensor

    def identity(self) -> dict[str, str]:
        """``{"path": …, "sha256": …}``, JSON-serialisable; reads the weights unless they were read before.

        The hash depends on the names, dtypes, shapes and values of the weights, but not on their files.
        """
        if not self._digests:
            for _ in self:
                pass
        together = "".join(digest for _, digest in sorted(self._digests.items()))
        return {"path": str(self.path), "sha256": hashlib.sha256(together.encode()).hexdigest()}


def require_same_start(path: str | None, started_from: dict[str, str] | None) -> None:
    """Compare the weights at ``path`` with the weights that a resumed run started from.

    Reads nothing if ``path`` is None or the path that the run started from, because the run has a checkpoint.

    Args:
        path: the new value of train.init_from.
        started_from: ``InitialWeights.identity()`` at the start of the run; None if it started from random weights.

    Raises:
        ConfigError: the weights differ, or those at ``path`` cannot be read.
    """
    if path is None:
        return
    fix = "set it to null, because the run resumes from its own checkpoint, or choose another run.name"
    if started_from is None:
        raise ConfigError(f"train.init_from={path}: this run did not start from other weights; {fix}")
    if Path(path).absolute() == Path(started_from["path"]).absolute():
        return
    try:
        found = InitialWeights(path).identity()
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"train.init_from={path} cannot be compared with {started_from['path']}, from which the run started "
            f"({error}); {fix}"
        ) from None
    if found["sha256"] != started_from["sha256"]:
        raise ConfigError(f"train.init_from={path} differs from the weights that the run started from; {fix}")


def init_problems(path: str, model: Llama, arguments: dict[str, Any], tokenizer: str | None = None) -> list[str]:
    """Why a run cannot start from the weights at ``path``, one line per problem; reads no weights.

    Args:
        path: the value of train.init_from.
        model: the model of the run, before its linear layers are converted; may be on the meta device.
        arguments: the keyword arguments of ``model``.
        tokenizer: the value of data.tokenizer; None if a tokenizer is trained.
    """
    try:
        if Path(path).is_file():
            return _shape_problems(path, read_shapes(Path(path)), model)
        found = find_pretrained(path)
        if problems := _tokenizer_problems(path, found.arguments["vocab_size"], tokenizer):
            return problems
        if problems := _setting_problems(path, found.arguments, arguments):
            return problems
        if not (found.path / CONFIG).exists():
            return []
        fix = f"correct {found.path / CONFIG}, which does not match the weights, or copy both again"
        return _shape_problems(path, read_shapes(found.path), model, fix)
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
        "tokens; use the tokenizer that the model was trained with"
    ]


def _setting_problems(path: str, stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line with all settings that must change so that the run's model is the stored model."""

    def explicit(arguments: dict[str, Any]) -> dict[str, Any]:
        heads = arguments["num_key_value_heads"] or arguments["num_attention_heads"]
        return {**arguments, "num_key_value_heads": heads}

    stored, wanted = explicit(stored), explicit(wanted)
    unlike = {key: value for key, value in stored.items() if key not in FREE and wanted[key] != value}
    changes = " ".join(_override(f"model.{key}", value) for key, value in unlike.items())
    return [f"train.init_from={path} is a model of another shape; set {changes}"] if unlike else []


def _override(key: str, value: Any) -> str:
    """``key=value``, quoted for a shell."""
    if isinstance(value, dict):
        return shlex.quote(f"{key}={{{','.join(f'{name}:{number}' for name, number in value.items())}}}")
    return f"{key}={'null' if value is None else str(value).lower()}"


def _shape_problems(
    path: str, stored: dict[str, tuple[int, ...]], model: Llama, fix: str = "change model.*"
) -> list[str]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.tie_word_embeddings and "lm_head.weight" not in stored:
        del wanted["lm_head.weight"]
    unlike = [
        f"{name} is {stored.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the model"
        for name in sorted(stored.keys() | wanted.keys()) if stored.get(name) != wanted.get(name)
    ]  # fmt: skip
    more = f", and {len(unlike) - 1} more" if len(unlike) > 1 else ""
    return [f"train.init_from={path}: {unlike[0]}{more}; {fix}"] if unlike else []


def require_same_tokenizer(path: str, tokenizer: Tokenizer | None) -> None:
    """Compare the run's ``tokenizer`` with the tokenizer next to the weights at ``path``, if there is one.

    Args:
        path: the value of train.init_from.
        tokenizer: None for a tokenizer that will be trained, which differs from every other tokenizer.

    Raises:
        ValueError: the tokenizers differ.
    """
    try:
        beside = find_pretrained(path).tokenizer().parent if Path(path).is_dir() else Path(path).parent
        files = sorted(beside.glob("tokenizer.*"))
    except ValueError:
        files = []
    if not files and tokenizer is not None:
        logger.warning("train.init_from=%s has no tokenizer, so the run's tokenizer could not be compared", path)
    elif files and (tokenizer is None or all(sha256(file) != tokenizer.sha256 for file in files)):
        raise ValueError(f"train.init_from={path} has another tokenizer than the run; set data.tokenizer={files[-1]}")


def keep_assets(path: str, folder: Path) -> None:
    """Copy the files next to the weights at ``path`` to ``folder``, so that the run no longer needs ``path``.

    The copied files are config.json, the generation settings, the chat template and the tokenizer's files of a Hugging
    Face model. For a model without config.json, nothing is copied.
    """
    source = Path(path).parent if Path(path).is_file() else find_pretrained(path).assets
    copy_assets(find_assets(source) if source else [], folder)
