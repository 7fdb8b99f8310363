"""From a configuration to the objects of a run: the model, its optimizer, and what is attached to it."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from models.grass_linear import convert_linears
from models.llama import Llama
from optim.baselines import projected_optimizer
from optim.build import inner_optimizer, parameter_groups
from optim.grass import Grass
from optim.master_weights import MasterWeights
from optim.norm_growth import NormGrowthLimiter
from pretrain.config import DTYPES, BaselineConfig, Config, GrassConfig, model_arguments

logger = logging.getLogger(__name__)


@dataclass
class Optimization:
    """The inner optimizer, what steps along with it by hooks, and what is done to the gradients before a step."""

    optimizer: torch.optim.Optimizer
    masters: MasterWeights | None
    grass: Grass | None
    limiter: NormGrowthLimiter | None


def build_model(config: Config, device: torch.device) -> Llama:
    """The model on ``device``, initialised from the run's seed, its linears converted when the run uses Grass."""
    with torch.device("meta"):
        model = Llama(**model_arguments(config)).to_dtype(DTYPES[config.train.dtype])
    model.to_empty(device=device)
    model.init_weights(config.train.seed)
    if isinstance(config.optim, GrassConfig):
        optim = config.optim
        masters = optim.master_weights and config.train.dtype == "bfloat16"
        state_dtype = DTYPES[optim.state_dtype] if optim.state_dtype else torch.float32 if masters else None
        convert_linears(model, optim.rank, optim.patterns, optim.side, state_dtype)
    return model


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
        optimizer = inner_optimizer(optim.inner, groups, **options)
    masters = MasterWeights(optimizer) if optim.master_weights else None
    grass = None
    if isinstance(optim, GrassConfig):
        grass = Grass(
            model, optimizer, seed=config.train.seed,
            refresh_every=optim.refresh_every, selection=optim.selection,
            score=optim.score, sketch_width=optim.sketch_width, probe_steps=optim.probe_steps, stagger=optim.stagger,
            state_at_refresh=optim.state_at_refresh, new_second_moment=optim.new_second_moment,
            refresh_warmup=optim.refresh_warmup, window_end=optim.window_end, new_first_moment=optim.new_first_moment, wait_power=optim.wait_power, score_memory=optim.score_memory,
        )  # fmt: skip
    limiter = NormGrowthLimiter(linears, optim.norm_growth) if optim.norm_growth else None
    return Optimization(optimizer, masters, grass, limiter)


def compile_blocks(model: Llama, device: torch.device) -> bool:
    """``torch.compile`` every block in place; without a working compiler say so and leave the model as it is."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no writable cache: the toolchain fails in many ways
        reason = str(error).strip().splitlines()[0]
        logger.warning("torch.compile does not work here, going on without it: %s", reason)
        torch.compiler.reset()
        return False
    for layer in model.layers:
        layer.compile()
    return True
