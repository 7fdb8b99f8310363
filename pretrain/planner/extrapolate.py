"""Peak memory of a model with many blocks, extrapolated from simulations of models with few blocks.

Equal blocks (pretrain.planner.block_layout) add equal bytes to every phase of a step; with ``checkpointing=every:N``
each N blocks do. So the bytes of a phase are affine in the number of blocks of each group, and for G groups, G + 1
simulations determine them. A further simulation checks the result. If it differs, the complete model is simulated
instead.
"""

import logging
from collections import Counter

from pretrain.config.schema import Config
from pretrain.planner.block_layout import layout_of, period_of
from pretrain.planner.simulate import BETWEEN, Peaks, simulate

logger = logging.getLogger(__name__)


def simulate_all_blocks(config: Config, verify: bool = True) -> Peaks:
    """The result of ``simulate`` for all blocks of the model, without the phases of blocks inside a group.

    Args:
        verify: check the extrapolation with one more simulation. False is enough for settings that differ only in sizes
            from settings that were verified.
    """
    complete, period = layout_of(config), period_of(config)
    few = complete.shortest(period)
    times = {"front": (complete.front - few.front) // period, "middle": (complete.middle - few.middle) // period}
    growing = [group for group, n in times.items() if n]
    check = few.longer(**{group: 2 * period for group in growing})
    if complete.blocks <= check.blocks:
        return _without_between(simulate(config, complete))
    base = _without_between(simulate(config, few))
    longer = {group: _without_between(simulate(config, few.longer(**{group: period}))) for group in growing}
    if verify and _extrapolate(base, longer, dict.fromkeys(growing, 2)) != _without_between(simulate(config, check)):
        logger.info("the blocks need different amounts of memory: simulating all of them, which is slower")
        return _without_between(simulate(config, complete))
    return _extrapolate(base, longer, times)


def _without_between(peaks: Peaks) -> Peaks:
    return {phase: held for phase, held in peaks.items() if BETWEEN not in phase}


def _extrapolate(base: Peaks, longer: dict[str, Peaks], times: dict[str, int]) -> Peaks:
    """Add the difference of one period of each group to ``base``, ``times`` times; {} if phases differ."""
    if any(more.keys() != base.keys() for more in longer.values()):
        return {}

    def extend(phase: str, held: Counter[str]) -> Counter[str]:
        others = {group: more[phase] for group, more in longer.items()}
        kinds = held.keys() | {kind for other in others.values() for kind in other}
        return Counter(
            {
                kind: held[kind] + sum((other[kind] - held[kind]) * times[group] for group, other in others.items())
                for kind in kinds
            }
        )

    return {phase: extend(phase, held) for phase, held in base.items()}
