"""The number of small matrices of one shape that are stacked and processed in one operation.

On a GPU, kernel launches dominate the time of small matrices, so a stack is as large as memory for temporaries allows.
On a CPU, a few matrices are enough. Their number is fixed there, so that the memory planner (pretrain.planner) can
extrapolate from models with few blocks.
"""

import torch

ON_CPU = 4  # matrices
ON_GPU = 2**24  # elements: 64 MiB in float32


def stack_size(count: int, elements: int, device: torch.device) -> int:
    """The largest number of matrices to stack, if there are ``count`` of them with ``elements`` elements each.

    4 on a CPU. On a GPU, a stack has at most 2**24 elements or only one matrix, and stacks are about equal.
    """
    if device.type != "cuda":
        return ON_CPU
    most = max(1, ON_GPU // max(1, elements))
    stacks = -(-count // most)
    return -(-count // max(1, stacks))
