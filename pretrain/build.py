"""From a configuration to the objects of a run: the model, its optimizer, and what is attached to it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from models.checkpointing import checkpoint_blocks
from models.grass_linear import GrassLinear, convert_linears
from models.int8_weight import fill_weight
from models.llama import Llama, odd_sizes
from models.precision import at_least_fp32
from models.recipes import save_recipes
from optim.baselines import projected_optimizer
from optim.build import INNER_OPTIMIZERS, optimizer_of_groups, parameter_groups
from optim.grass import Grass
from optim.master_weights import MasterWeights
from optim.norm_growth import NormGrowthLimiter
from optim.step_in_backward import StepInBackward
from pretrain.config import DTYPES, BaselineConfig, Config, GrassConfig, model_arguments

logger = logging.getLogger(__name__)


@dataclass
class Optimization:
    """The inner optimizer, what steps along with it by hooks, and what is done to the gradients before a step."""

    optimizer: torch.optim.Optimizer
    masters: MasterWeights | None
    grass: Grass | None
    limiter: NormGrowthLimiter | None
    in_backward: StepInBackward | None


def build_model(
    config: Config,
    device: torch.device,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    shard: Callable[[Llama], None] | None = None,
) -> Llama:
    """The model on ``device``, its linears converted when the run uses Grass.

    It starts from ``weights`` by name, or is initialised from the run's seed. ``shard`` gets it on the meta device and
    may leave this process only a part of it to hold.
    """
    if device.type == "cuda" and config.train.dtype == "bfloat16":
        warn_of_odd_sizes(config.model.hidden_size, config.model.intermediate_size, config.model.vocab_size)
    model = outline(config)
    if shard is not None:
        shard(model)
    return materialise(config, model, device, weights)


@cache
def warn_of_odd_sizes(hidden_size: int, intermediate_size: int, vocab_size: int) -> None:
    """Log the sizes that make products slow, once."""
    for message in odd_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size, vocab_size=vocab_size):
        logger.warning(message)


def outline(config: Config) -> Llama:
    """The model in its dtypes, its linears converted when the run uses Grass, without memory: on the meta device."""
    with torch.device("meta"):
        model = Llama(**model_arguments(config)).to_dtype(DTYPES[config.train.dtype])
        if isinstance(config.optim, GrassConfig):
            optim = config.optim
            rows = DTYPES[optim.state_dtype] if optim.state_dtype else at_least_fp32(DTYPES[config.train.dtype])
            convert_linears(model, optim.rank, optim.patterns, optim.side, rows, optim.share_index, optim.int8_weights)
    return model


def materialise(
    config: Config, model: Llama, device: torch.device, weights: Iterable[tuple[str, Tensor]] | None = None
) -> Llama:
    """Give an outline its memory on ``device``, its weights, and its first rows when the run uses Grass."""
    model.to_empty(device=device)
    if weights is None:
        model.init_weights(config.train.seed)
    else:
        fill(model, weights, f"train.init_from={config.train.init_from}")
    for module in model.modules():
        if isinstance(module, GrassLinear):
            module.reset()
    checkpoint_blocks(model.layers, config.train.checkpointing)
    save_recipes(model.layers, config.train.lean_activations)
    model.loss_chunk_tokens = config.train.loss_chunk_tokens
    return model


@torch.no_grad()
def fill(model: Llama, weights: Iterable[tuple[str, Tensor]], origin: object) -> None:
    """Copy ``weights`` into ``model``, in the model's dtypes.

    Raises:
        ValueError: a weight too many, too few, or of another shape.
    """
    # What Grass layers have besides their weights is made from these.
    own = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith("weight")}
    missing, casts = set(own), set[str]()
    for name, tensor in weights:
        if name not in own or own[name].shape != tensor.shape:
            wanted = f"shape {tuple(own[name].shape)}" if name in own else "no such weight"
            raise ValueError(f"{origin}: {name} has shape {tuple(tensor.shape)}, the model {wanted}; check model.*")
        if tensor.dtype != own[name].dtype:
            casts.add(f"{tensor.dtype} to {own[name].dtype}")
        fill_weight(model, name, tensor)
        missing.discard(name)
    if model.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(sorted(missing)[:4])} …; check model.*")
    logger.info("took the weights of %s%s", origin, f", cast from {', '.join(sorted(casts))}" if casts else "")


def build_optimization(config: Config, model: nn.Module) -> Optimization:
    """The optimizer over the trainable parameters of ``model``, with master weights and Grass if configured."""
    optim = config.optim
    alpha = optim.alpha if isinstance(optim, GrassConfig) else 1.0
    groups = parameter_groups(model, lr=optim.lr, linear_lr=optim.linear_lr * alpha, weight_decay=optim.weight_decay)
    linears = [p for group in groups if group["name"] == "linears" for _, p in group["params"]]
    options = {"betas": tuple(optim.betas), "eps": optim.eps, "momentum": optim.momentum}
    if isinstance(optim, BaselineConfig):
        optimizer = projected_optimizer(
            optim.inner, groups, rank=optim.rank, update_gap=optim.update_gap, scale=optim.scale,
            scale_type=optim.scale_type, **options,
        )  # fmt: skip
    else:
        optimizer = optimizer_of_groups(optim.inner, optim.embedding_inner, groups, **options)
    masters = MasterWeights(optimizer) if optim.master_weights else None
    grass = None
    if isinstance(optim, GrassConfig):
        grass = Grass(
            model, optimizer, seed=config.train.seed,
            refresh_every=optim.refresh_every, selection=optim.selection,
            score=optim.score, sketch_width=optim.sketch_width, probe_steps=optim.probe_steps, stagger=optim.stagger,
            state_at_refresh=optim.state_at_refresh, new_second_moment=optim.new_second_moment,
            refresh_warmup=optim.refresh_warmup, block_by_block=optim.inner in INNER_OPTIMIZERS,
        )  # fmt: skip
    limiter = NormGrowthLimiter(linears, optim.norm_growth) if optim.norm_growth else None
    in_backward = StepInBackward(optimizer, grass, limiter) if config.train.step_in_backward else None
    return Optimization(optimizer, masters, grass, limiter, in_backward)
