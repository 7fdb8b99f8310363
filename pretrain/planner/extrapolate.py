"""The walk through a model with many identical blocks, from walks through models with few of them.

Where blocks are alike (pretrain.layout) one more adds the same to every stretch of a step (with ``every:N``, N more
do). So what is held in a stretch is affine in the numbers of blocks of each kind, and a walk more than there are kinds
tells it for every model. Another one is held against that; where it does not agree the whole model is walked.
"""

import logging
from collections import Counter

from pretrain.config.schema import Config
from pretrain.planner.block_layout import layout_of, period_of
from pretrain.planner.simulate import BETWEEN, Seen, walk

logger = logging.getLogger(__name__)


def walk_all(config: Config, verify: bool = True) -> Seen:
    """``walk`` through all blocks of the model, the stretches between the ends of those alike left out.

    Without ``verify`` the last walk is left out, for settings that differ from verified ones in sizes alone.
    """
    whole, period = layout_of(config), period_of(config)
    few = whole.shortest(period)
    times = {"front": (whole.front - few.front) // period, "middle": (whole.middle - few.middle) // period}
    growing = [kind for kind, n in times.items() if n]
    furthest = few.longer(**{kind: 2 * period for kind in growing})
    if whole.blocks <= furthest.blocks:
        return _ends(walk(config, whole))
    first = _ends(walk(config, few))
    with_more = {kind: _ends(walk(config, few.longer(**{kind: period}))) for kind in growing}
    if verify and _extended(first, with_more, dict.fromkeys(growing, 2)) != _ends(walk(config, furthest)):
        logger.info("the blocks are not all alike in memory: walking through every one")
        return _ends(walk(config, whole))
    return _extended(first, with_more, times)


def _ends(seen: Seen) -> Seen:
    return {stretch: held for stretch, held in seen.items() if BETWEEN not in stretch}


def _extended(first: Seen, with_more: dict[str, Seen], times: dict[str, int]) -> Seen:
    """What is held with so many ``times`` more blocks of each kind than in the ``first``; {} where stretches differ."""
    if any(more.keys() != first.keys() for more in with_more.values()):
        return {}

    def extend(stretch: str, held: Counter[str]) -> Counter[str]:
        others = {kind: more[stretch] for kind, more in with_more.items()}
        parts = held.keys() | {part for other in others.values() for part in other}
        return Counter(
            {
                part: held[part] + sum((other[part] - held[part]) * times[kind] for kind, other in others.items())
                for part in parts
            }
        )

    return {stretch: extend(stretch, held) for stretch, held in first.items()}
