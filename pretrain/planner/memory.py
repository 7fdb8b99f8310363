"""Estimate the memory that a run needs on each device, and find the largest micro-batch that fits."""

import math
from collections import Counter
from dataclasses import dataclass, replace

from pretrain.config.schema import Config, ConfigError, micro_batch_size
from pretrain.planner.extrapolate import simulate_all_blocks
from pretrain.planner.simulate import COMPONENTS, MODEL, Peaks
from pretrain.setup.checks import check
from pretrain.setup.trained_data import state_to_resume

GIB, MIB = 2**30, 2**20
NO_LIMIT = 2**16  # sequences: more than fit on any device
FIXES = {
    "weights": "train.dtype=bfloat16, optim.int8_weights=true with optim=grass, train.parallel=fsdp on several "
    "devices, or a smaller model",
    "rows": "a lower optim.rank",
    "gradients": "optim=grass, train.step_in_backward=true with optim.clip=0, or a lower optim.rank",
    "optimizer_state": "optim=grass, optim.embedding_inner=adafactor (or adamw8bit), or a lower optim.rank",
    "activations": "train.lean_activations=true, optim.side=columns with optim.share_index=true, "
    "train.checkpointing=full, or a smaller train.micro_batch_size or train.seq_len",
    "temporaries": "train.loss_chunk_tokens=512, train.step_in_backward=true with optim.clip=0, or a smaller "
    "train.micro_batch_size, train.seq_len or optim.rank",
    "sketch": "a smaller optim.sketch_width, or optim.stagger=true",
    "gathered_weights": "train.reshard=true",
}


@dataclass(frozen=True)
class Estimate:
    """The estimate for one device. Memory and traffic are in bytes.

    Attributes:
        peak_bytes: peak of a regular step, which neither scores rows nor ends with a refresh (Grass' choice of rows)
        refresh_peak_bytes: peak of the steps that score rows for a refresh or end with one
        components: ``peak_bytes`` by component
        parameters: parameters of the model
        flops_per_token: floating-point operations of forward and backward, per token
        communicated_bytes_per_step: bytes in collectives in a regular step, see fake_ranks.TrafficCounter
        communicated_bytes_per_refresh: the same in a step with a refresh, including the scores of rows
        max_micro_batch_size: largest size that fits ``estimate.device_memory_gib``; 0: none fits; None: no limit set
    """

    peak_bytes: int
    refresh_peak_bytes: int
    components: dict[str, int]
    parameters: int
    flops_per_token: int
    communicated_bytes_per_step: int
    communicated_bytes_per_refresh: int
    max_micro_batch_size: int | None


def estimate(config: Config) -> tuple[Estimate, dict[str, int]]:
    """Simulate a run. Returns its estimate, and the bytes by component at ``refresh_peak_bytes``.

    Raises:
        ConfigError: the configuration cannot run.
    """
    check(config, config.estimate.devices, needs_data=False, resumes=state_to_resume(config) is not None)
    peaks = simulate_all_blocks(config)
    regular, refresh = highest(peaks, "regular"), highest(peaks, "refresh")
    found = Estimate(
        peak_bytes=regular.total(),
        refresh_peak_bytes=refresh.total(),
        components=_in_order(regular),
        parameters=peaks[MODEL]["parameters"],
        flops_per_token=peaks[MODEL]["flops_per_token"],
        communicated_bytes_per_step=peaks[MODEL]["communicated"],
        communicated_bytes_per_refresh=peaks[MODEL]["refresh_communicated"],
        max_micro_batch_size=largest_micro_batch(config, peaks) if config.estimate.device_memory_gib else None,
    )
    return found, _in_order(refresh)


def highest(peaks: Peaks, step: str) -> Counter[str]:
    """The bytes by component at the highest peak among the phases whose names begin with ``step``."""
    return max((held for phase, held in peaks.items() if phase.startswith(step)), key=Counter.total)


def _in_order(components: Counter[str]) -> dict[str, int]:
    return {name: components[name] for name in COMPONENTS}


def device_bytes(config: Config) -> float:
    """The memory of the device in bytes; infinite if ``estimate.device_memory_gib`` is null."""
    return (config.estimate.device_memory_gib or math.inf) * GIB


def needed_bytes(config: Config, peak: int) -> int:
    """The device memory for tensors of ``peak`` bytes, including the allocator's overhead and the context."""
    return int(peak * (1 + config.estimate.allocator_overhead) + config.estimate.context_gib * GIB)


def largest_micro_batch(config: Config, peaks: Peaks) -> int:
    """The largest micro-batch size that fits the device, or 0.

    If ``config`` uses gradient accumulation, so do the simulated runs. Memory is roughly linear in the micro-batch
    size. Extrapolates from two simulations: ``peaks`` for ``config``, and a second simulation with one more sequence
    per micro-batch. Then searches until size n fits and n + 1 does not.
    """
    size, fits, too_many = micro_batch_size(config.train, config.estimate.devices), 0, NO_LIMIT
    while True:
        one_more = simulate_all_blocks(_with_micro_batch(config, size + 1), verify=False)
        room = min(_room(config, held.total(), one_more[name].total()) for name, held in peaks.items() if name != MODEL)
        if room < 0:
            too_many = min(too_many, size)
        else:
            fits = max(fits, size)
            too_many = min(too_many, size + 1) if room == 0 else too_many
        if fits + 1 >= too_many:
            return fits
        size = min(max(size + room, fits + 1), too_many - 1)
        peaks = simulate_all_blocks(_with_micro_batch(config, size), verify=False)


def _room(config: Config, held: int, with_one_more: int) -> int:
    """The number of sequences to add until a phase fills the device; negative to remove. Arguments are in bytes."""
    left = device_bytes(config) - needed_bytes(config, held)
    each = needed_bytes(config, with_one_more) - needed_bytes(config, held)
    if each > 0:
        return math.floor(left / each)
    return NO_LIMIT if left >= 0 else -NO_LIMIT


def _with_micro_batch(config: Config, size: int) -> Config:
    train, devices = config.train, config.estimate.devices
    accumulates = train.tokens_per_step > micro_batch_size(train, devices) * train.seq_len * devices
    tokens = size * train.seq_len * devices * (2 if accumulates else 1)
    return replace(config, train=replace(train, micro_batch_size=size, tokens_per_step=tokens))


def require_fit(config: Config, found: Estimate, refresh: dict[str, int]) -> None:
    """Check that the run fits the device.

    Args:
        found: the estimate of ``config``.
        refresh: bytes by component at ``found.refresh_peak_bytes``.

    Raises:
        ConfigError: the run does not fit; names the largest component, and the setting to change.
    """
    peak = max(found.peak_bytes, found.refresh_peak_bytes)
    if _fits(config, peak):
        return
    components, blamed = _blame(config, found, refresh)
    fix = f"try {FIXES[blamed]}"
    if found.max_micro_batch_size and (size := _smaller_micro_batch(config, found.max_micro_batch_size)):
        fix = f"set train.micro_batch_size={size}"
    raise ConfigError(
        f"the run does not fit in estimate.device_memory_gib={config.estimate.device_memory_gib:g}: it needs "
        f"{needed_bytes(config, peak) / GIB:.2f} GiB, {components[blamed] / GIB:.2f} of them for the "
        f"{blamed.replace('_', ' ')}; {fix}"
    )


def _fits(config: Config, peak: int) -> bool:
    return needed_bytes(config, peak) <= device_bytes(config)


def _blame(config: Config, found: Estimate, refresh: dict[str, int]) -> tuple[dict[str, int], str]:
    """The components of the peak that exceeds the device, and the component to reduce."""
    if _fits(config, found.peak_bytes):
        grown = max(refresh, key=lambda name: refresh[name] - found.components[name])
        return refresh, "sketch" if refresh["sketch"] else grown
    others = {name: size for name, size in found.components.items() if name != "weights"}
    alone = found.components["weights"] > 0.8 * device_bytes(config)
    return found.components, "weights" if alone else max(others, key=lambda name: others[name])


def _smaller_micro_batch(config: Config, most: int) -> int:
    """The largest micro-batch size up to ``most`` that divides the batch of a step and fits the device; 0 if none."""
    share = config.train.tokens_per_step // (config.train.seq_len * config.estimate.devices)
    for size in range(min(most, micro_batch_size(config.train, config.estimate.devices) - 1), 0, -1):
        smaller = replace(config, train=replace(config.train, micro_batch_size=size))
        if share % size == 0 and _fits(config, _peak(simulate_all_blocks(smaller, verify=False))):
            return size
    return 0


def _peak(peaks: Peaks) -> int:
    return max(highest(peaks, step).total() for step in ("regular", "refresh"))
