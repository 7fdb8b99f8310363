"""Grass in a loop of one's own on a model of Hugging Face: defaults, resuming, and the files of save_pretrained."""

import inspect
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.convert import convert_linears, restore_linears
from models.grass_linear import GrassLinear
from optim.grass import Grass
from pretrain.config.compose import load
from tests.helpers import PAPER

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def test_the_defaults_are_those_of_the_configuration():
    parameters = inspect.signature(Grass).parameters
    optim = load([]).optim
    shared = [name for name in parameters if hasattr(optim, name)]
    assert len(shared) == 9
    assert {n: parameters[n].default for n in shared} == {n: getattr(optim, n) for n in shared}


def prepare(dtype=torch.float32, tied=False, rank=8, side="auto", **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    for parameter in model.parameters():  # not the rotary frequencies, as when transformers loads a model in this dtype
        parameter.data = parameter.data.to(dtype)
    convert_linears(model, rank=rank, side=side)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, Grass(model, optimizer, **options)


def loss_at(model, step):
    ids = torch.randint(0, 16, (4, 24), generator=torch.Generator().manual_seed(step))
    return model(ids, labels=ids).loss


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        loss = loss_at(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIONS = {
    "defaults": {},
    "scores over three steps": {"refresh_every": 5, "probe_steps": 3, "stagger": False},
    "exact scores": {**PAPER, "refresh_every": 4, "probe_steps": 2},
    "weighted samples": {"refresh_every": 4, "selection": "multinomial_norm_with_replacement"},
    "bfloat16": {"dtype": torch.bfloat16},
    "columns": {"side": "columns", "refresh_every": 6},
}


@pytest.mark.parametrize("stopped", [6, 9, 10])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loop_resumes_from_its_state_dicts_to_the_bit(options, stopped, tmp_path):
    model, optimizer, grass = prepare(**options)
    grass.start(lambda: loss_at(model, 0).backward())
    train(model, optimizer, range(stopped))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "grass": grass.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    expected = train(model, optimizer, range(stopped, 24))

    again, its_optimizer, its_grass = prepare(**options)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    its_optimizer.load_state_dict(state["optimizer"])
    its_grass.load_state_dict(state_dict=state["grass"])
    assert its_grass.steps == stopped
    assert train(again, its_optimizer, range(stopped, 24)) == expected
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    ours, theirs = grass.state_dict(), its_grass.state_dict()
    assert ours["steps"] == theirs["steps"] == 24 and ours["tensors"].keys() == theirs["tensors"].keys()
    assert all(torch.equal(t.nan_to_num(), theirs["tensors"][n].nan_to_num()) for n, t in ours["tensors"].items())


def test_a_state_can_be_loaded_in_the_middle_and_is_not_shared(tmp_path):
    model, optimizer, grass = prepare(refresh_every=4, stagger=False)
    grass.start(lambda: loss_at(model, 0).backward())
    train(model, optimizer, range(3))
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "g": grass.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = train(model, optimizer, range(3, 12))
    # Now no layer is probed. In the state all were.
    for _ in range(2):
        model.load_state_dict(state["m"])
        optimizer.load_state_dict(deepcopy(state["o"]))  # torch would keep and change its tensors
        grass.load_state_dict(state["g"])
        assert train(model, optimizer, range(3, 12)) == expected


def test_the_state_of_other_layers_is_refused():
    _, _, grass = prepare()
    small, _, other = prepare()
    convert_linears(small, rank=4, patterns=["lm_head"])
    optimizer = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="the state of Grass has other layers than the model"):
        Grass(small, optimizer).load_state_dict(grass.state_dict())
    other.load_state_dict(grass.state_dict())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_restored_model_is_saved_so_that_transformers_reads_it_back(dtype, tied, tmp_path):
    model, optimizer, grass = prepare(dtype, tied)
    with torch.enable_grad():
        grass.start(lambda: loss_at(model, 0).backward())
        train(model, optimizer, range(12))
    ids = torch.arange(24)[None]
    expected = model.eval()(ids).logits
    restore_linears(model)
    assert not any(isinstance(module, GrassLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "saved")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == dtype and torch.equal(again(ids).logits, expected)
    assert again.state_dict().keys() == LlamaForCausalLM(again.config).state_dict().keys()
