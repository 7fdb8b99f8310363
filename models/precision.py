"""The dtypes that settings name, and the precision of norms and losses."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The dtypes by their names in settings."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of norms, rotations and the loss."""
    return torch.promote_types(dtype, torch.float32)
