"""Group the blocks of a model by their memory in a step, so that a few blocks represent all."""

from typing import NamedTuple

from models import activation_checkpointing
from models.grass_linear import GrassLinear
from models.stacking import ON_CPU
from optim.refresh_schedule import most_at_once, takes_turns
from pretrain.cli.console import warnings_only
from pretrain.config.schema import Config, GrassConfig
from pretrain.setup.model import outline
from pretrain.setup.optimizer import uses_scores


class BlockLayout(NamedTuple):
    """The blocks of a model in order: ``front`` equal blocks, ``middle`` equal blocks, and the last block.

    Blocks are equal if they need the same memory in every step. A probed block, whose gradient Grass scores in a step
    because it gets new rows soon, needs more. If all blocks are probed at once, ``middle`` is 0. If they take turns
    (``optim.stagger``), the front blocks and the last block are those probed in one simulated step: as many as a step
    of the run probes at most, so that no step needs more memory than the simulated step. If a step probes at most one
    block, ``front`` is 0, and the first and the last block are probed in two simulated steps.
    """

    front: int
    middle: int

    @property
    def blocks(self) -> int:
        return self.front + self.middle + 1

    def place(self, block: int) -> str | None:
        """The name of block number ``block`` (from 0) in the names of phases, see ``simulate``.

        None for a block inside a group of equal blocks: its peaks are between the peaks at the group's ends.
        """
        last = self.blocks - 1
        ends = {last - 1: "middle end", self.front: "middle", self.front - 1: "front end", 0: "0", last: "-1"}
        return ends.get(block)

    def probed_blocks(self) -> list[set[int]]:
        """For each simulated refresh, the numbers of the blocks that are probed before it."""
        last = self.blocks - 1
        return [{*range(self.front), last}] if self.front else [{0}, {last}]

    def longer(self, front: int = 0, middle: int = 0) -> "BlockLayout":
        return BlockLayout(self.front + front, self.middle + middle)

    def shortest(self, period: int) -> "BlockLayout":
        """The smallest layout that becomes this layout when multiples of ``period`` are added to front and middle."""
        least = 2 if self.front and self.middle else ON_CPU - 1  # enough of each shape to fill a stack

        def shorter(blocks: int) -> int:
            return min(blocks, least + (blocks - least) % period)

        return BlockLayout(shorter(self.front), shorter(self.middle))


def layout_of(config: Config) -> BlockLayout:
    """The layout of all blocks of the model of ``config``."""
    optim, blocks = config.optim, config.model.num_hidden_layers
    if isinstance(optim, GrassConfig) and _takes_turns(config, optim):
        probed = most_at_once(blocks, optim.refresh_every, optim.probe_steps)
        if probed < blocks:
            return BlockLayout(probed - 1, blocks - probed)
    return BlockLayout(blocks - 1, 0)


def _takes_turns(config: Config, optim: GrassConfig) -> bool:
    with warnings_only():
        modules = outline(config).modules() if uses_scores(optim) else ()
        probed = [module for module in modules if isinstance(module, GrassLinear)]
        return takes_turns(optim.stagger, probed, optim.refresh_warmup)


def period_of(config: Config) -> int:
    """The number of blocks after which activation checkpointing repeats its pattern."""
    return activation_checkpointing.parse(config.train.checkpointing)[1]
