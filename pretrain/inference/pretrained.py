"""A trained model on disk, whoever wrote it: a run of this program, or a LLaMA folder as Hugging Face keeps them."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.atomic import sha256
from data.tokenizer import Tokenizer, find_tokenizer
from models.llama import Llama
from models.precision import DTYPES
from models.weights import fill
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.directory import newest_to_read
from pretrain.config.compose import read_config
from pretrain.inference import hf_llama as hugging_face

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedModel:
    """Where a model lies, the keyword arguments for its Llama, its dtype, and ways to its weights and tokenizer.

    ``seq_len`` is how many tokens it saw at once in training, or can see at the most when that is not known.
    """

    path: Path
    arguments: dict[str, Any]
    dtype: torch.dtype
    seq_len: int
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    tokenizer: Callable[[], Path]


def find_pretrained(path: str | Path) -> PretrainedModel:
    """The model in a run's folder (its newest checkpoint but for a half-way one), in one of its checkpoints, or in a
    Hugging Face folder.

    Raises:
        ValueError: there is no such model, or one that cannot be read.
    """
    path = Path(path)
    if (path / "config.yaml").exists():
        newest = newest_to_read(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path} holds no checkpoint yet; wait for one (train.checkpoint_every)")
        return _of_checkpoint(newest)
    if (path / "state.json").exists():
        return _of_checkpoint(path)
    if (path / hugging_face.CONFIG).exists():
        arguments, dtype = hugging_face.read_arguments(path)
        return PretrainedModel(
            path, arguments, dtype, arguments["max_position_embeddings"],
            lambda: hugging_face.read_weights(path),
            lambda: find_tokenizer(path) or _existing(path / "tokenizer.model"),
        )  # fmt: skip
    raise ValueError(
        f"{path} holds no model; name a run's folder, one of its checkpoints, or a folder with a LLaMA's "
        f"{hugging_face.CONFIG} and safetensors files"
    )


def load_pretrained(path: str | Path) -> tuple[Llama, Tokenizer]:
    """The model at ``path`` in its own dtype, on the GPU if there is one, and its tokenizer.

    Raises:
        ValueError: as ``find_pretrained`` does, and for a tokenizer that is not there.
    """
    found = find_pretrained(path)
    tokenizer = Tokenizer(found.tokenizer())
    with torch.device("meta"):
        model = Llama(**found.arguments).to_dtype(found.dtype)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    fill(model, found.weights(), found.path)
    return model.eval(), tokenizer


def read_weights_at(path: str | Path) -> Iterable[tuple[str, Tensor]]:
    """The weights by our names of a model that ``find_pretrained`` finds, or in one safetensors file."""
    path = Path(path)
    return hugging_face.read_weights(path) if path.is_file() else find_pretrained(path).weights()


def init_problems(path: str, model: Llama, arguments: dict[str, Any]) -> list[str]:
    """Why a run whose ``model`` has these keyword arguments cannot start from the weights at ``path``, a line each."""
    try:
        if Path(path).is_file():
            return _shape_problems(path, hugging_face.shapes_of(Path(path)), model)
        theirs = find_pretrained(path).arguments
    except ValueError as error:
        return [f"train.init_from: {line}" for line in str(error).splitlines()]
    heads = {"num_key_value_heads": theirs["num_attention_heads"]}
    theirs = {key: heads.get(key) if value is None else value for key, value in theirs.items()}
    ours = {key: arguments["num_attention_heads"] if value is None else value for key, value in arguments.items()}
    free = ("initializer_range", "max_position_embeddings")
    unlike = {key: value for key, value in theirs.items() if key not in free and ours[key] != value}
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


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Hold ``tokenizer`` against the one that the model at ``path`` was trained with, if that lies beside it.

    Raises:
        ValueError: it is another one.
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


def _of_checkpoint(path: Path) -> PretrainedModel:
    run = path.parent.parent
    stored = read_config(_existing(run / "config.yaml"))
    config = cast("dict[str, Any]", OmegaConf.to_container(stored, resolve=True))
    arguments = {key: value for key, value in config["model"].items() if key in hugging_face.OURS}

    def weights() -> Iterable[tuple[str, Tensor]]:
        with torch.device("meta"):
            names = [name for name, _ in Llama(**arguments).named_parameters()]  # a tied head once
        return checkpoint.read_weights(path, names, dtype)

    train, dtype = config["train"], DTYPES[config["train"]["dtype"]]
    return PretrainedModel(path, arguments, dtype, train["seq_len"], weights, lambda: _tokenizer_of(run, path, config))


def _tokenizer_of(run: Path, path: Path, config: dict[str, Any]) -> Path:
    """The run's own copy, or, for a run that kept none, the one in the preparation it was trained on."""
    if found := find_tokenizer(run):
        return found
    wanted = checkpoint.read_state(path)["data"]["tokenizer"]
    for file in Path(config["data"]["root"]).glob("*/tokenizer.*"):
        if sha256(file) == wanted:
            return file
    raise ValueError(f"{run} holds no tokenizer.model; copy it there from the preparation the run was trained on")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"there is no {path}; bring it back")
    return path
