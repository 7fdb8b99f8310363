"""The number of small matrices of one shape that are stacked and processed in one operation.

On a GPU, kernel launches dominate the time of small matrices, so a stack is as large as memory for temporaries allows.
On a CPU, a few matrices are enough. Their number is fixed there, so that the planner's simulation of a model with few
blocks also holds for a model with many blocks.
"""

import torch

ON_CPU = 4  # matrices
ON_GPU = 2**24  # elements: 64 MiB in float32


def stack_size(count: int, elements: int, device: torch.device) -> int:
    """Matrices per stack, for ``count`` matrices of ``elements`` elements each; on a GPU, stacks are about equal."""
    if device.type != "cuda":
        return ON_CPU
    most = max(1, ON_GPU // max(1, elements))
    stacks = -(-count // most)
    return -(-count // max(1, stacks))
