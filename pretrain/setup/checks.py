"""Checks of the settings of a run, against each other and against the model that they describe."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from data.prepare import problems as data_problems
from data.tokenizer import MOST_PADDING
from models import activation_checkpointing as checkpointing
from models.attention import resolve_backend
from models.convert import convert_linears
from models.grass_linear import GrassLinear
from models.llama import Llama
from models.precision import DTYPES
from optim.baselines import PROJECTED, SCALE_TYPES
from optim.inner import optimizer_class
from optim.moments import NEW_SECOND_MOMENTS, POLICIES
from optim.param_groups import parameter_groups
from optim.schedule import SCHEDULES, warmup_updates
from optim.scores import SCORES
from optim.selection import SELECTIONS
from pretrain.cli.console import warnings_only
from pretrain.config.schema import (
    SETTLING,
    BaselineConfig,
    Config,
    ConfigError,
    GrassConfig,
    OptimConfig,
    TrainConfig,
    limit_problems,
    model_arguments,
)
from pretrain.distributed.engines import sharding_problems
from pretrain.inference.init_from import init_problems
from pretrain.runs.tensorboard_log import tensorboard_problems
from pretrain.runs.wandb_log import wandb_problems


def check(config: Config, world_size: int = 1, needs_data: bool = True, resumes: bool = False) -> None:
    """Check all settings, without allocating the model.

    Args:
        world_size: number of processes.
        needs_data: whether to check the data settings too, and that the files of ``data.paths`` exist.
        resumes: whether the run has a checkpoint, so that ``train.init_from`` is no longer needed.

    Raises:
        ConfigError: lists every problem with its key and the fix.
    """
    with warnings_only():  # building the run will log the same again
        problems = [*limit_problems(config), *_run_problems(config), *_train_problems(config, world_size)]
        problems += _optim_problems(config.optim)
        problems += [*wandb_problems(config.logger.wandb), *tensorboard_problems(config.logger)]
        if isinstance(config.optim, GrassConfig):
            problems += _grass_problems(config.optim)
        problems += _baseline_problems(config.optim)
        if config.train.step_in_backward:
            problems += _step_in_backward_problems(config.optim, config.train, world_size)
        problems += _warmup_problems(config.optim.warmup_steps, config.train.steps)
        problems += _model_problems(config, world_size, resumes)
        if needs_data:
            of_data = data_problems(config.data)
            # The check of train.init_from reports this too, with the fix for these weights.
            problems += [p for p in of_data if not (config.train.init_from and p.startswith("data.vocab_size: is"))]
    if problems:
        raise ConfigError("\n".join(problems))


def _warmup_problems(warmup: float, steps: int) -> list[str]:
    share = "or give a share of the run between 0 and 1"
    if not math.isfinite(warmup) or (warmup > 1 and warmup != int(warmup)):
        return [f"optim.warmup_steps={warmup:g} is not a number of steps; round it, {share}"]
    if 0 < steps <= warmup_updates(warmup, steps):
        return [f"optim.warmup_steps={warmup:.15g} leaves nothing of train.steps={steps}; lower it, {share}"]
    return []


def _one_of(key: str, value: str, known: Iterable[str]) -> list[str]:
    return [] if value in known else [f"{key}={value} is unknown; choose from {', '.join(known)}"]


def _run_problems(config: Config) -> list[str]:
    name, parts = config.run.name, Path(config.run.name).parts
    forbidden, problems = '\\:*?"<>|', list[str]()
    if not name.strip() or set(forbidden) & set(name) or name.startswith("/") or not parts or ".." in parts:
        advice = f"use none of {' '.join(forbidden)}, and no .. or / at its start"
        problems.append(f"run.name={name!r} cannot be a folder below run.root; {advice}")
    for prompt in config.data.prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes that Python could not decode
            problems.append(f"data.prompts: {prompt!r} is not UTF-8; fix its encoding")
    return problems


def _train_problems(config: Config, world_size: int) -> list[str]:
    train, model, problems = config.train, config.model, list[str]()
    sequences = train.micro_batch_size or 1
    if (share := sequences * train.seq_len * world_size) > 0 and train.tokens_per_step % share:
        problems.append(
            f"train.tokens_per_step={train.tokens_per_step} is not divisible by micro_batch_size × seq_len × processes"
            f" = {sequences} × {train.seq_len} × {world_size}; change one of them"
        )
    if train.keep_every and not train.keep_last:
        problems.append("train.keep_every has no effect if train.keep_last=0 keeps all; set train.keep_last above 0")
    if train.profile and train.profile + SETTLING > train.steps:
        problems.append(
            f"train.profile={train.profile} records {train.profile} steps after the first {SETTLING}, but train.steps="
            f"{train.steps}; lower train.profile or raise train.steps"
        )
    try:
        checkpointing.parse(train.checkpointing)
    except ValueError as error:
        problems.append(str(error))
    if train.document_masks and config.data.source == "instructions":
        problems.append(
            "train.document_masks=true: each row of data=instructions is already one document; set it to false"
        )
    if config.data.on_the_fly and config.data.source in ("mixture", "instructions"):
        problems.append(
            f"data.on_the_fly=true: the order of data.source={config.data.source} needs all of its text; prepare it "
            "first, with data.on_the_fly=false"
        )
    if train.seq_len > model.max_position_embeddings:
        problems.append(
            f"train.seq_len={train.seq_len} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; lower it or choose a model with more positions"
        )
    return problems


def _optim_problems(optim: OptimConfig) -> list[str]:
    problems = _one_of("optim.schedule", optim.schedule, SCHEDULES)
    for key in ("inner", "embedding_inner"):
        try:
            optimizer_class(getattr(optim, key) or optim.inner)
        except ValueError as error:
            problems.append(str(error).replace("optim.inner", f"optim.{key}"))
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        problems.append(f"optim.betas={optim.betas} must be two numbers in [0, 1)")
    return problems


def _grass_problems(optim: GrassConfig) -> list[str]:
    problems = _one_of("optim.selection", optim.selection, SELECTIONS)
    problems += _one_of("optim.score", optim.score, SCORES)
    problems += _one_of("optim.state_at_refresh", optim.state_at_refresh, POLICIES)
    problems += _one_of("optim.new_second_moment", optim.new_second_moment, NEW_SECOND_MOMENTS)
    if not 0 <= optim.refresh_warmup <= max(1, optim.refresh_every):
        problems.append(f"optim.refresh_warmup={optim.refresh_warmup} must be between 0 and optim.refresh_every")
    if optim.stagger not in (True, False, "auto"):
        problems.append(f"optim.stagger={optim.stagger} is unknown; choose from true, false, auto")
    if optim.stagger is True and optim.refresh_warmup:
        problems.append(
            "optim.refresh_warmup needs all blocks to choose rows in the same step; set optim.refresh_warmup=0 or "
            "optim.stagger=false"
        )
    if optim.master_weights and optim.state_dtype == "bfloat16":
        problems.append("optim.master_weights=true keeps rows in float32; set optim.state_dtype=float32 or null")
    if not optim.patterns:
        problems.append("optim.patterns=[] selects no layer for Grass; name some layers, or set optim=adamw")
    return problems


def _baseline_problems(optim: OptimConfig) -> list[str]:
    if not isinstance(optim, BaselineConfig):
        if optim.embedding_inner in PROJECTED:
            return [f"optim.embedding_inner={optim.embedding_inner} is for linear layers; use adamw8bit or adafactor"]
        projects = optim.inner in PROJECTED
        return [f"optim.inner={optim.inner} needs keys of its own; use optim={optim.inner}"] if projects else []
    if optim.inner not in PROJECTED:
        return [f"optim.inner={optim.inner} does not project; use {', '.join(PROJECTED)}, or optim=adamw"]
    problems = []
    if optim.embedding_inner is not None:
        problems.append(f"optim.embedding_inner: not supported with {optim.inner}; set it to null")
    if optim.inner == "apollo":
        problems += _one_of("optim.scale_type", str(optim.scale_type), SCALE_TYPES)
    elif optim.scale_type is not None:
        problems.append(f"optim.scale_type={optim.scale_type} is for APOLLO; leave it null with {optim.inner}")
    return problems


def _chunked_head_problems(optim: GrassConfig) -> list[str]:
    if optim.score != "exact":
        return []
    return [
        "optim.score=exact scores the head by the gradient of every chunk of train.loss_chunk_tokens, not by their "
        "sum; use optim.score=sketch, or set train.loss_chunk_tokens=null"
    ]


def _step_in_backward_problems(optim: OptimConfig, train: TrainConfig, world_size: int) -> list[str]:
    reasons: list[tuple[object, str]] = [
        (
            optim.clip,
            "the global norm is unknown when the first steps are made; set optim.clip=0, and if necessary "
            "optim.norm_growth=1.01, which limits each linear layer separately",
        ),
        (train.non_finite == "skip", "steps are made before all gradients are known; set train.non_finite=stop"),
        (train.log_layers_every, "gradients are freed before their norms are measured; set train.log_layers_every=0"),
        (world_size > 1, f"gradients of {world_size} processes are summed after the backward; set it to false"),
        (optim.master_weights, "master weights are updated all at once; set optim.master_weights=false"),
        (isinstance(optim, BaselineConfig), f"{optim.inner} counts its steps over all parameters; set it to false"),
    ]
    return [f"train.step_in_backward=true: {why}" for applies, why in reasons if applies]


def _model_problems(config: Config, world_size: int, resumes: bool) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = []
    try:
        with torch.device("meta"):
            model = Llama(**model_arguments(config))
        if config.train.init_from and not resumes:
            problems += init_problems(config.train.init_from, model, model_arguments(config), config.data.tokenizer)
        if isinstance(config.optim, GrassConfig):
            optim = config.optim
            convert_linears(
                model, optim.rank, optim.patterns, optim.side, share_index=optim.share_index,
                attention_weight=optim.attention_weight,
            )  # fmt: skip
            if isinstance(model.lm_head, GrassLinear) and config.train.loss_chunk_tokens:
                problems += _chunked_head_problems(optim)
        if isinstance(config.optim, BaselineConfig):
            linears = parameter_groups(model, lr=1.0, linear_lr=1.0)[0]["params"]
            rank, most = config.optim.rank, min(min(p.shape) for _, p in linears)
            if not 1 <= rank <= most:
                problems.append(f"optim.rank={rank} must be between 1 and {most}")
        problems += sharding_problems(config, model, world_size)
    except ValueError as error:
        problems.append(str(error))
    try:
        head_dim = config.model.hidden_size // max(1, config.model.num_attention_heads)
        resolve_backend(config.model.attention, device, DTYPES.get(config.train.dtype, torch.float32), head_dim)
    except ValueError as error:
        problems.append(str(error))
    return problems if resumes else problems + _vocabulary_problems(config)


def _vocabulary_problems(config: Config) -> list[str]:
    """Compare tokens and embedding rows. More rows are allowed as padding, or in a model from train.init_from."""
    tokens, rows = config.data.vocab_size, config.model.vocab_size
    if tokens <= rows and (rows <= tokens + MOST_PADDING or config.train.init_from):
        return []
    return [
        f"data.vocab_size={tokens} does not match model.vocab_size={rows}: a model has an embedding row per token, and "
        f"up to {MOST_PADDING} more as padding; set both to the same value"
    ]
