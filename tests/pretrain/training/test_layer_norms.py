"""``train.log_layers_every``: numbers worked by hand; the same on one process and two; nothing while it is off."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from models.convert import convert_linears
from optim.grass import Grass
from optim.stack import OptimizerStack
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import read_json_lines
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.training.layer_norms import LayerNorms
from tests.helpers import PAPER
from tests.parallel_runs import FSDP, GRASS, TINY, run, spawn, train

ROOT = math.sqrt


def model():
    """head · first · (1, 2) = 82; its gradients are (3, 8) and ((6, 12), (8, 16))."""
    layers = OrderedDict(first=nn.Linear(2, 2, bias=False), head=nn.Linear(2, 1, bias=False))
    layers["first"].weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    layers["head"].weight.data = torch.tensor([[6.0, 8.0]])
    return nn.Sequential(layers)


def backward(net):
    net(torch.tensor([[1.0, 2.0]])).sum().backward()


def measured(net, stack, norms, step=1):
    norms.start(step)
    backward(net)
    norms.after_backward()
    nn.utils.clip_grad_norm_(net.parameters(), math.inf)
    stack.step()
    return norms.take()


def test_full_weights():
    net = model()
    stack = OptimizerStack(optimizer := torch.optim.SGD(net.parameters(), lr=0.5))
    norms = LayerNorms(net, stack, every=2)
    optimizer.register_step_post_hook(lambda *_: norms.after_optimizer())
    assert measured(net, stack, norms, step=1) == {}
    for layer, weight in (("first", [[3.0, 0.0], [0.0, 4.0]]), ("head", [[6.0, 8.0]])):
        net.get_submodule(layer).weight.data = torch.tensor(weight)
    assert measured(net, stack, norms, step=2) == pytest.approx({
        "grad_norm/first": ROOT(500), "grad_norm/head": ROOT(73),
        "weight_norm/first": ROOT(0 + 6**2 + 4**2 + 4**2), "weight_norm/head": ROOT(4.5**2 + 4**2),
        "update_ratio/first": ROOT(125) / 5, "update_ratio/head": ROOT(18.25) / 10,
    })  # fmt: skip
    assert norms.take() == {}


def test_selected_rows_are_measured_before_a_refresh_selects_others():
    net = model()
    convert_linears(net, rank=1, patterns=["first"], side="rows")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    grass = Grass(net, optimizer, refresh_every=1, **PAPER)
    stack = OptimizerStack(optimizer, grass)
    norms = LayerNorms(net, stack, every=1)
    optimizer.register_step_post_hook(lambda *_: norms.after_optimizer())
    grass.register_refresh_pre_hook(norms.before_refresh)
    rows = iter([0, 1])
    grass.choose = lambda names, scores: [(torch.tensor([next(rows)]), None)]
    grass.start(lambda: backward(net))
    assert measured(net, stack, norms) == pytest.approx({
        "grad_norm/first": ROOT(6**2 + 12**2), "grad_norm/head": ROOT(73),
        "weight_norm/first": ROOT(0 + 6**2 + 0 + 4**2), "weight_norm/head": ROOT(4.5**2 + 4**2),
        "update_ratio/first": ROOT(3**2 + 6**2) / 3, "update_ratio/head": ROOT(18.25) / 10,
    })  # fmt: skip
    assert net.first.index.tolist() == [1]


def test_the_weight_of_8_bits_is_measured_with_its_rows():
    net = model()
    convert_linears(net, rank=1, patterns=["first"], side="rows", int8=True)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
    grass = Grass(net, optimizer, **PAPER)
    norms = LayerNorms(net, OptimizerStack(optimizer, grass), every=1)
    grass.register_refresh_pre_hook(norms.before_refresh)
    found = measured(net, OptimizerStack(optimizer, grass), norms)
    assert found["weight_norm/first"] == pytest.approx(5.0, rel=1e-6) and found["update_ratio/first"] == 0


def test_numbers_that_are_not_finite_are_null():
    net = model()
    net.head.weight.data.fill_(math.inf)
    stack = OptimizerStack(optimizer := torch.optim.SGD(net.parameters(), lr=0.5))
    norms = LayerNorms(net, stack, every=1)
    optimizer.register_step_post_hook(lambda *_: norms.after_optimizer())
    assert {name: value for name, value in measured(net, stack, norms).items() if "head" in name} == {
        "grad_norm/head": pytest.approx(ROOT(73)), "weight_norm/head": None, "update_ratio/head": None,
    }  # fmt: skip


def test_the_norms_are_the_same_on_one_process_and_on_two(root, tmp_path):
    text = [f"data.paths=[{root / 'models'}]", f"data.root={tmp_path / 'prepared'}"]
    short = ["train.steps=4", "train.log_layers_every=2", "train.sample_tokens=0", "optim.refresh_every=2"]
    common = [*TINY, *text, *short, "train.eval_sequences=1", f"run.root={tmp_path}"]
    ready(load([*common, "run.name=none"]), 1)
    cases = {"ddp": [], "fsdp": FSDP, "fsdp-columns": [*FSDP, *GRASS["columns"]], "fsdp-adamw": [*FSDP, "optim=adamw"]}
    runs = {name: [*common, f"run.name={name}", *more] for name, more in cases.items()}
    of_grass = ("optim.rank", "optim.refresh", "optim.selection")
    runs["fsdp-adamw"] = [override for override in runs["fsdp-adamw"] if not override.startswith(of_grass)]
    spawn(2, tmp_path, [(run, overrides) for overrides in runs.values()])
    for name, overrides in runs.items():
        alone = train([*overrides, f"run.name={name}-alone", "train.parallel=ddp"])
        ours, theirs = (by_layer(folder) for folder in (RunFolder(load(overrides)), alone))
        assert [line["step"] for line in ours] == [2, 4] and len(ours[0]) == 2 + 3 * (2 * 7 + 1)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-9), name


def by_layer(folder):
    return [line for line in read_json_lines(folder.metrics_file) if "grad_norm/lm_head" in line]


def test_the_combination_with_steps_inside_the_backward_is_refused():
    overrides = ["train.step_in_backward=true", "optim.clip=0", "train.log_layers_every=10"]
    with pytest.raises(ConfigError, match=r"gradients are freed before .*; set train\.log_layers_every=0"):
        check(load(overrides), needs_data=False)
