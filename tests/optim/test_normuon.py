"""NorMuon's step against its formula in float64, an example by hand, and pytorch_optimizer's."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from models import stacking
from models.grass_linear import GrassLinear
from optim import normuon
from optim.grass import Grass
from optim.muon import orthogonalize
from optim.normuon import NorMuon
from tests.helpers import PAPER
from tests.optim import test_inner
from tests.optim.test_inner import backward, grass_of, model_of
from tests.processes import in_processes

SHAPES = [(6, 16), (6, 16), (16, 6), (8, 8), (7, 5)]
LR, DECAY, MOMENTUM = 0.1, 0.1, 0.9


def matrices(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def stepped(place=lambda tensor: tensor, dtype=torch.float64, cls=NorMuon, **options):
    """The matrices after four steps, and the optimizer; ``place`` may shard them."""
    parameters = [torch.nn.Parameter(place(m)) for m in matrices(0, dtype)]
    optimizer = cls(parameters, **{"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM} | options)
    for step in range(1, 5):
        for p, gradient in zip(parameters, matrices(step, dtype), strict=True):
            p.grad = place(gradient)
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def by_formula(weight, gradients):
    """Each of the paper's lines on its own, with the orthogonalisation of optim.muon."""
    m, n = weight.shape
    momentum, v = torch.zeros_like(weight), torch.zeros(m, dtype=weight.dtype)
    for gradient in gradients:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        direction = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        step = orthogonalize(direction.unsqueeze(0))[0]
        for row in range(m):
            v[row] = 0.95 * v[row] + 0.05 * sum(x * x for x in step[row]) / n
        step = step / (v.sqrt() + 1e-8).unsqueeze(1)
        size = 0.2 * LR * (m * n) ** 0.5 / torch.linalg.matrix_norm(step)
        weight = (1 - LR * DECAY) * weight - size * step
    return weight, v


def test_it_is_the_formula():
    found, optimizer = stepped()
    for number, weight in enumerate(found):
        expected, v = by_formula(matrices(0)[number], [matrices(step)[number] for step in range(1, 5)])
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
        state = optimizer.state[optimizer.param_groups[0]["params"][number]]
        torch.testing.assert_close(state["row_mean_square"], v.unsqueeze(1), rtol=1e-12, atol=0)


def test_two_steps_by_hand(monkeypatch):
    """Rows of mean square 1 and 16 get steps of equal size first; then the row that shrank makes a smaller one."""
    monkeypatch.setattr("optim.muon.orthogonalize", lambda batch, **_: batch)
    p = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = NorMuon([p], lr=1.0, momentum=0.0, weight_decay=0.0)
    p.grad = torch.tensor([[1.0, -1.0], [4.0, 4.0]], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["row_mean_square"].flatten().tolist(), [0.05, 0.8])
    torch.testing.assert_close(p.detach(), 0.2 * torch.tensor([[-1.0, 1.0], [-1.0, -1.0]]).double())
    p.data.zero_()
    p.grad = torch.tensor([[1.0, -1.0], [2.0, 2.0]], dtype=torch.float64)
    optimizer.step()
    # v: 0.0475 + 0.05, 0.76 + 0.05 · 4; the squared ratios to it, of 2 elements each: 1 / 0.0975 and 4 / 0.96.
    first, second = 1 / 0.0975, 4 / 0.96
    torch.testing.assert_close(optimizer.state[p]["row_mean_square"].flatten().tolist(), [0.0975, 0.96])
    size = 0.2 * (2 / (first + second)) ** 0.5
    expected = size * torch.tensor([[-(first**0.5), first**0.5], [-(second**0.5), -(second**0.5)]]).double()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(p.square().mean().sqrt().item(), 0.2)


def test_it_is_pytorch_optimizer_s(monkeypatch):
    """Which orthogonalises in bfloat16 by torch's schedule of products; here in float64 by ours."""
    theirs = pytest.importorskip("pytorch_optimizer.optimizer.muon.normuon")
    monkeypatch.setattr(
        *(theirs, "zero_power_via_newton_schulz_5"),
        lambda update, **_: orthogonalize(update if update.ndim == 3 else update.unsqueeze(0)).view_as(update),
    )

    def reference(parameters, **options):
        groups = [{"params": parameters, "use_muon": True}]
        return theirs.NorMuon(groups, update_scale="match_rms", eps=normuon.EPSILON, foreach=False, **options)

    expected, optimizer = stepped(cls=reference)
    found, ours = stepped()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for p, q in zip(ours.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        theirs = optimizer.state[q]["second_momentum_buffer"]
        torch.testing.assert_close(ours.state[p]["row_mean_square"], theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_mean_square_is_float32_and_a_step_has_the_size_of_muon_s(dtype):
    parameters, optimizer = stepped(dtype=dtype)
    for p in parameters:
        assert p.dtype == dtype
    for p in optimizer.param_groups[0]["params"]:
        state = optimizer.state[p]
        assert {k: (t.shape, t.dtype) for k, t in state.items()} == {
            "momentum_buffer": (p.shape, dtype),
            "row_mean_square": ((len(p), 1), torch.float32),
        }
        if dtype == torch.float32:
            before = p.detach().clone()
            p.grad, optimizer.param_groups[0]["weight_decay"] = torch.randn_like(p), 0.0
            optimizer.step()
            assert (p - before).square().mean().sqrt().item() == pytest.approx(0.2 * LR, rel=1e-5)
            p.grad = None


def test_rows_without_a_gradient_stay_and_so_does_a_matrix_without_any():
    p = torch.nn.Parameter(torch.randn(4, 6))
    optimizer, before = NorMuon([p], lr=LR, weight_decay=0.0), p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    p.grad[:2] = torch.randn(2, 6)
    optimizer.step()
    assert torch.equal(p[2:], before[2:]) and not torch.equal(p[:2], before[:2])
    assert p.isfinite().all()


def test_matrices_are_stepped_on_alike_in_batches_of_any_size(monkeypatch):
    at_once, _ = stepped()
    monkeypatch.setattr(stacking, "ON_CPU", 1)
    torch.testing.assert_close(stepped()[0], at_once)


@pytest.mark.parametrize("new_second_moment", ["score", "zero"])
def test_with_every_row_selected_and_refreshed_it_is_dense_normuon(new_second_moment):
    """One layer selects its rows, the other its columns; the state is carried three times."""
    model, layers, optimizer = grass_of(
        "normuon", 6, refresh_every=3, state_at_refresh="carry", new_second_moment=new_second_moment
    )
    assert {layer.dim for layer in layers.values()} == {0, 1}
    dense = model_of()
    reference = NorMuon(dense.parameters(), lr=test_inner.LR, weight_decay=test_inner.DECAY, momentum=0.8)
    for step in range(10):
        for trained, one in ((model, optimizer), (dense, reference)):
            backward(trained, step)
            one.step()
            one.zero_grad()
    for layer, weight in zip(layers.values(), dense.parameters(), strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight.detach(), rtol=1e-9, atol=1e-9)
        ours, theirs = optimizer.state[layer.rows], reference.state[weight]
        torch.testing.assert_close(ours["row_mean_square"], theirs["row_mean_square"], rtol=1e-9, atol=0)


def test_a_new_row_s_step_is_as_long_as_the_others():
    """After a refresh, of gradients of equal size for every row, the new row's step grows with its momentum only."""
    layer = GrassLinear(torch.nn.Parameter(torch.randn(6, 40)), rank=3)
    optimizer = NorMuon([layer.rows], lr=LR, momentum=0.0, weight_decay=0.0)
    grass = Grass(
        torch.nn.ModuleDict({"layer": layer}),
        optimizer,
        **PAPER | {"refresh_every": 4, "state_at_refresh": "carry", "new_second_moment": "zero"},
    )
    grass.choose = lambda names, norms: [(torch.tensor([0, 1, 2 + grass.steps // 4]), None)]
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        before = layer.rows.detach().clone()
        index = layer.index.tolist()
        layer.rows.grad = torch.randn(3, 40, generator=generator)
        grass.probes.gathered = {"layer": torch.ones(6)}
        optimizer.step()
        if layer.index.tolist() == index:
            lengths = (layer.rows.detach() - before).norm(dim=1)
            assert lengths.max() < 2 * lengths.min(), step  # of a start at zero: 4.5 times
    assert layer.index.tolist() == [0, 1, 4]


def _sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    expected, alone = stepped()
    for dim in (0, 1):
        found, optimizer = stepped(lambda t, dim=dim: distribute_tensor(t, mesh, [Shard(dim)]))
        torch.testing.assert_close([p.full_tensor() for p in found], expected, rtol=1e-12, atol=1e-12)
        pairs = zip(optimizer.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True)
        for ours, theirs in ((optimizer.state[p], alone.state[q]) for p, q in pairs):
            v = ours["row_mean_square"]
            v = v if dim else v.full_tensor()
            torch.testing.assert_close(v, theirs["row_mean_square"], rtol=1e-12, atol=0)


def _sharded_in_both_dimensions(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    expected, _ = stepped()
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(1)], [Replicate(), Shard(0)]):
        found, _ = stepped(lambda t, placements=placements: distribute_tensor(t, mesh, placements))
        torch.testing.assert_close([p.full_tensor() for p in found], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("processes", "function"), [(2, _sharded), (4, _sharded_in_both_dimensions)])
def test_steps_on_shards_equal_the_step_on_the_full_matrix(processes, function, tmp_path):
    in_processes(processes, tmp_path, function)
