"""The schema of a run's configuration, and reading one; what is wrong with an override is said for all of them at once.

The dataclasses hold names and types; the values are in ``conf/``. A key that is not here is an error.
"""

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from data.settings import DataSettings

logger = logging.getLogger(__name__)
DTYPE_NAMES = ("float32", "bfloat16", "float64")  # the keys of models.precision.DTYPES, which needs torch


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
    embedding_inner: str | None  # of embeddings and head, when another: adamw8bit, adafactor …
    lr: float  # peak rate of embeddings, head and norms
    linear_lr: float  # peak rate of the attention and MLP linears
    weight_decay: float  # on matrices, and as the inner optimizer applies it: decoupled or not
    betas: list[float]  # of those that have them, as are eps and momentum
    eps: float
    momentum: float
    clip: float  # global gradient norm; 0 for none
    norm_growth: float  # how much the norm of a linear's gradient may grow from step to step, say 1.01; 0 for any
    schedule: str  # cosine | wsd | constant
    warmup_steps: int
    final_lr: float  # as a share of the peak
    decay_share: float  # wsd: the share of all steps that the final decay takes
    master_weights: bool  # fp32 masters for parameters that train in bf16


@dataclass
class GrassConfig(OptimConfig):
    patterns: list[str]  # globs of the linears to convert
    rank: Any  # rows (or columns) trained in each linear, or one number for each glob: {"*": 64, up_proj: 172}
    alpha: float  # multiplies the rate of the selected rows
    refresh_every: int  # updates between two choices of rows
    selection: str
    score: str  # exact | sketch
    sketch_width: int
    probe_steps: int  # the last steps before a refresh, at most all of them, whose gradients are scored
    stagger: Any  # true | false | auto: refresh the blocks in turn; auto does where a layer selects columns
    side: Any  # auto | rows | columns, or one of these for each glob of names: {down_proj: columns}
    share_index: bool  # q, k, v and gate, up that select columns: the same ones, and one saved slice of the input
    state_at_refresh: str  # reset | carry
    new_second_moment: str  # mean | score | zero: where carried second moments of new rows start
    refresh_warmup: int  # updates over which the rows' rate warms up again after a refresh
    int8_weights: bool  # frozen weights in 8 bits beside the rows that are trained, see models/int8_weight.py
    state_dtype: str | None  # dtype of rows and moments; null: float32, in a float64 run float64


@dataclass
class BaselineConfig(OptimConfig):
    """Full-rank training with an optimizer that projects the gradients of the linears: a name of PROJECTED."""

    rank: int  # of the projected gradients
    update_gap: int  # updates between two projections
    scale: float  # multiplies the projected update (APOLLO: its square root does)
    scale_type: str | None  # of APOLLO: channel | tensor (APOLLO-Mini, with rank 1 and scale 128)


@dataclass(kw_only=True)
class DataConfig(DataSettings):
    prompts: list[str] = field(default_factory=list)
    """What samples.md lets the model continue."""
    on_the_fly: bool = False
    """Train while the corpus is being prepared."""
    shuffle_block: int = 2**14
    """On the fly: so many windows in a row are shuffled among each other, in the first epoch."""


@dataclass
class TrainConfig:
    steps: int
    tokens_per_step: int  # over all processes and micro-batches
    micro_batch_size: int | None  # sequences a process takes at once; its share of a step when null
    seq_len: int
    init_from: str | None  # a run, or a Hugging Face LLaMA's folder or safetensors file, whose weights to start from
    dtype: str  # float32 | bfloat16 | float64: of weights, activations and gradients
    step_in_backward: bool  # step on each parameter as its gradient is whole, and free that; needs optim.clip=0
    seed: int
    resume: str  # auto | never
    checkpoint_every: int
    keep_last: int  # how many of the newest checkpoints stay; 0: all
    keep_every: int  # those of its multiples stay besides; 0: none
    async_save: bool  # save while the run goes on; a step waits for the copy to the host's memory alone
    non_finite: str  # stop | skip: what a loss or gradient that is not finite means
    spike_factor: float  # a loss so many times the median of the latest 32 is a spike; 0: none is
    most_rollbacks: int  # how many spikes the run goes back to its newest checkpoint for
    eval_every: int
    eval_sequences: int  # at the most, from the validation split
    log_every: int
    compile: bool
    deterministic: bool  # on a GPU: only algorithms whose sums have one order, so that a run resumes to the bit
    matmul_precision: str  # of float32 products on a GPU, as torch names them: highest | high (TF32) | medium
    checkpointing: str  # none | full | every:N | selective, see models/checkpointing.py
    document_masks: bool  # packed documents do not see each other
    lean_activations: bool  # norms and SwiGLU products are made again; compiled blocks leave it to the compiler
    loss_chunk_tokens: int | None  # how many tokens the loss takes at a time; null: all
    parallel: str  # ddp | fsdp | hsdp: how several processes train one model
    shards: int | None  # hsdp: among how many processes a copy of the model is divided; null: those of a node
    reshard: bool  # fsdp, hsdp: let go of gathered weights after a forward and gather them again in the backward
    reduce_dtype: str | None  # of gradients on the wire, where they are summed; null: as they are
    timeout_minutes: float  # how long a process waits for the others before it ends with an error that names them
    profile: int  # how many steps to record, after the first three; 0 for none
    sample_tokens: int  # length of each sample at the end; 0 for none
    dry_run: bool  # print the plan of the run and write nothing


@dataclass
class WandbConfig:
    mode: str  # auto | online | offline | disabled
    project: str
    entity: str | None
    group: str | None  # by default the folder of run.name, as for the jobs of a sweep, else the model's name
    log_checkpoint: bool  # upload the last checkpoint as an artifact


@dataclass
class LoggerConfig:
    wandb: WandbConfig


@dataclass
class EstimateConfig:
    """What ``python -m pretrain.estimate`` wants to know beside the run; training takes no notice."""

    format: str  # table | json
    devices: int  # of how many, each with a process, one is looked at
    device_memory_gib: float | None  # what has to hold the run; null: no limit
    context_gib: float  # taken on a device by CUDA, cuBLAS and NCCL beside all tensors
    allocator_overhead: float  # lost by the allocator to rounding and gaps, as a share of the peak


@dataclass
class Config:
    run: RunConfig
    model: ModelConfig
    optim: Any  # OptimConfig, GrassConfig or BaselineConfig, as the group says
    data: DataConfig
    train: TrainConfig
    logger: LoggerConfig
    estimate: EstimateConfig


def model_arguments(config: Config) -> dict[str, Any]:
    """The keyword arguments for Llama."""
    return {f.name: getattr(config.model, f.name) for f in fields(ModelConfig) if f.name != "name"}


SETTLING = 3  # the first steps of a process compile and allocate: they are not recorded
