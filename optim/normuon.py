"""NorMuon as an inner optimizer: Muon whose steps have the same size in every output neuron, on average over time."""

import torch
from torch import Tensor

from models.dtensor import local, sum_parts, zeros_divided_like
from optim.muon import Muon, MuonAndAdamW

BETA2 = 0.95  # of the mean squares of rows
EPSILON = 1e-8  # added to the root of a row's average mean square


class NorMuon(Muon):
    """Muon with a second moment for each row of the orthogonalised step (Li et al., arXiv 2510.05491, algorithm 1).

    Rows of an orthogonalised matrix differ in norm, at least if it is longer than wide. With O (m, n) the
    orthogonalised momentum of a weight (m, n), and ‖·‖ the Frobenius norm:

        v ← β₂ v + (1 − β₂) mean(O², over a row)        β₂ = 0.95, v (m, 1) from zero
        P = O / (√v + ε)                                row by row, ε = 1e-8
        W ← (1 − lr · decay) W − 0.2 lr √(m n) P / ‖P‖

    The step has the root mean square 0.2 lr, as Muon's. A start of v at zero needs no correction: 1 − β₂ᵗ is a factor
    common to all rows, which ‖P‖ divides out.

    State of a parameter: ``momentum_buffer``, of its shape and dtype, and ``row_mean_square`` (m, 1), v in float32
    (float64 for a float64 parameter).
    """

    def _scaled(self, orthogonal: Tensor, parameters: list[Tensor]) -> tuple[Tensor, float]:
        like = parameters[0]
        rows, columns = like.shape
        dtype = torch.promote_types(like.dtype, torch.float32)
        for p in parameters:
            if "row_mean_square" not in self.state[p]:
                self.state[p]["row_mean_square"] = zeros_divided_like(p, (rows, 1), dtype)
        squares = torch.linalg.vector_norm(orthogonal, dim=-1, keepdim=True, dtype=dtype).square()
        latest = sum_parts(squares, like, dim=1) / columns
        averages = [local(self.state[p]["row_mean_square"]) for p in parameters]
        torch._foreach_lerp_(averages, list(latest.unbind()), 1 - BETA2)
        factors = 1 / (torch.stack(averages).sqrt() + EPSILON)
        # The mean square of P follows from those of the rows: no second pass over the matrix.
        total = sum_parts((latest * factors.square()).sum(dim=-2, keepdim=True), like, dim=0)
        rms = (total / rows).sqrt().clamp(min=EPSILON)  # zero if the momentum is
        return orthogonal * (factors / rms), 1.0


class NorMuonAndAdamW(MuonAndAdamW):
    """NorMuon for the group named "linears" and AdamW for the others. Arguments as for ``MuonAndAdamW``."""

    muon = NorMuon
