"""Optimizers between dense Muon and Grass: ``optim=muon optim.inner=benchmarks.walk.QuarterOfRows``.

They compute the full gradient, unlike Grass, so they save no memory. They show how much of the difference in loss comes
from sparse updates, and how much from not knowing the gradient of the unselected rows. LinearsInTurn and BlocksInTurn
train complete matrices in turn instead of rows, and keep as much optimizer state as Grass (as BAdam and LISA do, arXiv
2404.02827 and 2403.17919).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import refuse_to_run
from models.counter_rng import key
from optim.muon import Muon, MuonAndAdamW, orthogonalize


class SparseMuon(Muon):
    """Muon that accumulates the momentum of all rows, but updates only a random share of the rows in each step.

    ``share``, above 0 and at most 1, is an attribute of the class, set by its subclasses.
    The selected rows are orthogonalised without the other rows, as in Grass (similar to Dion2, arXiv 2512.16928).
    Columns are selected if a matrix has fewer columns than rows. Weight decay acts on all elements.
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
    """SparseMuon with a quarter of the rows in each step."""

    share = 1 / 4


class HalfMuon(SparseMuon):
    """SparseMuon with half of the rows in each step."""

    share = 1 / 2


class QuarterOfRows(MuonAndAdamW):
    """QuarterMuon for the attention and MLP linears, AdamW for the other parameters."""

    muon = QuarterMuon


class HalfOfRows(MuonAndAdamW):
    """HalfMuon for the attention and MLP linears, AdamW for the other parameters."""

    muon = HalfMuon


class TurnMuon(Muon):
    """Dense Muon that trains one of ``parts`` groups of matrices at a time, for ``window`` steps each.

    Momentum is dropped when a group's turn ends. After all groups have had their turn, the matrices are distributed to
    the groups in a new random order. So each matrix is trained once per ``parts`` windows.
    """

    parts, window = 4, 50

    def _step_stacked(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        places = {p: place for place, p in enumerate(group["params"])}
        active = []
        for p in parameters:
            steps = self.state[p].setdefault("step", torch.zeros((), device="cpu"))
            turn, part = divmod(int(steps) // self.window, self.parts)
            steps += 1
            if self._part_of(places[p], len(places), turn) == part:
                active.append(p)
            else:
                self.state[p].pop("momentum_buffer", None)
        if active:
            super()._step_stacked(active, group)

    def _part_of(self, place: int, count: int, turn: int) -> int:
        """Return the group (from 0) of matrix number ``place`` of ``count`` in the round ``turn``."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(key(0, "turn", turn)))
        return int(order.tolist().index(place)) * self.parts // count


class BlockMuon(TurnMuon):
    """TurnMuon whose groups are neighbouring blocks: the matrices in model order, divided into ``parts`` groups."""

    def _part_of(self, place: int, count: int, turn: int) -> int:
        return (place * self.parts // count - turn) % self.parts


class LinearsInTurn(MuonAndAdamW):
    """TurnMuon for the attention and MLP linears, AdamW for the other parameters."""

    muon = TurnMuon


class BlocksInTurn(MuonAndAdamW):
    """BlockMuon for the attention and MLP linears, AdamW for the other parameters."""

    muon = BlockMuon


if __name__ == "__main__":
    refuse_to_run("walk", "quality")
