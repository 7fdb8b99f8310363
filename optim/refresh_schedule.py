"""When each block probes and refreshes."""

import re


def block_of(layer: str) -> str:
    """The name of the block that ``layer`` is in, or its own: layers.3 of layers.3.mlp.up_proj."""
    return re.sub(r"(\.\d+)\..*", r"\1", layer)


def turn_offsets(names: list[str], refresh_every: int) -> dict[str, int]:
    """How many steps early each layer refreshes when the blocks take turns, in model order.

    The layers of a block go together, so that a compiled block knows two states, with its probes and without.
    """
    blocks = {name: block_of(name) for name in names}
    turns = {block: turn for turn, block in enumerate(dict.fromkeys(blocks.values()))}
    return {name: turns[block] * refresh_every // len(turns) for name, block in blocks.items()}


def most_at_once(blocks: int, refresh_every: int, probe_steps: int) -> int:
    """How many of so many blocks that take turns are probed in the step that probes the most."""
    offsets = turn_offsets([f"layers.{block}.linear" for block in range(blocks)], refresh_every).values()
    steps = range(refresh_every)
    return max(sum((step + o) % refresh_every >= refresh_every - probe_steps for o in offsets) for step in steps)
