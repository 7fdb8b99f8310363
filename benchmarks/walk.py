"""Steps between dense Muon and Grass, as optimizers: ``optim=muon optim.inner=benchmarks.walk.QuarterOfRows``.

They need the whole gradient, which Grass does without, so they save nothing. They show how much of the distance comes
from sparse updates as such, and how much from not knowing the gradient of the other rows. LinearsInTurn and
BlocksInTurn train whole matrices instead of rows, with the memory of Grass (as BAdam and LISA do, arXiv 2404.02827 and
2403.17919).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks import refuse_to_run
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


class TurnMuon(Muon):
    """Dense Muon on a quarter of the matrices at a time, which changes every ``window`` steps and forgets its momentum.

    The matrices are dealt in a new random order every four windows, so that each has a turn before any has another.
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
        """The part, from 0 on, of the matrix ``place`` of ``count`` in the round ``turn``."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(key(0, "turn", turn)))
        return int(order.tolist().index(place)) * self.parts // count


class BlockMuon(TurnMuon):
    """The same with whole blocks: the matrices in model order, in four parts of neighbours."""

    def _part_of(self, place: int, count: int, turn: int) -> int:
        return (place * self.parts // count - turn) % self.parts


class LinearsInTurn(MuonAndAdamW):
    """TurnMuon for the linears, AdamW for the others."""

    muon = TurnMuon


class BlocksInTurn(MuonAndAdamW):
    """BlockMuon for the linears, AdamW for the others."""

    muon = BlockMuon


if __name__ == "__main__":
    refuse_to_run("walk", "quality")
