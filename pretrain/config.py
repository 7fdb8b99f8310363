"""The schema of a run's configuration, and the check that finds every problem in one before anything is built.

The dataclasses hold names and types; the values are in ``conf/``. A key that is not here is an error.
"""

import difflib
import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.settings import DataSettings
from data.settings import problems as data_problems
from models.attention import resolve_backend
from models.grass_linear import convert_linears
from models.llama import Llama
from optim.build import optimizer_class
from optim.grass import SCORES
from optim.moments import NEW_SECOND_MOMENTS, POLICIES
from optim.schedule import SCHEDULES
from optim.selection import SELECTIONS

CONF = Path(__file__).resolve().parent.parent / "conf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem, a line each."""


@dataclass
class RunConfig:
    name: str  # the run's folder below root
    root: str


@dataclass
class ModelConfig:
    """The keyword arguments of models.llama.Llama, which are Hugging Face's names."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    initializer_range: float
    attention: str  # auto | sdpa | flash


@dataclass
class OptimConfig:
    """Full-rank training; Grass adds its own keys to these."""

    name: str
    inner: str  # adamw | adam | sgd | adafactor | adamw8bit | the dotted path of a torch.optim.Optimizer
    lr: float  # peak rate of embeddings, head and norms
    linear_lr: float  # peak rate of the attention and MLP linears
    weight_decay: float  # on matrices, and as the inner optimizer applies it: decoupled or not
    betas: list[float]  # of those that have them, as are eps and momentum
    eps: float
    momentum: float
    clip: float  # global gradient norm; 0 for none
    schedule: str  # cosine | wsd | constant
    warmup_steps: int
    final_lr: float  # as a share of the peak
    decay_share: float  # wsd: the share of all steps that the final decay takes
    master_weights: bool  # fp32 masters for parameters that train in bf16


@dataclass
class GrassConfig(OptimConfig):
    patterns: list[str]  # globs of the linears to convert
    rank: int  # rows (or columns) trained in each linear
    alpha: float  # multiplies the rate of the selected rows
    refresh_every: int  # updates between two choices of rows
    selection: str
    score: str  # exact | sketch
    sketch_width: int
    probe_steps: int  # the last steps before a refresh whose gradients are scored
    stagger: bool  # refresh the layers in turn
    side: Any  # auto | rows | columns, or one of these for each glob of names: {down_proj: columns}
    state_at_refresh: str  # reset | carry
    new_second_moment: str  # mean | score | zero: where carried second moments of new rows start
    refresh_warmup: int  # updates over which the rows' rate warms up again after a refresh
    state_dtype: str | None  # dtype of rows and moments; when null the model's, or float32 with master_weights


@dataclass(kw_only=True)
class DataConfig(DataSettings):
    prompts: list[str] = field(default_factory=list)
    """What samples.md lets the model continue."""


@dataclass
class TrainConfig:
    steps: int
    tokens_per_step: int  # over all processes and micro-batches
    micro_batch_size: int  # sequences a process takes at once
    seq_len: int
    dtype: str  # float32 | bfloat16 | float64: of weights, activations and gradients
    seed: int
    resume: str  # auto | never
    checkpoint_every: int
    eval_every: int
    eval_sequences: int  # at the most, from the validation split
    log_every: int
    compile: bool
    sample_tokens: int  # length of each sample at the end; 0 for none


@dataclass
class WandbConfig:
    mode: str  # auto | online | offline | disabled
    project: str
    entity: str | None
    group: str | None


@dataclass
class LoggerConfig:
    wandb: WandbConfig


@dataclass
class Config:
    run: RunConfig
    model: ModelConfig
    optim: Any  # OptimConfig or GrassConfig, as the group says
    data: DataConfig
    train: TrainConfig
    logger: LoggerConfig


def register_schema() -> None:
    """Make the schemas known to Hydra under the names that the YAML files use."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    store.store(group="model", name="model_schema", node=ModelConfig)
    store.store(group="optim", name="optim_schema", node=OptimConfig)
    store.store(group="optim", name="grass_schema", node=GrassConfig)
    store.store(group="data", name="data_schema", node=DataConfig)
    store.store(group="logger", name="logger_schema", node=LoggerConfig)


register_schema()


def load(overrides: list[str]) -> Config:
    """Compose ``conf/`` with ``overrides`` as the training command does.

    Raises:
        ConfigError: lists every override that names an unknown key or gives a wrong type.
    """
    try:
        return to_config(_compose(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(overrides, error)) from None


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def to_config(cfg: DictConfig) -> Config:
    """The composed configuration as dataclasses, interpolations resolved.

    Raises:
        ConfigError: names the keys that have no value.
    """
    if missing := OmegaConf.missing_keys(cfg):
        raise ConfigError("\n".join(f"{k} has no value; give it as {k}=…" for k in sorted(missing)))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    return config


def _explain(overrides: list[str], error: Exception) -> str:
    """One line for each override that is wrong by itself; the error as it came when only the combination is."""
    choices = {o: o.lstrip("+~").partition("=")[::2] for o in overrides}
    groups = [o for o, (group, value) in choices.items() if value in _options(group)]
    lines = []
    for override, (name, value) in choices.items():
        if (options := _options(name)) and value not in options:
            lines.append(f"{override}: {name} can be {', '.join(options)}{_nearest(value, options)}")
            continue
        try:
            _compose(list(dict.fromkeys([*groups, override])))
        except (HydraException, OmegaConfBaseException) as alone:
            lines.append(f"{override}: {_in_short(alone)}{_nearest(name, _keys(_compose(groups)))}")
    return "\n".join(lines) or _in_short(error)


def _options(group: str) -> list[str]:
    """The names that ``group=…`` can take; none when ``group`` is no config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group else []


def _in_short(error: Exception) -> str:
    """What Hydra or OmegaConf says, without the dump of types that follows."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(("full_key", "object_type", "reference")))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near and name not in known else ""


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, node):
        full = f"{prefix}{name}"
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        keys += _keys(child, full + ".") if isinstance(child, DictConfig) else [full]
    return keys


def model_arguments(config: Config) -> dict[str, Any]:
    """The keyword arguments for Llama."""
    return {f.name: getattr(config.model, f.name) for f in fields(ModelConfig) if f.name != "name"}


def check(config: Config, world_size: int = 1) -> None:
    """Hold the settings against each other and against the model they describe, built without memory.

    Raises:
        ConfigError: lists every problem with its key and the mend.
    """
    logging.disable(logging.INFO)  # what is looked at here is built again for the run, which says it then
    try:
        problems = [*_train_problems(config, world_size), *_optim_problems(config), *_model_problems(config)]
        problems += data_problems(config.data)
    finally:
        logging.disable(logging.NOTSET)
    if problems:
        raise ConfigError("\n".join(problems))


def _positive(section: str, node: Any, *names: str) -> list[str]:
    return [f"{section}.{n}={getattr(node, n)} must be at least 1" for n in names if getattr(node, n) < 1]


def _one_of(key: str, value: str, known: Any) -> list[str]:
    return [] if value in known else [f"{key}={value} is unknown; choose from {', '.join(known)}"]


def _train_problems(config: Config, world_size: int) -> list[str]:
    train, model = config.train, config.model
    problems = _positive(
        "train", train, "steps", "tokens_per_step", "micro_batch_size", "seq_len", "log_every", "eval_sequences"
    )
    problems += _one_of("train.dtype", train.dtype, DTYPES) + _one_of("train.resume", train.resume, ("auto", "never"))
    problems += _one_of("logger.wandb.mode", config.logger.wandb.mode, ("auto", "online", "offline", "disabled"))
    if not problems and train.tokens_per_step % (train.micro_batch_size * train.seq_len * world_size):
        problems.append(
            f"train.tokens_per_step={train.tokens_per_step} is not divisible by micro_batch_size × seq_len × processes"
            f" = {train.micro_batch_size} × {train.seq_len} × {world_size}; change one of them"
        )
    if train.seq_len > model.max_position_embeddings:
        problems.append(
            f"train.seq_len={train.seq_len} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}; shorten it or choose a model with more positions"
        )
    if not config.run.name.strip() or any(c in config.run.name for c in '\\:*?"<>|'):
        problems.append(f"run.name={config.run.name!r} cannot be a folder's name; use letters, digits, - and _")
    return problems


def _optim_problems(config: Config) -> list[str]:
    optim, train = config.optim, config.train
    problems = _one_of("optim.schedule", optim.schedule, SCHEDULES)
    try:
        optimizer_class(optim.inner)
    except ValueError as error:
        problems.append(str(error))
    for name in ("lr", "linear_lr"):
        if getattr(optim, name) <= 0:
            problems.append(f"optim.{name}={getattr(optim, name)} must be greater than 0")
    for name in ("weight_decay", "clip", "warmup_steps", "final_lr", "eps"):
        if getattr(optim, name) < 0:
            problems.append(f"optim.{name}={getattr(optim, name)} must not be negative")
    if optim.warmup_steps >= max(train.steps, 1):
        problems.append(
            f"optim.warmup_steps={optim.warmup_steps} leaves nothing of train.steps={train.steps}; lower it"
        )
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        problems.append(f"optim.betas={optim.betas} must be two numbers in [0, 1)")
    if not 0 <= optim.momentum < 1:
        problems.append(f"optim.momentum={optim.momentum} must be in [0, 1)")
    if isinstance(optim, GrassConfig):
        problems += _positive("optim", optim, "refresh_every", "sketch_width", "probe_steps") + _one_of(
            "optim.selection", optim.selection, SELECTIONS
        )
        problems += _one_of("optim.score", optim.score, SCORES)
        problems += _one_of("optim.state_at_refresh", optim.state_at_refresh, POLICIES)
        problems += _one_of("optim.new_second_moment", optim.new_second_moment, NEW_SECOND_MOMENTS)
        if optim.stagger and optim.refresh_warmup:
            problems.append("optim.refresh_warmup needs a common refresh; set it to 0 or optim.stagger=false")
        if optim.state_dtype is not None:
            problems += _one_of("optim.state_dtype", optim.state_dtype, DTYPES)
        if optim.master_weights and optim.state_dtype == "bfloat16":
            problems.append("optim.master_weights=true keeps rows in float32; set optim.state_dtype=float32 or null")
        if optim.alpha <= 0:
            problems.append(f"optim.alpha={optim.alpha} must be greater than 0")
    return problems


def _model_problems(config: Config) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = []
    try:
        with torch.device("meta"):
            model = Llama(**model_arguments(config))
        if isinstance(config.optim, GrassConfig):
            convert_linears(model, config.optim.rank, config.optim.patterns, config.optim.side)
    except ValueError as error:
        problems.append(str(error))
    try:
        resolve_backend(config.model.attention, device, DTYPES.get(config.train.dtype, torch.float32))
    except ValueError as error:
        problems.append(str(error))
    return problems
