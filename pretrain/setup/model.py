"""Build the model of a run."""

import logging
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from models.activation_checkpointing import checkpoint_blocks
from models.convert import convert_linears
from models.grass_linear import GrassLinear
from models.llama import Llama, odd_sizes
from models.precision import DTYPES, at_least_fp32
from models.recompute import set_lean
from models.weights import fill_weights
from pretrain.config.schema import Config, GrassConfig, model_arguments

logger = logging.getLogger(__name__)


def build_model(
    config: Config,
    device: torch.device,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    shard: Callable[[Llama], None] | None = None,
) -> Llama:
    """The model on ``device``, with converted linear layers if the run uses Grass.

    Args:
        weights: (name, complete tensor) of every initial weight; None to initialise the model from ``train.seed``.
        shard: called with the model on the meta device; may replace its parameters by shards. None for no shards.

    Raises:
        ValueError: impossible settings, or weights that do not fit the model.
    """
    if device.type == "cuda" and config.train.dtype == "bfloat16":
        warn_of_odd_sizes(config.model.hidden_size, config.model.intermediate_size, config.model.vocab_size)
    model = outline(config)
    if shard is not None:
        shard(model)
    return materialise(config, model, device, weights)


@cache
def warn_of_odd_sizes(hidden_size: int, intermediate_size: int, vocab_size: int) -> None:
    """Log a warning for each size that makes bfloat16 matmuls slow on a GPU; once per process for the same sizes."""
    for message in odd_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size, vocab_size=vocab_size):
        logger.warning(message)


def outline(config: Config) -> Llama:
    """The model on the meta device, in its dtypes, with converted linear layers if the run uses Grass."""
    with torch.device("meta"):
        model = Llama(**model_arguments(config)).to_dtype(DTYPES[config.train.dtype])
        if isinstance(config.optim, GrassConfig):
            optim = config.optim
            rows = DTYPES[optim.state_dtype] if optim.state_dtype else at_least_fp32(DTYPES[config.train.dtype])
            convert_linears(
                model, optim.rank, optim.patterns, optim.side, rows, optim.share_index, optim.int8_weights,
                optim.attention_weight,
            )  # fmt: skip
    return model


def materialise(
    config: Config, model: Llama, device: torch.device, weights: Iterable[tuple[str, Tensor]] | None = None
) -> Llama:
    """Allocate ``model`` (from ``outline``) on ``device`` and fill its weights. Grass layers select their first rows.

    Args:
        weights: as in ``build_model``.
    """
    model.to_empty(device=device)
    if weights is None:
        model.init_weights(config.train.seed)
    else:
        fill_weights(model, weights, f"train.init_from={config.train.init_from}")
    for module in model.modules():
        if isinstance(module, GrassLinear):
            module.reset()
    checkpoint_blocks(model.layers, config.train.checkpointing)
    set_lean(model.layers, config.train.lean_activations)
    model.loss_chunk_tokens = config.train.loss_chunk_tokens
    return model
