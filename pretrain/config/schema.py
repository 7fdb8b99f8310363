"""The schema of a run's configuration: names, types and limits of all settings.

The default values and meanings of all settings are in ``conf/``. A key that is not in the schema is an error.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from data.settings import DataSettings

DTYPE_NAMES = ("float32", "bfloat16", "float64")  # the keys of models.precision.DTYPES, which needs torch
SETTLING = 3  # train.profile starts after these steps: the first steps of a process compile and allocate


class ConfigError(ValueError):
    """A configuration that cannot run. The message lists all problems, one line each."""


# Metadata of a field, joined by |. The functions at the end of this file read it.
MAY_CHANGE: dict[str, Any] = {"may_change": True}  # when a run resumes; on a section, for all its settings
SAME_CONTENT = MAY_CHANGE  # a name or a path may change: the content is compared, by its hash in the checkpoint
PER_RANK: dict[str, Any] = {"per_rank": True}  # may differ between processes, which may run on different machines


def one_of(*choices: str) -> dict[str, Any]:
    """Metadata of a field whose value must be one of ``choices``, or null if its type includes None."""
    return {"choices": choices}


def limit(words: str, holds: Callable[[Any], bool]) -> dict[str, Any]:
    """Metadata of a field whose value must be null or satisfy ``holds``.

    Args:
        words: completes the message "<key>=<value> must be".
        holds: whether a value is allowed.
    """
    return {"limit": (words, holds)}


AT_LEAST_0 = limit("at least 0", lambda value: value >= 0)
AT_LEAST_1 = limit("at least 1", lambda value: value >= 1)
POSITIVE = limit("greater than 0 and finite", lambda value: 0 < value < math.inf)
SHARE = limit("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_1 = limit("in [0, 1)", lambda value: 0 <= value < 1)
ABOVE_1_OR_0 = limit("greater than 1, or 0 for none", lambda value: value == 0 or 1 < value < math.inf)


@dataclass
class RunConfig:
    """The location of a run: the folder ``root/name``."""

    name: str = field(metadata=SAME_CONTENT)
    root: str = field(metadata=MAY_CHANGE)


@dataclass
class ModelConfig:
    """The keyword arguments of models.llama.Llama, with Hugging Face's names, and the model's ``name`` for messages."""

    name: str = field(metadata=SAME_CONTENT)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Any  # null or a mapping, see models.rope
    tie_word_embeddings: bool
    initializer_range: float
    attention: str = field(metadata=MAY_CHANGE)


@dataclass
class OptimConfig:
    """The settings of full-rank training. ``GrassConfig`` and ``BaselineConfig`` add settings."""

    name: str = field(metadata=SAME_CONTENT)
    inner: str
    embedding_inner: str | None
    lr: float = field(metadata=MAY_CHANGE | POSITIVE)
    linear_lr: float = field(metadata=MAY_CHANGE | POSITIVE)
    weight_decay: float = field(metadata=MAY_CHANGE | AT_LEAST_0)
    betas: list[float]
    eps: float = field(metadata=SHARE)
    momentum: float = field(metadata=BELOW_1)
    clip: float = field(metadata=MAY_CHANGE | AT_LEAST_0)
    norm_growth: float = field(metadata=ABOVE_1_OR_0)
    schedule: str = field(metadata=MAY_CHANGE)
    warmup_steps: float = field(metadata=MAY_CHANGE | AT_LEAST_0)
    final_lr: float = field(metadata=MAY_CHANGE | SHARE)
    decay_share: float = field(metadata=MAY_CHANGE | SHARE)
    master_weights: bool


@dataclass
class GrassConfig(OptimConfig):
    """The settings of Grass. ``rank``, ``side`` and ``stagger`` accept several types, see conf/optim/grass.yaml."""

    patterns: list[str]
    rank: Any
    attention_weight: float
    alpha: float = field(metadata=MAY_CHANGE | POSITIVE)
    refresh_every: int = field(metadata=AT_LEAST_1)
    selection: str
    score: str
    sketch_width: int = field(metadata=AT_LEAST_1)
    probe_steps: int = field(metadata=AT_LEAST_1)
    stagger: Any
    side: Any
    share_index: bool
    state_at_refresh: str
    new_second_moment: str
    refresh_warmup: int
    int8_weights: bool
    state_dtype: str | None = field(metadata=MAY_CHANGE | one_of(*DTYPE_NAMES))  # compared with the checkpoint


@dataclass
class BaselineConfig(OptimConfig):
    """The settings of an optimizer that projects the gradients of the linear layers, see optim.baselines."""

    rank: int
    update_gap: int = field(metadata=AT_LEAST_1)
    scale: float = field(metadata=POSITIVE)
    scale_type: str | None


@dataclass(kw_only=True)
class DataConfig(DataSettings):
    """The settings of the preparation (``DataSettings``), and of a run that reads the prepared data."""

    name: str = field(default=DataSettings.name, metadata=SAME_CONTENT)
    root: str = field(default=DataSettings.root, metadata=SAME_CONTENT | PER_RANK)
    paths: list[str] = field(default_factory=list, metadata=SAME_CONTENT | PER_RANK)
    validation_paths: list[str] = field(default_factory=list, metadata=SAME_CONTENT | PER_RANK)
    dataset: str | None = field(default=None, metadata=SAME_CONTENT)
    mixture: list[Any] = field(default_factory=list, metadata=SAME_CONTENT)
    tokenizer: str | None = field(default=None, metadata=SAME_CONTENT | PER_RANK)
    vocab_size: int = field(default=DataSettings.vocab_size, metadata=SAME_CONTENT)
    workers: int | None = field(default=None, metadata=MAY_CHANGE)
    prompts: list[str] = field(default_factory=list, metadata=MAY_CHANGE)
    on_the_fly: bool = False
    shuffle_block: int = field(default=2**14, metadata=AT_LEAST_1)


@dataclass
class TrainConfig:
    """The training loop: steps, precision, memory options and processes."""

    steps: int = field(metadata=MAY_CHANGE | AT_LEAST_1)
    tokens_per_step: int = field(metadata=AT_LEAST_1)
    micro_batch_size: int | None = field(metadata=MAY_CHANGE | AT_LEAST_1)
    seq_len: int = field(metadata=AT_LEAST_1)
    init_from: str | None = field(metadata=SAME_CONTENT)
    dtype: str = field(metadata=one_of(*DTYPE_NAMES))
    step_in_backward: bool
    seed: int
    resume: str = field(metadata=MAY_CHANGE | one_of("auto", "never"))
    checkpoint_every: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    keep_last: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    keep_every: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    async_save: bool = field(metadata=MAY_CHANGE)
    non_finite: str = field(metadata=MAY_CHANGE | one_of("stop", "skip"))
    spike_factor: float = field(metadata=MAY_CHANGE | ABOVE_1_OR_0)
    most_rollbacks: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    eval_every: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    eval_sequences: int = field(metadata=MAY_CHANGE | AT_LEAST_1)
    log_every: int = field(metadata=MAY_CHANGE | AT_LEAST_1)
    log_layers_every: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    compile: bool = field(metadata=MAY_CHANGE)
    deterministic: bool = field(metadata=MAY_CHANGE)
    matmul_precision: str = field(metadata=MAY_CHANGE | one_of("highest", "high", "medium"))
    checkpointing: str = field(metadata=MAY_CHANGE)
    document_masks: bool
    lean_activations: bool = field(metadata=MAY_CHANGE)
    loss_chunk_tokens: int | None = field(metadata=MAY_CHANGE | AT_LEAST_1)
    parallel: str = field(metadata=MAY_CHANGE | one_of("ddp", "fsdp", "hsdp"))
    shards: int | None = field(metadata=MAY_CHANGE)
    reshard: bool = field(metadata=MAY_CHANGE)
    reduce_dtype: str | None = field(metadata=MAY_CHANGE | one_of(*DTYPE_NAMES))
    timeout_minutes: float = field(metadata=MAY_CHANGE | POSITIVE)
    profile: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    sample_tokens: int = field(metadata=MAY_CHANGE | AT_LEAST_0)
    dry_run: bool = field(metadata=MAY_CHANGE)


@dataclass
class WandbConfig:
    """Settings of Weights & Biases."""

    mode: str = field(metadata=one_of("auto", "online", "offline", "disabled"))
    project: str | None
    entity: str | None
    group: str | None
    tags: list[str]
    log_checkpoint: bool


@dataclass
class LoggerConfig:
    """Loggers in addition to ``metrics.jsonl``."""

    wandb: WandbConfig = field(metadata=MAY_CHANGE)
    tensorboard: bool = field(metadata=MAY_CHANGE)


@dataclass
class EstimateConfig:
    """Settings of ``python -m pretrain.estimate`` and of ``train.dry_run``; training ignores them."""

    format: str = field(metadata=one_of("table", "json"))
    devices: int = field(metadata=AT_LEAST_1)
    device_memory_gib: float | None = field(metadata=limit("greater than 0, or null for no limit", lambda gib: gib > 0))
    context_gib: float = field(metadata=AT_LEAST_0)
    allocator_overhead: float = field(metadata=AT_LEAST_0)


@dataclass
class Config:
    """A complete configuration; conf/config.yaml has the default values."""

    run: RunConfig
    model: ModelConfig
    optim: Any  # OptimConfig, GrassConfig or BaselineConfig, as the group says
    data: DataConfig
    train: TrainConfig
    logger: LoggerConfig
    estimate: EstimateConfig = field(metadata=MAY_CHANGE)


def micro_batch_size(train: TrainConfig, processes: int) -> int:
    """The number of sequences per forward in each of ``processes`` processes.

    This is ``train.micro_batch_size`` or, if it is null, the complete share of a process in a step.
    """
    return train.micro_batch_size or train.tokens_per_step // train.seq_len // processes


def model_arguments(config: Config) -> dict[str, Any]:
    """The keyword arguments for ``Llama`` in ``config.model``."""
    return {f.name: getattr(config.model, f.name) for f in fields(ModelConfig) if f.name != "name"}


def types_of_settings(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of every setting and section in the dataclass ``section``, by dotted name, such as "train.steps".

    Below "optim" are the settings of all optimizers.

    Args:
        prefix: the beginning of every name.
    """
    types: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        variants = (OptimConfig, GrassConfig, BaselineConfig) if prefix + name == "optim" else (kind,)
        types[prefix + name] = kind
        for variant in variants:
            if is_dataclass(variant):
                types |= types_of_settings(variant, f"{prefix}{name}.")
    return types


def marked(config: Config, mark: str) -> set[str]:
    """The dotted names of the settings of ``config`` that are marked in the schema.

    Args:
        mark: "may_change" (may differ when a run resumes) or "per_rank" (may differ between processes).
    """
    return {key for key, _, marks in _settings(config) if marks.get(mark)}


def limit_problems(config: Config) -> list[str]:
    """A line for each setting that is beyond its limit or not among its choices."""
    problems = []
    for key, value, marks in _settings(config):
        (words, holds), choices = marks.get("limit", ("", None)), marks.get("choices")
        if value is not None and holds and not holds(value):
            problems.append(f"{key}={value} must be {words}")
        if value is not None and choices and value not in choices:
            problems.append(f"{key}={value} is unknown; choose from {', '.join(choices)}")
    return problems


def _settings(
    section: Any, prefix: str = "", inherited: dict[str, Any] | None = None
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, value and marks of every setting; ``may_change`` of a section applies to all its settings."""
    for entry in fields(section):
        key, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        marks = {**entry.metadata, **(inherited or {})}
        if is_dataclass(value):
            yield from _settings(value, f"{key}.", {"may_change": True} if marks.get("may_change") else None)
        else:
            yield key, value, marks
