"""Steps between dense Muon and Grass, as optimizers: ``optim=muon optim.inner=benchmarks.walk.QuarterOfRows``.

They need the whole gradient, which Grass does without. So they train nothing cheaper: they tell what of the distance
comes from sparse updates as such, and what from the gradient of the rows that are not selected.
"""

from typing import Any

import torch
from torch import Tensor

from models.counter_rng import key
from optim.muon import Muon, MuonAndAdamW, orthogonalize


class SparseMuon(Muon):
    """Momentum as dense Muon's, from the whole gradient; in each step only a random ``share`` of the rows is updated.

    The rows, or columns where these are fewer, are orthogonalised by themselves, as the rows of Grass are (much as in
    Dion2, arXiv 2512.16928). Weight decay acts on all.
    """

    share = 1.0

    def _step_stacked(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        dim = int(parameters[0].shape[0] > parameters[0].shape[1])
        places = {p: place for place, p in enumerate(group["params"])}
        indices, directions = [], []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
            steps = state.setdefault("step", torch.zeros((), device="cpu"))
            draw = torch.Generator().manual_seed(key(0, "walk", int(steps), places[p]))
            chosen = torch.randperm(p.shape[dim], generator=draw)[: round(self.share * p.shape[dim])]
            indices.append(chosen.sort().values.to(p.device))
            steps += 1
            momentum.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(momentum, group["momentum"]).index_select(dim, indices[-1]))
        rate = group["lr"] * 0.2 * max(directions[0].shape) ** 0.5
        for p, index, step in zip(parameters, indices, orthogonalize(torch.stack(directions)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.index_add_(dim, index, step.to(p.dtype), alpha=-rate)


class QuarterMuon(SparseMuon):
    """A quarter of the rows in each step."""

    share = 1 / 4


class HalfMuon(SparseMuon):
    """Half of the rows in each step."""

    share = 1 / 2


class QuarterOfRows(MuonAndAdamW):
    """QuarterMuon for the linears, AdamW for the others."""

    muon = QuarterMuon


class HalfOfRows(MuonAndAdamW):
    """HalfMuon for the linears, AdamW for the others."""

    muon = HalfMuon
