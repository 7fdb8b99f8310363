"""Find and load pretrained models: runs, their checkpoints, and LLaMAs in Hugging Face's format."""

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
from models.weights import fill_weights
from pretrain.checkpoint.directory import latest, read_state
from pretrain.checkpoint.tensors import read_weights as read_checkpoint_weights
from pretrain.config.compose import read_config
from pretrain.inference.hf_assets import ASSETS_FOLDER, end_ids
from pretrain.inference.hf_llama import CONFIG, MODEL_KEYS, read_arguments, read_weights


@dataclass(frozen=True)
class PretrainedModel:
    """A model on disk.

    path        the checkpoint, or the Hugging Face folder
    arguments   the keyword arguments for ``Llama``
    dtype       the dtype of the weights
    seq_len     the length of the training sequences in tokens; the number of positions if this is unknown
    weights     reads the weights: pairs of a name in ``Llama`` and a tensor, one at a time
    tokenizer   finds the tokenizer's file; raises ValueError if there is none
    assets      the folder with the other files of a Hugging Face model, see ``hf_assets``; None without such files
    run         the folder of the run that trained the model; None for a Hugging Face model
    """

    path: Path
    arguments: dict[str, Any]
    dtype: torch.dtype
    seq_len: int
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    tokenizer: Callable[[], Path]
    assets: Path | None
    run: Path | None = None

    def load(self) -> tuple[Llama, Tokenizer]:
        """The model in its dtype and in eval mode, on the GPU if there is one, and its tokenizer.

        Raises:
            ValueError: the tokenizer is missing, or has tokens without an embedding row in the model; or the weights
                cannot be read.
        """
        tokenizer = Tokenizer(self.tokenizer())
        require_embeddings(tokenizer, self.arguments["vocab_size"])
        with torch.device("meta"):
            model = Llama(**self.arguments).to_dtype(self.dtype)
        model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
        fill_weights(model, self.weights(), self.path)
        return model.eval(), tokenizer

    def end_ids(self) -> list[int]:
        """The tokens, besides the tokenizer's eos token, at which generation stops; see ``hf_assets.end_ids``."""
        return end_ids(self.assets) if self.assets else []


def find_pretrained(path: str | Path) -> PretrainedModel:
    """The model at ``path``: a run's folder (its newest checkpoint), a checkpoint's folder, or a Hugging Face folder.

    Raises:
        ValueError: there is no model, or it cannot be read.
    """
    path = Path(path)
    if (path / "config.yaml").exists():
        newest = latest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"{path} has no checkpoint yet; wait for the first (train.checkpoint_every)")
        return _from_checkpoint(newest)
    if (path / "state.json").exists():
        return _from_checkpoint(path)
    if (path / CONFIG).exists():
        arguments, dtype = read_arguments(path)
        return PretrainedModel(
            path, arguments, dtype, arguments["max_position_embeddings"],
            weights=lambda: read_weights(path),
            tokenizer=lambda: find_tokenizer(path) or _require(path / "tokenizer.model"),
            assets=path,
        )  # fmt: skip
    raise ValueError(
        f"{path} contains no model; name a run's folder, one of its checkpoints, or a folder with a LLaMA's {CONFIG} "
        "and safetensors files"
    )


def load_pretrained(path: str | Path) -> tuple[Llama, Tokenizer]:
    """The model at ``path`` in its dtype and in eval mode, on the GPU if there is one, and its tokenizer.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's folder, or a Hugging Face folder.

    Raises:
        ValueError: there is no model or no tokenizer, or they cannot be read or do not fit together.
    """
    return find_pretrained(path).load()


def require_embeddings(tokenizer: Tokenizer, rows: int) -> None:
    """Check that every token of ``tokenizer`` has one of the model's ``rows`` embedding rows, see ``Tokenizer.fits``.

    More rows than tokens are allowed: embeddings are often padded to a multiple of 64 or 128.

    Raises:
        ValueError: a token has no row.
    """
    if not tokenizer.fits(rows):
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model has {rows} embedding rows; use the "
            "tokenizer that the model was trained with, or a model with more rows (model.vocab_size of a new model)"
        )


def _from_checkpoint(path: Path) -> PretrainedModel:
    run = path.parent.parent
    stored = read_config(_require(run / "config.yaml"))
    config = cast("dict[str, Any]", OmegaConf.to_container(stored, resolve=True))
    arguments = {key: value for key, value in config["model"].items() if key in MODEL_KEYS}
    dtype = DTYPES[config["train"]["dtype"]]

    def weights() -> Iterable[tuple[str, Tensor]]:
        with torch.device("meta"):
            names = [name for name, _ in Llama(**arguments).named_parameters()]  # a tied head once
        return read_checkpoint_weights(path, names, dtype)

    return PretrainedModel(
        path, arguments, dtype, config["train"]["seq_len"], weights,
        tokenizer=lambda: _tokenizer_of(run, path, config),
        assets=run / ASSETS_FOLDER if (run / ASSETS_FOLDER).exists() else None,
        run=run,
    )  # fmt: skip


def _tokenizer_of(run: Path, path: Path, config: dict[str, Any]) -> Path:
    """The tokenizer's copy in the run's folder, or else its file in the prepared dataset of the run."""
    if found := find_tokenizer(run):
        return found
    wanted = read_state(path)["data"]["tokenizer"]
    for file in Path(config["data"]["root"]).glob("*/tokenizer.*"):
        if sha256(file) == wanted:
            return file
    raise ValueError(f"{run} has no tokenizer.model; copy it there from the prepared data of the run")


def _require(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"there is no {path}; copy it there")
    return path
