"""The steps of the walk: all rows are dense Muon, and a share of them changes those rows alone."""

import pytest
import torch
from torch import nn

from benchmarks.walk import BlockMuon, HalfMuon, QuarterMuon, SparseMuon, TurnMuon
from optim.muon import Muon, orthogonalize

SHAPES = [(8, 8), (8, 8), (8, 20), (20, 8)]


def parameters_of():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def gradients_at(step, parameters):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)


def test_all_rows_are_dense_muon():
    sparse, dense = parameters_of(), parameters_of()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    for parameters, optimizer in ((sparse, SparseMuon(sparse, **options)), (dense, Muon(dense, **options))):
        for step in range(4):
            gradients_at(step, parameters)
            optimizer.step()
    for ours, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("cls", "share"), [(QuarterMuon, 1 / 4), (HalfMuon, 1 / 2)])
def test_a_share_of_the_rows_is_stepped_on_with_the_momentum_of_the_whole_gradient(cls, share):
    parameters, momenta, seen = parameters_of(), [0.0] * len(SHAPES), [set() for _ in SHAPES]
    optimizer = cls(parameters, lr=0.1, momentum=0.9, weight_decay=0.0)
    for step in range(30):
        gradients_at(step, parameters)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        for i, (p, old) in enumerate(zip(parameters, before, strict=True)):
            dim = int(p.shape[0] > p.shape[1])
            momenta[i] = 0.9 * momenta[i] + 0.1 * p.grad
            direction = 0.1 * p.grad + 0.9 * momenta[i]
            rows = (p.detach() != old).any(1 - dim).nonzero().flatten()
            assert len(rows) == 8 * share
            seen[i] |= set(rows.tolist())
            part = direction.index_select(dim, rows)
            expected = -0.1 * 0.2 * max(part.shape) ** 0.5 * orthogonalize(part.unsqueeze(0))[0]
            torch.testing.assert_close((p.detach() - old).index_select(dim, rows), expected, rtol=0, atol=1e-10)
    assert all(rows == set(range(8)) for rows in seen)


@pytest.mark.parametrize("cls", [TurnMuon, BlockMuon])
def test_in_turn_every_matrix_is_stepped_on_for_one_window_of_a_round_as_by_a_fresh_muon(cls):
    parameters = parameters_of()
    optimizer = cls(parameters, lr=0.1, momentum=0.9, weight_decay=0.0)
    optimizer.window = 3
    turns = [[] for _ in parameters]
    for step in range(4 * 3 * 2):
        gradients_at(step, parameters)
        if step % 3 == 0:
            fresh = [nn.Parameter(p.detach().clone()) for p in parameters]
            muon = Muon(fresh, lr=0.1, momentum=0.9, weight_decay=0.0)
        for p, q in zip(fresh, parameters, strict=True):
            p.grad = q.grad
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        muon.step()
        for i, (p, old, expected) in enumerate(zip(parameters, before, fresh, strict=True)):
            if not torch.equal(p, old):
                turns[i].append(step // 3)
                torch.testing.assert_close(p.detach(), expected.detach(), rtol=0, atol=1e-12)
    for windows in turns:
        assert len(windows) == 6 and len(set(windows)) == 2
        assert [window // 4 for window in sorted(set(windows))] == [0, 1]
