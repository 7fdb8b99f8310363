"""Floating-point operations of a training step (only matmuls, 2 per multiply-add), the GPU's peak, parameter counts."""

import re

import torch
from torch import nn

from models.grass_linear import GrassLinear
from models.llama import Llama, SelfAttention

# Peaks of matmuls in (bfloat16, TF32), TFLOP/s, without sparsity, from NVIDIA's data sheets, by a part of torch's name
# for the GPU; the first match counts.
PEAKS = {
    "H200 NVL": (835, 417), "H200": (989, 494), "H100 PCIe": (756, 378), "H100 NVL": (835, 417), "H100": (989, 494),
    "A100": (312, 156), "L40S": (362, 183), "L4": (121, 60),
}  # fmt: skip


def peak_flops(device: torch.device, dtype: str, matmul_precision: str) -> float | None:
    """The peak of ``device`` in FLOP/s for matmuls in ``dtype``; None if unknown, as for every CPU.

    Args:
        dtype: "bfloat16", or "float32" for the peak of TF32; None is returned for others.
        matmul_precision: as in torch.set_float32_matmul_precision. "highest" excludes TF32, so for "float32" None is
            returned.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype, matmul_precision)


def peak_of(name: str, dtype: str, matmul_precision: str) -> float | None:
    """As ``peak_flops``, for a GPU with the ``name`` that torch reports, such as "NVIDIA H100 80GB HBM3"."""
    found = next((peaks for words, peaks in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
    if found is None or (dtype, matmul_precision) == ("float32", "highest") or dtype not in ("bfloat16", "float32"):
        return None
    return found[dtype == "float32"] * 1e12


def flops_per_token(model: Llama, seq_len: int) -> int:
    """FLOPs per token of a forward and backward over sequences of ``seq_len`` tokens.

    A linear layer costs 2·in·out each for the forward, the input gradient and the weight gradient. A GrassLinear
    computes the weight gradient of its selected rows only, and a frozen linear layer computes none. Both matmuls of
    attention are counted for all pairs of tokens, masked or not, as in appendix B of PaLM (arXiv 2204.02311) and in
    torch's FlopCounterMode for unfused attention. Not counted are the recomputation of activation checkpointing and the
    scores that Grass computes to choose rows.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, GrassLinear):
            dense = 2 * module.in_features * module.out_features
            total += 2 * dense + dense * module.rank // module.selectable
        elif isinstance(module, nn.Linear):
            total += (6 if module.weight.requires_grad else 4) * module.in_features * module.out_features
        elif isinstance(module, SelfAttention):
            total += 12 * module.o_proj.in_features * seq_len
    return total


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """The numbers of elements of ``model``: "parameters" of all weights, and "trainable" of all that is trained.

    The ``rows`` of a GrassLinear are copies of weights: they count only as trainable.
    """
    rows = sum(m.rows.numel() for m in model.modules() if isinstance(m, GrassLinear))
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - rows,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
