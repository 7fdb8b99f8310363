"""The walk through a model with many identical blocks, from walks through models with few of them.

Between the two edges of a model one more block adds the same to every stretch of a step (with ``every:N``, N more
blocks do). So what is held in a stretch is affine in the number of blocks, and two walks tell it for every number. A
third one is held against that; where it does not agree the whole model is walked.
"""

import logging
from collections import Counter

from models import checkpointing
from pretrain.config import Config
from pretrain.walk import BETWEEN, EDGE, Seen, at_the_front, walk

logger = logging.getLogger(__name__)


def walk_all(config: Config, verify: bool = True) -> Seen:
    """``walk`` through all blocks of the model, the stretches between its edges left out.

    Without ``verify`` the third walk is left out, for settings that differ from verified ones in sizes alone.
    """
    blocks = config.model.num_hidden_layers
    _, period = checkpointing.parse(config.train.checkpointing)
    edges = at_the_front(config) + EDGE
    few = edges + (blocks - edges) % period
    if blocks <= few + 2 * period:
        return _edges(walk(config, blocks))
    first, second = (_edges(walk(config, n)) for n in (few, few + period))
    if verify:
        third = _edges(walk(config, few + 2 * period))
        if first.keys() != second.keys() or _extended(first, second, 2) != third:
            logger.info("the blocks are not all alike in memory: walking through every one")
            return _edges(walk(config, blocks))
    return _extended(first, second, (blocks - few) // period)


def _edges(seen: Seen) -> Seen:
    return {stretch: held for stretch, held in seen.items() if BETWEEN not in stretch}


def _extended(first: Seen, second: Seen, steps: int) -> Seen:
    """What the model ``steps`` times as far from the first as the second holds."""

    def extend(a: Counter[str], b: Counter[str]) -> Counter[str]:
        return Counter({kind: a[kind] + (b[kind] - a[kind]) * steps for kind in a | b})

    return {stretch: extend(held, second[stretch]) for stretch, held in first.items()}
