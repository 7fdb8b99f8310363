"""Print the plan of a run without starting it: ``train.dry_run=true``.

The run's own code makes the first steps on fake tensors (pretrain.planner.simulate), so a laptop can plan a model that
does not fit in its memory. Nothing is written, and no data is needed. If the data is prepared, epochs are counted.
"""

from dataclasses import replace

from data.loading.batches import TrainBatches
from data.prepare import find
from data.wording import counted
from models.flops import parameter_counts
from pretrain.checkpoint.directory import Damaged, read_state
from pretrain.config.schema import Config, micro_batch_size
from pretrain.planner.memory import GIB, Estimate, estimate, needed_bytes, require_fit
from pretrain.runs.folder import RunFolder
from pretrain.setup.model import outline
from pretrain.setup.trained_data import data_settings
from pretrain.training.rates import describe_change, peak_rates


def dry_run(config: Config, world_size: int) -> None:
    """Print the plan of ``config`` for ``world_size`` processes, or for ``estimate.devices`` if there is only one.

    Raises:
        ConfigError: the run cannot start, cannot resume in its folder, or does not fit ``estimate.device_memory_gib``.
    """
    if world_size > 1:
        config = replace(config, estimate=replace(config.estimate, devices=world_size))
    changes = RunFolder(config).check(config)
    found, refresh = estimate(config)
    print(f"{config.run.name}: a dry run, nothing is written")
    for name, text in plan(config, found, sum(refresh.values())).items():
        print(f"{name:<18}  {text}")
    for change in changes:
        print(f"changed since the run began: {change}")
    for line in _rate_changes(config):
        print(line)
    require_fit(config, found, refresh)


def plan(config: Config, found: Estimate, refresh_peak: int) -> dict[str, str]:
    """The lines of the plan: heading → text.

    Args:
        found: the estimate of ``config``.
        refresh_peak: bytes of all tensors at the peak of a step with a refresh.
    """
    train, devices = config.train, config.estimate.devices
    size, counts = micro_batch_size(config.train, config.estimate.devices), parameter_counts(outline(config))
    trainable, tokens = counts["trainable"], train.steps * train.tokens_per_step
    micro_batches = train.tokens_per_step // (size * train.seq_len * devices)
    step, refreshed = (f"{needed_bytes(config, peak) / GIB:.2f} GiB" for peak in (found.peak_bytes, refresh_peak))
    held = ", ".join(f"{name.replace('_', ' ')} {b / GIB:.2f}" for name, b in found.components.items() if b > GIB / 200)
    return {
        "model": f"{config.model.name}, {found.parameters / 1e6:,.1f}M parameters",
        "trained at a time": f"{trainable / 1e6:,.1f}M, {trainable / counts['parameters']:.1%}, by {config.optim.name}",
        "a step": f"{train.tokens_per_step:,} tokens: {counted(devices, 'process', 'es')} × "
        f"{counted(micro_batches, 'micro-batch', 'es')} × {counted(size, 'sequence')} × {train.seq_len} tokens",
        "the run": f"{train.steps:,} steps, {tokens:,} tokens{_epochs(config)}",
        "peak rates": peak_rates(config),
        "arithmetic": f"{found.flops_per_token / 1e9:,.2f} GFLOPs/token, {found.flops_per_token * tokens:.2e} FLOPs",
        "memory of a device": f"{step} in a step, {refreshed} in a step with a refresh",
        "tensor memory": f"{held} GiB",
        "communicated": f"{found.communicated_bytes_per_step / GIB:.3f} GiB per step",
        "would write to": f"{RunFolder(config).path}, {_place(config)}",
    }


def _rate_changes(config: Config) -> list[str]:
    """How the learning rates change if this run resumes here."""
    newest = RunFolder(config).latest_checkpoint
    try:
        state = read_state(newest) if newest else None
    except Damaged:  # the run resumes from an older checkpoint
        return []
    return describe_change(state.get("rates"), config, state["step"]) if state else []


def _epochs(config: Config) -> str:
    """The number of epochs, if the data is prepared."""
    prepared, sequences = find(data_settings(config)), config.train.tokens_per_step // config.train.seq_len
    if prepared is None:
        first = f"from the first {config.data.shuffle_block * config.train.seq_len:,} tokens on"
        during = f"; training begins during the preparation, {first}" if config.data.on_the_fly else ""
        return f"; the data ({config.data.name}) is not prepared yet{during}"
    windows = TrainBatches(prepared.train, config.train.seq_len, sequences, 1, config.train.seed).windows
    return f", {config.train.steps * sequences / windows:.2f} epochs of {prepared.folder}"


def _place(config: Config) -> str:
    """The state of the run folder."""
    folder = RunFolder(config)
    if (newest := folder.latest_checkpoint) is None:
        return "a new run"
    finished = folder.finished_step(config.train.steps)
    return f"resumed from {newest.name}" if finished is None else f"where this run is finished at step {finished}"
