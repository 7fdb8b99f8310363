"""The steps in which each layer gets new rows (a refresh), and in which its gradient is scored for them (a probe)."""

import logging
import re
from collections.abc import Iterable

from models.grass_linear import GrassLinear

logger = logging.getLogger(__name__)

STAGGER = (True, False, "auto")


class RefreshSchedule:
    """When each layer chooses new rows (a refresh), and when its gradient is scored for them (a probe).

    A layer refreshes every K updates; the updates between two refreshes are a window. If the choice of rows needs
    scores, the last ``probe_steps`` updates of the window are probed.

    Args:
        names: the layers, in model order.
        refresh_every: K, updates per window.
        probe_steps: number of updates that contribute to the scores of a refresh; values above K count as K.
        stagger: spread the refreshes of the model's blocks evenly over K updates, instead of refreshing all at once.
        warmup: updates over which the rate of the rows warms up after each refresh; 0 for none.
        frozen: choose rows only once, before the first update.

    Raises:
        ValueError: ``refresh_every`` or ``probe_steps`` is below 1; or ``warmup`` is set together with ``stagger``,
            although a warm-up needs all layers to refresh in the same step.
    """

    def __init__(
        self,
        names: Iterable[str],
        refresh_every: int,
        probe_steps: int = 1,
        stagger: bool = False,
        warmup: int = 0,
        frozen: bool = False,
    ):
        for option, value in (("refresh_every", refresh_every), ("probe_steps", probe_steps)):
            if value < 1:
                raise ValueError(f"optim.{option}={value} must be at least 1")
        if stagger and warmup:
            raise ValueError(
                "optim.refresh_warmup needs all blocks to choose rows in the same step; set optim.refresh_warmup=0 or "
                "optim.stagger=false"
            )
        self.refresh_every, self.probe_steps = refresh_every, min(probe_steps, refresh_every)
        self.warmup, self.frozen = warmup, frozen
        names = list(names)
        # By layer: the number of updates by which its windows end early.
        self.offsets = turn_offsets(names, refresh_every) if stagger else dict.fromkeys(names, 0)
        self.staggered = stagger

    def window(self, name: str, steps: int) -> int:
        """The number, from 0, of the window that layer ``name`` is in after ``steps`` updates."""
        return (steps + self.offsets[name]) // self.refresh_every

    def steps_to_refresh(self, name: str, steps: int) -> int:
        """The number of updates, 1 … K, until the window that ``name`` is in after ``steps`` updates ends."""
        return self.refresh_every - (steps + self.offsets[name]) % self.refresh_every

    def due(self, steps: int) -> list[str]:
        """The layers whose window ends with update ``steps``; unless ``frozen``, they refresh then."""
        return [name for name in self.offsets if self.steps_to_refresh(name, steps) == self.refresh_every]

    def probing(self, steps: int) -> list[str]:
        """The layers whose gradient is probed, if scores are needed, in the update after ``steps`` updates."""
        if self.frozen:
            return []
        return [name for name in self.offsets if self.steps_to_refresh(name, steps) <= self.probe_steps]

    def rate_factor(self, steps: int) -> float:
        """The factor on the rows' learning rate in the update after ``steps`` updates; below 1 in the warm-up."""
        return min(1.0, (steps % self.refresh_every + 1) / self.warmup) if self.warmup else 1.0


def takes_turns(stagger: bool | str, probed: Iterable[GrassLinear], warmup: int = 0) -> bool:
    """Whether the model's blocks refresh in turn instead of all at once.

    Args:
        stagger: the answer, or "auto" for True if a layer of ``probed`` selects columns.
        probed: the layers whose gradients are scored before a refresh.
        warmup: as for ``RefreshSchedule``; if it is not 0, "auto" means False, because all layers must refresh in the
            same step.
    """
    columns = sum(layer.dim == 1 for layer in probed)
    stagger = columns > 0 and not warmup if stagger == "auto" else bool(stagger)
    if columns and not stagger:
        logger.info(
            "the steps before a choice of rows need more memory: %d layers keep their complete inputs at once; with "
            "optim.stagger=true (and optim.refresh_warmup=0) the blocks do so in turn",
            columns,
        )
    return stagger


def block_of(layer: str) -> str:
    """The name of the block that contains ``layer``, e.g. layers.3 for layers.3.mlp.up_proj.

    For a layer outside the blocks, the layer's own name.
    """
    return re.sub(r"(\.\d+)\..*", r"\1", layer)


def turn_offsets(names: list[str], refresh_every: int) -> dict[str, int]:
    """By layer, how many updates before each multiple of ``refresh_every`` it refreshes, if the blocks take turns.

    The layers of a block refresh together, so that a compiled block has two states: with probes and without.

    Args:
        names: the layers, in model order; their blocks take turns in this order.
        refresh_every: updates between two refreshes of a layer.
    """
    blocks = {name: block_of(name) for name in names}
    turns = {block: turn for turn, block in enumerate(dict.fromkeys(blocks.values()))}
    return {name: turns[block] * refresh_every // len(turns) for name, block in blocks.items()}


def most_at_once(blocks: int, refresh_every: int, probe_steps: int) -> int:
    """The largest number of blocks probed in one update, if ``blocks`` blocks refresh in turn.

    ``refresh_every`` and ``probe_steps`` are those of ``RefreshSchedule``.
    """
    schedule = RefreshSchedule([f"layers.{n}.linear" for n in range(blocks)], refresh_every, probe_steps, stagger=True)
    return max(len(schedule.probing(step)) for step in range(refresh_every))
