"""Estimate the memory of a run and find the largest micro-batch that fits."""

import math
from collections import Counter
from dataclasses import dataclass, replace

from pretrain.config.schema import Config, ConfigError
from pretrain.planner.extrapolate import walk_all
from pretrain.planner.simulate import COMPONENTS, MODEL, Seen, micro_batch_size
from pretrain.setup.checks import check

GIB, MIB = 2**30, 2**20
MANY = 2**16
MENDS = {
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
    """The numbers of one device, in bytes but for the model's own.

    peak_bytes                   the most held in a step without a refresh
    refresh_peak_bytes           the most held in the steps of a refresh
    components                   what holds ``peak_bytes``
    communicated_bytes_per_step  given to collectives in a step without a refresh, see pretrain.one_of_many.Traffic
    communicated_bytes_per_refresh  the same in the last step of a window, the scores of all rows included
    max_micro_batch_size         the largest that fits ``estimate.device_memory_gib``, 0 for none; None without a limit
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
    """The estimate of a run, and the components of its refresh's peak.

    Raises:
        ConfigError: the configuration cannot run.
    """
    check(config, config.estimate.devices, needs_data=False)
    seen = walk_all(config)
    regular, refresh = highest(seen, "regular"), highest(seen, "refresh")
    found = Estimate(
        peak_bytes=regular.total(),
        refresh_peak_bytes=refresh.total(),
        components=_in_order(regular),
        parameters=seen[MODEL]["parameters"],
        flops_per_token=seen[MODEL]["flops_per_token"],
        communicated_bytes_per_step=seen[MODEL]["communicated"],
        communicated_bytes_per_refresh=seen[MODEL]["refresh_communicated"],
        max_micro_batch_size=largest_micro_batch(config, seen) if config.estimate.device_memory_gib else None,
    )
    return found, _in_order(refresh)


def highest(seen: Seen, step: str) -> Counter[str]:
    """Bytes by component at the peak of the stretches whose names begin with ``step``."""
    return max((held for stretch, held in seen.items() if stretch.startswith(step)), key=Counter.total)


def _in_order(components: Counter[str]) -> dict[str, int]:
    return {name: components[name] for name in COMPONENTS}


def limit(config: Config) -> float:
    """Bytes of the device; without ``estimate.device_memory_gib`` there is no limit."""
    return (config.estimate.device_memory_gib or math.inf) * GIB


def needed(config: Config, peak: int) -> int:
    """Bytes of the device that a peak of tensors takes, with what the allocator and the device's context add."""
    return int(peak * (1 + config.estimate.allocator_overhead) + config.estimate.context_gib * GIB)


def largest_micro_batch(config: Config, seen: Seen) -> int:
    """The most sequences a device can take at once, in a run that accumulates if ``config`` does; 0 when not even one.

    A stretch of a step holds a fixed number of bytes and some for each sequence, or nearly so: ``seen``, the walk of
    ``config``, and one with a sequence more point to the answer, from where two more walks do the same. It is the
    answer once it has been seen to fit, and one more not to.
    """
    size, fits, too_many = micro_batch_size(config), 0, MANY
    while True:
        one_more = walk_all(_with_micro_batch(config, size + 1), verify=False)
        room = min(_room(config, held.total(), one_more[name].total()) for name, held in seen.items() if name != MODEL)
        if room < 0:
            too_many = min(too_many, size)
        else:
            fits = max(fits, size)
            too_many = min(too_many, size + 1) if room == 0 else too_many
        if fits + 1 >= too_many:
            return fits
        size = min(max(size + room, fits + 1), too_many - 1)
        seen = walk_all(_with_micro_batch(config, size), verify=False)


def _room(config: Config, held: int, with_one_more: int) -> int:
    """How many more sequences fit (fewer when negative) by what one stretch holds, and holds with one more."""
    left = limit(config) - needed(config, held)
    each = needed(config, with_one_more) - needed(config, held)
    return math.floor(left / each) if each > 0 else MANY if left >= 0 else -MANY


def _with_micro_batch(config: Config, size: int) -> Config:
    train, devices = config.train, config.estimate.devices
    accumulates = train.tokens_per_step > micro_batch_size(config) * train.seq_len * devices
    tokens = size * train.seq_len * devices * (2 if accumulates else 1)
    return replace(config, train=replace(train, micro_batch_size=size, tokens_per_step=tokens))


def require_fit(config: Config, found: Estimate, refresh: dict[str, int]) -> None:
    """Raise ConfigError when the run does not fit the device: what holds the most, and what to change.

    Args:
        refresh: components of the refresh's peak.
    """
    peak = max(found.peak_bytes, found.refresh_peak_bytes)
    if _fits(config, peak):
        return
    components, blame = _to_blame(config, found, refresh)
    mend = f"try {MENDS[blame]}"
    if found.max_micro_batch_size and (size := _smaller_micro_batch(config, found.max_micro_batch_size)):
        mend = f"set train.micro_batch_size={size}"
    raise ConfigError(
        f"the run does not fit: it takes {needed(config, peak) / GIB:.2f} GiB of estimate.device_memory_gib="
        f"{config.estimate.device_memory_gib:g}; the {blame.replace('_', ' ')} {'are' if blame.endswith('s') else 'is'}"
        f" to blame with {components[blame] / GIB:.2f} GiB: {mend}"
    )


def _fits(config: Config, peak: int) -> bool:
    return needed(config, peak) <= limit(config)


def _to_blame(config: Config, found: Estimate, refresh: dict[str, int]) -> tuple[dict[str, int], str]:
    """Components of a peak that does not fit, and the one to blame for it."""
    if _fits(config, found.peak_bytes):
        grown = max(refresh, key=lambda name: refresh[name] - found.components[name])
        return refresh, "sketch" if refresh["sketch"] else grown
    others = {name: size for name, size in found.components.items() if name != "weights"}
    alone = found.components["weights"] > 0.8 * limit(config)
    return found.components, "weights" if alone else max(others, key=lambda name: others[name])


def _smaller_micro_batch(config: Config, most: int) -> int:
    """The largest micro-batch up to ``most`` with which the same step fits, accumulated; 0 if none does."""
    share = config.train.tokens_per_step // (config.train.seq_len * config.estimate.devices)
    for size in range(min(most, micro_batch_size(config) - 1), 0, -1):
        smaller = replace(config, train=replace(config.train, micro_batch_size=size))
        if share % size == 0 and _fits(config, _peak(walk_all(smaller, verify=False))):
            return size
    return 0


def _peak(seen: Seen) -> int:
    return max(highest(seen, step).total() for step in ("regular", "refresh"))
