"""The baselines against their packages used as documented, without a package, and across a checkpoint."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from optim.baselines import PROJECTED, projected_optimizer
from optim.inner import INNER_OPTIMIZERS, inner_optimizer
from optim.muon import MuonAndAdamW
from optim.param_groups import parameter_groups, set_rates
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.directory import path_of
from pretrain.checkpoint.saver import Saver
from pretrain.config.compose import load
from pretrain.config.schema import BaselineConfig, ConfigError, OptimConfig
from pretrain.distributed.world import World
from pretrain.setup.checks import check
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = [
    "model.vocab_size=64", "data.vocab_size=64", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=1", "model.num_attention_heads=2", "train.seq_len=16", "train.micro_batch_size=1",
    "train.tokens_per_step=64",
]  # fmt: skip
RANK, GAP = 8, 5
PROJECTION = [f"optim.rank={RANK}", f"optim.update_gap={GAP}"]
FULL = ["muon", "normuon", "adafactor", "adamw8bit"]
IDS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


def configuration(name, *more):
    return load([f"optim={name}", *TINY, *(PROJECTION if name in PROJECTED else []), *more])


def build(config):
    model = build_model(config, ALONE.device)
    return model, build_optimizer(config, model)


def train(model, optimizers, steps):
    losses = []
    for _ in range(steps):
        loss = model(IDS, IDS.roll(-1, 1)) / IDS.numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [*PROJECTED, *FULL])
def test_it_learns(name):
    config = configuration(name)
    check(config)
    model, optim = build(config)
    losses = train(model, [optim.optimizer], 30)
    assert losses[-1] < 0.7 * losses[0]


# As the README of each package has it; the rates and the other settings are those of conf/.
DOCUMENTED = {
    "galore": {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"},
    "apollo": {
        "rank": RANK, "proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": GAP,
        "proj_type": "std",
    },
    "fira": {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "projection_type": "std"},
}  # fmt: skip


@pytest.mark.parametrize("name", [*PROJECTED])
def test_it_is_the_package_used_as_documented(name):
    """Up to rounding: a matrix from an SVD has another memory layout once it is state."""
    config = configuration(name)
    model, optim = build(config)
    alone = build_model(config, ALONE.device)
    linears = [p for key, p in alone.named_parameters() if "_proj" in key]
    others = {
        ndim: [p for key, p in alone.named_parameters() if "_proj" not in key and p.ndim == ndim] for ndim in (2, 1)
    }
    module, _, cls = INNER_OPTIMIZERS[name].rpartition(".")
    reference = getattr(importlib.import_module(module), cls)(
        [
            {"params": linears, "lr": config.optim.linear_lr, **DOCUMENTED[name]},
            {"params": others[2], "lr": config.optim.lr},
            {"params": others[1], "lr": config.optim.lr},
        ],
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    assert train(model, [optim.optimizer], 14) == pytest.approx(train(alone, [reference], 14), rel=1e-5)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_muon_is_torch_s_muon_and_adamw_side_by_side(monkeypatch):
    """torch's own iteration in float32 instead of bfloat16; the products are summed in another order."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    config = configuration("muon", "optim.weight_decay=0.1")
    model, optim = build(config)
    alone = build_model(config, ALONE.device)
    named = dict(alone.named_parameters())
    muon = torch.optim.Muon(
        [p for key, p in named.items() if "_proj" in key],
        lr=config.optim.linear_lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    matrices = [p for key, p in named.items() if "_proj" not in key and p.ndim == 2]
    vectors = {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW(
        [{"params": matrices}, vectors], lr=config.optim.lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    assert train(model, [optim.optimizer], 10) == pytest.approx(train(alone, [muon, adamw], 10), rel=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", [*PROJECTED])
def test_the_linears_are_projected_and_nothing_else(name):
    model, optim = build(configuration(name))
    train(model, [optim.optimizer], 2)
    for key, parameter in model.named_parameters():
        state = optim.optimizer.state[parameter]
        assert ("projector_ortho_matrix" in state) == ("_proj" in key), key
        rows, columns = (*parameter.shape, 0)[:2]
        low = (rows, RANK) if rows >= columns else (RANK, columns)
        assert state["exp_avg"].shape == (low if "_proj" in key else parameter.shape), key


def test_muon_steps_on_the_linears_and_adamw_on_everything_else():
    model, optim = build(configuration("muon"))
    train(model, [optim.optimizer], 2)
    for key, parameter in model.named_parameters():
        assert ("momentum_buffer" in optim.optimizer.state[parameter]) == ("_proj" in key), key
        assert ("exp_avg" in optim.optimizer.state[parameter]) == ("_proj" not in key), key


def stub(monkeypatch, name):
    """Stands for the package of ``name`` where it matters only that there is one."""
    package, _, cls = INNER_OPTIMIZERS[name].rpartition(".")
    module = ModuleType(package)
    setattr(module, cls, type(cls, (torch.optim.AdamW,), {}))
    monkeypatch.setitem(sys.modules, package, module)


@pytest.mark.parametrize("name", PROJECTED)
def test_the_groups_have_the_keys_that_the_package_documents(name, monkeypatch):
    stub(monkeypatch, name)
    optim = configuration(name).optim
    model = build_model(configuration("adamw"), ALONE.device)
    groups = parameter_groups(model, lr=optim.lr, linear_lr=optim.linear_lr)
    optimizer = projected_optimizer(
        name, groups, rank=optim.rank, update_gap=optim.update_gap, scale=optim.scale, scale_type=optim.scale_type
    )
    linears, *others = optimizer.param_groups
    assert linears["name"] == "linears" and DOCUMENTED[name].items() <= linears.items()
    assert not any(key in group for group in others for key in DOCUMENTED[name])
    set_rates(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5 * r for r in (optim.linear_lr, optim.lr, optim.lr)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16 with master weights"])
@pytest.mark.parametrize("name", [*PROJECTED, *FULL])
def test_a_run_resumes_from_a_checkpoint_to_the_bit(name, dtype, tmp_path):
    """Saved between two projections and loaded into new objects; the steps after it include the next projection."""
    more = ["train.dtype=bfloat16", "optim.master_weights=true"] if dtype != "float32" else []
    config = configuration(name, *more)
    model, optim = build(config)
    train(model, [optim.optimizer], 7)
    saver = Saver(tmp_path, ALONE)
    saver.save(7, checkpoint.tensors_of(model, optim), {"step": 7})
    saver.finish()
    again, optim_again = build(config)
    checkpoint.load(path_of(tmp_path, 7), again, optim_again)
    assert train(again, [optim_again.optimizer], 9) == train(model, [optim.optimizer], 9)
    expected, resumed = (checkpoint.tensors_of(*pair) for pair in ((model, optim), (again, optim_again)))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.parametrize("name", PROJECTED)
def test_with_the_package_the_check_passes_and_without_it_names_the_file(name, monkeypatch):
    config = configuration(name)
    assert type(config.optim) is BaselineConfig
    stub(monkeypatch, name)
    check(config)
    package = INNER_OPTIMIZERS[name].partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)
    fix = r"run \.venv/bin/pip install -r requirements-baselines\.txt"
    message = rf"optim\.inner={name}: cannot import {package} .*; {fix}"
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize("name", FULL)
def test_the_others_are_full_rank_configurations(name):
    assert type(configuration(name).optim) is OptimConfig
    assert configuration(name).optim.inner == name


@pytest.mark.parametrize("name", [*PROJECTED, *FULL, "adamw"])
def test_schedule_clipping_and_decay_are_those_of_grass(name):
    ours, theirs = load([]).optim, configuration(name).optim
    for key in ("schedule", "warmup_steps", "final_lr", "decay_share", "clip", "weight_decay", "master_weights"):
        assert getattr(theirs, key) == getattr(ours, key), key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=adamw", "optim.inner=galore"], r"optim\.inner=galore needs keys of its own; use optim=galore"),
        (["optim.inner=apollo"], r"optim\.inner=apollo needs keys of its own; use optim=apollo"),
        (["optim=galore", "optim.inner=adamw"], r"optim\.inner=adamw does not project; use galore, apollo, fira, or"),
        (["optim=galore", "optim.rank=33"], r"optim\.rank=33 must be between 1 and 32"),
        (["optim=galore", "optim.rank=8", "optim.scale=0"], r"optim\.scale=0\.0 must be greater than 0"),
        (["optim=fira", "optim.rank=8", "optim.update_gap=0"], r"optim\.update_gap=0 must be at least 1"),
        (["optim=fira", "optim.rank=8", "optim.scale_type=tensor"], r"optim\.scale_type=tensor is for APOLLO"),
        (
            ["optim=apollo", "optim.rank=1", "optim.scale_type=row"],
            r"optim\.scale_type=row is unknown; choose from cha",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message, monkeypatch):
    for name in PROJECTED:
        stub(monkeypatch, name)
    with pytest.raises(ConfigError, match=message):
        check(load([*TINY, *overrides]))


def test_a_closure_gives_the_loss():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = inner_optimizer("muon", [{"name": "linears", "params": [("weight", weight)]}])
    assert isinstance(optimizer, MuonAndAdamW)

    def closure():
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert closure().item() < 6.0
