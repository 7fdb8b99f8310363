"""Muon's step on sharded matrices, and how many it takes at once; tests/test_baselines.py holds it against torch's."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from models import stacking
from optim import muon
from optim.muon import Muon, orthogonalize
from tests.processes import in_processes

SHAPES = [(6, 16), (6, 16), (16, 6), (8, 8)]
LONGER = [((6, 16), 1), ((16, 6), 0)]


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def stepped(place=lambda tensor: tensor):
    """The matrices after three steps; ``place`` may shard them."""
    parameters = [torch.nn.Parameter(place(m)) for m in matrices(0)]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    for step in range(1, 4):
        for p, gradient in zip(parameters, matrices(step), strict=True):
            p.grad = place(gradient)
        optimizer.step()
    return [p.detach() for p in parameters]


def _sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    for dim in (0, 1):
        whole = [p.full_tensor() for p in stepped(lambda t, dim=dim: distribute_tensor(t, mesh, [Shard(dim)]))]
        torch.testing.assert_close(whole, stepped(), rtol=1e-12, atol=1e-12)
    sent = []
    summed = dist.all_reduce
    dist.all_reduce = lambda sums, **given: sent.append(sums.shape) or summed(sums, **given)
    wide, tall = (distribute_tensor(torch.ones(*s, dtype=torch.float64), mesh, [Shard(d)]) for s, d in LONGER)
    with CommDebugMode() as others:
        for m in (wide, tall):
            muon._orthogonal([m.to_local(), m.to_local()], like=m)
    assert sent == 2 * [(2, 1, 1), (2, 6, 6)] and others.get_total_counts() == len(sent)


def test_steps_on_shards_equal_the_step_on_the_full_matrix(tmp_path):
    in_processes(2, tmp_path, _sharded)


@pytest.mark.parametrize("shape", [(5, 12, 40), (3, 40, 12)])
def test_the_iteration_brings_singular_values_near_one_and_keeps_the_singular_vectors(shape):
    batch = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(batch, full_matrices=False)
    within = u.mT @ orthogonalize(batch) @ v.mT
    values = within.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(within, values.diag_embed(), rtol=0, atol=1e-10)


def test_it_takes_as_many_matrices_at_once_as_its_bound_says(monkeypatch):
    batches = []
    monkeypatch.setattr(muon, "orthogonalize", lambda batch: batches.append(batch.shape) or orthogonalize(batch))
    at_once = stepped()
    assert batches[:3] == [(2, 6, 16), (1, 16, 6), (1, 8, 8)]
    batches.clear()
    monkeypatch.setattr(stacking, "ON_CPU", 1)
    torch.testing.assert_close(stepped(), at_once)
    assert batches[:2] == [(1, 6, 16), (1, 6, 16)]


def _uneven_and_mixed(rank):
    mesh = init_device_mesh("cpu", (2,))
    muon.stack_size = lambda count, elements, device: max(1, 100 // elements)  # as on a GPU: by elements
    whole = [torch.randn(11, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    places = [[Shard(0)]] * 4 + [[Shard(1)]]  # parts of 6 and of 5 rows, and one of another kind
    parameters = [torch.nn.Parameter(distribute_tensor(m, mesh, p)) for m, p in zip(whole, places, strict=True)]
    alone = [torch.nn.Parameter(m.clone()) for m in whole]
    for p, m in zip(parameters, alone, strict=True):
        m.grad = m.detach() + 1
        p.grad = distribute_tensor(m.grad, mesh, p.placements)
    Muon(parameters, lr=0.1).step(), Muon(alone, lr=0.1).step()
    found = [p.full_tensor() for p in parameters]
    torch.testing.assert_close(found, [m.detach() for m in alone], rtol=1e-12, atol=1e-12)


def test_parts_of_unlike_size_and_place_are_stepped_on_in_the_same_batches_everywhere(tmp_path):
    in_processes(2, tmp_path, _uneven_and_mixed)
