"""How many small matrices of one shape are worked on at once, as a stack.

A GPU is bound by launches there, and takes as many as memory for temporaries allows. On a CPU a few are enough, and the
same number always, so that what the planner sees in a model of few blocks holds for one of many.
"""

import torch

ON_CPU = 4  # matrices
ON_GPU = 2**23  # elements: 32 MiB in float32


def stack_size(count: int, elements: int, device: torch.device) -> int:
    """How many of ``count`` matrices of so many ``elements`` go into a stack; on a GPU in stacks of about one size."""
    if device.type != "cuda":
        return ON_CPU
    most = max(1, ON_GPU // max(1, elements))
    stacks = -(-count // most)
    return -(-count // max(1, stacks))
