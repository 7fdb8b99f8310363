"""Where more than the model's own precision is needed."""

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: where norms, rotations and the loss are computed."""
    return torch.promote_types(dtype, torch.float32)
