"""bfloat16 weights and rows: rounding without bias, updates that are not lost, steps made in float32."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.convert import convert_linears
from models.counter_rng import key
from models.grass_linear import GrassLinear
from models.row_updates import positions
from models.stochastic_rounding import round_stochastically
from optim import mixed_precision
from optim.grass import Grass
from optim.inner import inner_optimizer
from optim.mixed_precision import MasterWeights
from optim.param_groups import parameter_groups
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.setup.checks import check
from tests.helpers import PAPER
from tests.processes import in_processes

BF16 = torch.bfloat16
SIDES = ["rows", "columns"]
INNER = ["adamw", "sgd", "adafactor", "muon", "normuon"]


def neighbours(x):
    """The bfloat16 values on either side of float32 ``x``."""
    bits = x.view(torch.int32) & -0x10000
    toward_zero, away = bits.view(torch.float32), (bits + 0x10000).view(torch.float32)
    return toward_zero, torch.where(toward_zero == x, x, away)


def is_rounded(rounded, x):
    low, high = neighbours(x)
    return bool(((rounded.float() == low) | (rounded.float() == high)).all())


def assert_mean_is(samples, expected):
    """The mean of ``samples`` (draws, …) is ``expected`` within its standard error: altogether and each element."""
    draws = len(samples)
    low, high = neighbours(expected)
    share = ((expected - low) / (high - low).where(high != low, 1)).double()
    error = (high - low).double().abs() * (share * (1 - share) / draws).sqrt()
    z = ((samples.double().mean(0) - expected.double()) / error.clamp_min(1e-30))[error > 0]
    assert z.numel() > 20
    assert z.abs().max() < 5
    assert abs(z.mean()) * z.numel() ** 0.5 < 4
    assert z.square().mean() == pytest.approx(1, abs=6 * (2 / z.numel()) ** 0.5)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_goes_to_a_neighbour_and_the_mean_is_the_number_itself():
    x, position = values(50), torch.arange(50)
    samples = torch.stack([round_stochastically(x, BF16, key(0, i), position) for i in range(2000)])
    assert all(is_rounded(sample, x) for sample in samples[:50])
    assert_mean_is(samples, x)


def test_bfloat16_values_and_values_that_are_not_finite_stay():
    x = torch.tensor([0.0, 1.0, -2.5, 2.0**-126, float("inf"), float("-inf")])
    for i in range(20):
        assert torch.equal(round_stochastically(x, BF16, key(0, i), torch.arange(6)).float(), x)
    assert round_stochastically(torch.tensor([float("nan")]), BF16, 1, torch.arange(1)).isnan().all()


def test_the_rounding_of_an_element_depends_only_on_its_key_and_position():
    x, position = values(8, 6), torch.arange(48).view(8, 6)
    whole = round_stochastically(x, BF16, 7, position)
    for shard in (slice(0, 3), slice(3, 6)):
        assert torch.equal(round_stochastically(x[:, shard], BF16, 7, position[:, shard]), whole[:, shard])
    assert not torch.equal(round_stochastically(x, BF16, 8, position), whole)


def layer_of(side, rows_dtype=BF16, rank=4, shape=(12, 16)):
    layer = GrassLinear(nn.Parameter(values(*shape).to(BF16)), rank, side, rows_dtype)
    layer.select(torch.tensor([1, 3, 5, 7]))
    return layer


@pytest.mark.parametrize("side", SIDES)
def test_positions_count_in_the_full_weight(side):
    layer = layer_of(side)
    assert torch.equal(layer.weight.flatten()[positions(layer, layer.index)], layer.rows)


@pytest.mark.parametrize("side", SIDES)
def test_the_mean_of_many_folds_of_bf16_rows_is_the_fp32_fold(side):
    layer = layer_of(side)
    stepped = layer.rows.detach().float() + 1e-3 * values(*layer.rows.shape, seed=1)
    folds = []
    for i in range(2000):
        layer.fold(stepped=stepped, rounding_key=key(0, i))
        folds.append(layer.rows.detach().clone())
        assert torch.equal(layer.weight.index_select(layer.dim, layer.index), layer.rows)
    assert_mean_is(torch.stack(folds), stepped)


@pytest.mark.parametrize("side", SIDES)
def test_master_rows_are_nearest_inside_a_window_and_rounded_stochastically_when_they_leave(side):
    left = []
    for i in range(2000):
        layer = layer_of(side, torch.float32)
        with torch.no_grad():
            layer.rows.add_(1e-3 * values(*layer.rows.shape, seed=1))
        layer.fold()
        masters = layer.rows.detach().clone()
        old = layer.weight.index_select(layer.dim, layer.index)
        assert torch.equal(old, masters.to(BF16))
        layer.select(torch.tensor([0, 1, 5, 9]), rounding_key=key(0, i))
        left.append(layer.weight.index_select(layer.dim, torch.tensor([3, 7])))
    assert_mean_is(torch.stack(left), masters.index_select(layer.dim, torch.tensor([1, 3])))
    stay = torch.tensor([0, 2])  # rows 1 and 5 in the old index; 1 and 2 in the new one
    assert torch.equal(layer.rows.index_select(layer.dim, torch.tensor([1, 2])), masters.index_select(layer.dim, stay))
    now = layer.weight.index_select(layer.dim, layer.index)
    assert torch.equal(now, layer.rows.to(BF16))


# Whole steps.

INNER = ["adamw", "adam", "sgd", "adafactor", "torch.optim.RMSprop"]
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9}


@pytest.mark.parametrize("name", INNER)
def test_a_step_on_bf16_rows_is_the_float32_step_rounded_to_neighbours_moments_too(name):
    """Weight decay, decoupled or not, and Adafactor's scaling by the parameter's size included."""
    layer = layer_of("rows")
    model = nn.ModuleDict({"layer": layer})
    optimizer = inner_optimizer(name, parameter_groups(model, lr=1e-3, linear_lr=1e-3, weight_decay=0.1), **OPTIONS)
    Grass(model, optimizer, refresh_every=1000, **PAPER)
    for step in range(3):
        full = nn.Parameter(layer.rows.detach().float())
        reference = inner_optimizer(name, [{"params": [full]} | {"lr": 1e-3, "weight_decay": 0.1}], **OPTIONS)
        if step:
            state = optimizer.state[layer.rows]
            reference.state[full] = {k: t.float() if t.shape == full.shape else t.clone() for k, t in state.items()}
        layer.rows.grad = values(*layer.rows.shape, seed=step).to(BF16)
        full.grad = layer.rows.grad.float()
        optimizer.step()
        reference.step()
        assert is_rounded(layer.rows.detach(), full.detach())
        kept = optimizer.state[layer.rows]
        assert kept.keys() == reference.state[full].keys()
        for what, moment in reference.state[full].items():
            if moment.shape == full.shape:
                assert kept[what].dtype == BF16
                assert is_rounded(kept[what], moment)
            else:
                assert torch.equal(kept[what], moment)


def moved(rows_dtype, grass=True, steps=240):
    """Where updates of -2⁻¹² bring weights of 1, below which bf16 has a spacing of 2⁻⁸."""
    weight = nn.Parameter(torch.ones(16, 64, dtype=BF16))
    update = 2.0**-12
    if not grass:
        optimizer = torch.optim.SGD([weight], lr=update)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach().float()
    layer = GrassLinear(weight, 16, "rows", rows_dtype)
    model = nn.ModuleDict({"layer": layer})
    optimizer = torch.optim.SGD([layer.rows], lr=update)
    grass = Grass(model, optimizer, refresh_every=1000, **PAPER)
    for i in range(steps):
        layer.rows.grad = torch.ones_like(layer.rows)
        optimizer.step()
        if i % 4 == 3:  # everything leaves, and comes back
            layer.select(torch.zeros(16, dtype=torch.int64), rounding_key=grass._rounding_key("elsewhere"))
            layer.select(torch.arange(16))
    return layer.weight.detach().float()


@pytest.mark.parametrize("rows_dtype", [BF16, torch.float32])
def test_small_updates_that_plain_rounding_loses_are_kept_on_average(rows_dtype):
    assert torch.equal(moved(None, grass=False), torch.ones(16, 64))
    expected, now = 1 - 240 * 2.0**-12, moved(rows_dtype)
    # 240 roundings of variance at most (2⁻⁸ / 2)² each, over 1024 elements.
    assert abs(now.mean().item() - expected) < 4 * (240 * 2.0**-18 / 1024) ** 0.5
    assert now.mean() < 0.96


def test_master_weights_refuse_bf16_rows():
    model = nn.ModuleDict({"layer": layer_of("rows")})
    optimizer = inner_optimizer("adamw", parameter_groups(model, lr=1e-3, linear_lr=1e-3))
    MasterWeights(optimizer)
    with pytest.raises(ValueError, match=r"optim\.state_dtype=float32"):
        Grass(model, optimizer, refresh_every=10, **PAPER)
    with pytest.raises(ConfigError, match=r"set optim\.state_dtype=float32 or null"):
        check(load(["train.dtype=bfloat16", "optim.master_weights=true", "optim.state_dtype=bfloat16"]))


@pytest.mark.parametrize(("name", "at_once"), [(name, 1) for name in INNER] + [("muon", 2)])
def test_block_by_block_gives_the_same_with_fewer_copies(name, at_once, monkeypatch):
    """Includes weight decay and a repeated row; full-rank parameters are stepped on once."""
    if at_once > 1:  # as on a GPU
        monkeypatch.setattr(mixed_precision, "_blocks_at_once", lambda blocks: at_once)

    def trained(block_by_block):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)) for _ in range(3)]
        model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(16, 16, bias=False)).to(BF16)
        convert_linears(model, 4, ["0.*"])
        groups = parameter_groups(model, lr=1e-2, linear_lr=1e-2, weight_decay=0.1)
        optimizer = inner_optimizer(name, groups, **OPTIONS)
        options = {"refresh_every": 2, "selection": "multinomial_norm_with_replacement", "state_at_refresh": "carry"}
        grass = Grass(model, optimizer, block_by_block=block_by_block, **PAPER | options)
        held = [list(group["params"]) for group in optimizer.param_groups]
        copies = []
        optimizer.register_step_pre_hook(lambda *_: copies.append(len(grass._float32_steps.copies)))

        def backward(seed):
            model(values(8, 16, seed=seed).to(BF16)).float().square().mean().backward()

        grass.start(lambda: backward(0))
        for step in range(5):
            backward(step)
            optimizer.step()
            optimizer.zero_grad()
        assert [group["params"] for group in optimizer.param_groups] == held
        assert grass.steps == 5
        state = {f"state {p.shape} {i}": s for i, p in enumerate(model.parameters()) for s in [optimizer.state.get(p)]}
        return model.state_dict(), state, max(copies)

    expected, expected_state, most = trained(False)
    found, state, fewer = trained(True)
    assert (most, fewer) == (6, 2 * at_once)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


def _train_as(rank):
    found = {}
    for rows_dtype in (BF16, torch.float32):
        model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Linear(12, 16, bias=False)).to(BF16)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(values(*p.shape))
        convert_linears(model, 4, ["*"], state_dtype=rows_dtype)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        grass = Grass(model, optimizer, **PAPER | {"refresh_every": 3, "score": "sketch", "state_at_refresh": "carry"})
        parallel = DistributedDataParallel(model)

        def backward(seed, parallel=parallel):
            parallel(values(8, 16, seed=seed).to(BF16)).float().square().mean().backward()

        grass.start(lambda: backward(rank))
        for step in range(8):
            backward(2 * step + rank)
            optimizer.step()
            optimizer.zero_grad()
        found |= {f"{rows_dtype} {name}": tensor for name, tensor in model.state_dict().items()}
    return found


def test_replicas_stay_identical(tmp_path):
    first, second = in_processes(2, tmp_path, _train_as)
    assert first.keys() == second.keys() and len(first) == 16
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_master_weights_keep_updates_that_bf16_would_lose():
    def trained(masters):
        parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([("weight", parameter)], lr=1.0)
        if masters:
            MasterWeights(optimizer)
        for _ in range(64):
            parameter.grad = torch.full_like(parameter, 2**-12)
            optimizer.step()
        return parameter

    assert torch.equal(trained(masters=False), torch.ones(64, dtype=torch.bfloat16))
    assert torch.equal(trained(masters=True), torch.full((64,), 1 - 64 * 2**-12, dtype=torch.bfloat16))
