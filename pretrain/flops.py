"""Floating-point operations of a training step, counted from the shapes: 2 per multiply-add, matrix products only."""

from torch import nn

from models.grass_linear import GrassLinear
from models.llama import Llama, SelfAttention


def flops_per_token(model: Llama, seq_len: int) -> int:
    """FLOPs of forward and backward for one token of a sequence of ``seq_len``, recomputation left out.

    A linear costs 2·in·out each for the forward and the input gradient, and 2·in·out for the weight gradient, of which
    a GrassLinear computes the share rank / selectable, and a frozen one nothing. Attention
    counts both of its products over the whole square, like PaLM's appendix B (arXiv 2204.02311) and torch's
    FlopCounterMode for an unfused attention.
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
    """Numbers of elements: ``parameters`` of the model as an architecture, ``trainable`` of what gets gradients."""
    rows = sum(m.rows.numel() for m in model.modules() if isinstance(m, GrassLinear))
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - rows,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
