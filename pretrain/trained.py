"""A trained model on disk, whoever wrote it: a run of this program, or a LLaMA folder as Hugging Face keeps them."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.shards import sha256
from data.tokenizer import Tokenizer
from models.llama import Llama
from pretrain import checkpoint, hugging_face
from pretrain.config import DTYPES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """Where a model lies, the keyword arguments for its Llama, its dtype, and ways to its weights and tokenizer."""

    path: Path
    arguments: dict[str, Any]
    dtype: torch.dtype
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    tokenizer: Callable[[], Path]


def find_trained(path: str | Path) -> Trained:
    """The model in a run's folder (its newest checkpoint), in one of its checkpoints, or in a Hugging Face folder.

    Raises:
        ValueError: there is no such model, or one that cannot be read.
    """
    path = Path(path)
    if (path / "config.yaml").exists():
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path} holds no checkpoint yet; wait for one (train.checkpoint_every)")
        return _of_checkpoint(newest)
    if (path / "state.json").exists():
        return _of_checkpoint(path)
    if (path / hugging_face.CONFIG).exists():
        arguments, dtype = hugging_face.read_arguments(path)
        return Trained(
            path, arguments, dtype, lambda: hugging_face.read_weights(path), lambda: _existing(path / "tokenizer.model")
        )
    raise ValueError(
        f"{path} holds no model; name a run's folder, one of its checkpoints, or a folder with a LLaMA's "
        f"{hugging_face.CONFIG} and safetensors files"
    )


def load_trained(path: str | Path) -> tuple[Llama, Tokenizer]:
    """The model at ``path`` in its own dtype, on the GPU if there is one, and its tokenizer.

    Raises:
        ValueError: as ``find_trained`` does, and for a tokenizer that is not there.
    """
    found = find_trained(path)
    tokenizer = Tokenizer(found.tokenizer())
    with torch.device("meta"):
        model = Llama(**found.arguments).to_dtype(found.dtype)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    fill(model, found.weights(), found.path)
    logger.info("read %s", found.path)
    return model.eval(), tokenizer


@torch.no_grad()
def fill(model: Llama, weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Copy ``weights`` into ``model``, in the model's dtypes.

    Raises:
        ValueError: a weight too many, too few, or of another shape.
    """
    own = model.state_dict()
    missing = set(own)
    for name, tensor in weights:
        if name not in own or own[name].shape != tensor.shape:
            wanted = f"shape {tuple(own[name].shape)}" if name in own else "no such weight"
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model {wanted}; check model.*")
        own[name].copy_(tensor)
        missing.discard(name)
    if model.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing)[:4])} …; check model.*")


def _of_checkpoint(path: Path) -> Trained:
    run = path.parent.parent
    stored = OmegaConf.load(_existing(run / "config.yaml"))
    config = cast("dict[str, Any]", OmegaConf.to_container(stored, resolve=True))
    arguments = {key: value for key, value in config["model"].items() if key in hugging_face.OURS}

    def weights() -> Iterable[tuple[str, Tensor]]:
        with torch.device("meta"):
            names = list(Llama(**arguments).state_dict())
        return checkpoint.read_weights(path, names).items()

    return Trained(path, arguments, DTYPES[config["train"]["dtype"]], weights, lambda: _tokenizer_of(run, path, config))


def _tokenizer_of(run: Path, path: Path, config: dict[str, Any]) -> Path:
    """The run's own copy, or, for a run that kept none, the one in the preparation it was trained on."""
    if (run / "tokenizer.model").exists():
        return run / "tokenizer.model"
    wanted = checkpoint.read_state(path)["data"]["tokenizer"]
    for file in Path(config["data"]["root"]).glob("*/tokenizer.model"):
        if sha256(file) == wanted:
            return file
    raise ValueError(f"{run} holds no tokenizer.model; copy it there from the preparation the run was trained on")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"there is no {path}; bring it back")
    return path
