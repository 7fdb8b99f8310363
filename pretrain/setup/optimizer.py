"""Build the optimizer of a run from its configuration."""

from torch import nn

from optim.baselines import projected_optimizer
from optim.grass import Grass
from optim.inner import INNER_OPTIMIZERS, WITHOUT_SECOND_MOMENTS, optimizer_of_groups
from optim.mixed_precision import MasterWeights
from optim.norm_growth import NormGrowthLimiter
from optim.param_groups import parameter_groups
from optim.selection import needs_scores
from optim.stack import OptimizerStack
from pretrain.config.schema import BaselineConfig, Config, GrassConfig


def build_optimizer(config: Config, model: nn.Module) -> OptimizerStack:
    """The optimizer for all trainable parameters of ``model``, with Grass, master weights and limits as in ``config``.

    With Grass, convert the linear layers before this call, and choose or load their rows after it.

    Raises:
        ValueError: the optimizer or Grass refuses the settings, or a package is not installed.
    """
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
    return OptimizerStack(optimizer, grass, masters, limiter, config.train.step_in_backward)


def uses_scores(optim: GrassConfig) -> bool:
    """Whether a run scores rows, to select them or to start the second moments of new rows.

    With the selection "frozen", it scores them only once, before the first step.
    """
    by_scores = optim.state_at_refresh == "carry" and optim.new_second_moment == "score"
    return needs_scores(optim.selection) or (by_scores and optim.inner not in WITHOUT_SECOND_MOMENTS)
