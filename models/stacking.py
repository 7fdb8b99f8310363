"""How many small matrices of one shape are stacked and worked on in one operation.

A GPU spends its time on launches there, and a stack may be as large as memory for temporaries allows. On a CPU a few
matrices are enough, and their number is fixed, so that the planner's simulation of a model of few blocks holds for a
model of many.
"""

import torch

ON_CPU = 4  # matrices
ON_GPU = 2**23  # elements: 32 MiB in float32


def stack_size(count: int, elements: int, device: torch.device) -> int:
    """The number of matrices in a stack, for ``count`` matrices of ``elements`` each; on a GPU all about equal."""
    if device.type != "cuda":
        return ON_CPU
    most = max(1, ON_GPU // max(1, elements))
    stacks = -(-count // most)
    return -(-count // max(1, stacks))
