"""Which blocks of a model hold the same in a step, and so which few stand for all."""

from typing import NamedTuple

from models import activation_checkpointing as checkpointing
from models.stacking import ON_CPU
from optim.refresh_schedule import most_at_once
from pretrain.config.schema import Config, GrassConfig


class Layout(NamedTuple):
    """Blocks in model order: ``front`` alike, ``middle`` alike, and the last one.

    Where blocks take turns at refreshing, the walked refresh probes those of the front and the last, together as many
    as any step of a window does: no stretch of any such step holds more than the same one here. Where no step probes
    more than one there is no front, and it is the first one's turn and then the last one's. Where all are probed at
    once there is no middle.
    """

    front: int
    middle: int

    @property
    def blocks(self) -> int:
        return self.front + self.middle + 1

    def place(self, block: int) -> str | None:
        """What the stretches of ``block`` are called; None between ends: peaks rise or fall from one to the other."""
        last = self.blocks - 1
        ends = {last - 1: "middle end", self.front: "middle", self.front - 1: "front end", 0: "0", last: "-1"}
        return ends.get(block)

    def turns(self) -> list[set[int]]:
        """The blocks that each of the walked refreshes probes."""
        last = self.blocks - 1
        return [{*range(self.front), last}] if self.front else [{0}, {last}]

    def longer(self, front: int = 0, middle: int = 0) -> "Layout":
        return Layout(self.front + front, self.middle + middle)

    def shortest(self, period: int) -> "Layout":
        """The fewest blocks to which as many times ``period`` can be added, in front and middle, as make this."""
        least = 2 if self.front and self.middle else ON_CPU - 1  # and of each shape as many as are stacked at once

        def shorter(blocks: int) -> int:
            return min(blocks, least + (blocks - least) % period)

        return Layout(shorter(self.front), shorter(self.middle))


def layout_of(config: Config) -> Layout:
    optim, blocks = config.optim, config.model.num_hidden_layers
    if isinstance(optim, GrassConfig) and optim.stagger is not False:
        probed = most_at_once(blocks, optim.refresh_every, optim.probe_steps)
        if probed < blocks:
            return Layout(probed - 1, blocks - probed)
    return Layout(blocks - 1, 0)


def period_of(config: Config) -> int:
    """After how many blocks what they keep of their activations repeats itself."""
    return checkpointing.parse(config.train.checkpointing)[1]
