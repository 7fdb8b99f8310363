"""optim.side=neurons: the linears of an MLP select the same neurons."""

import pytest
import torch

from models.convert import convert_linears
from models.llama import Llama
from optim.grass import Grass
from optim.inner import inner_optimizer
from optim.param_groups import parameter_groups
from tests.helpers import PAPER

MLP = ("gate_proj", "up_proj", "down_proj")


def llama():
    model = Llama(
        vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    ).to_dtype(torch.float64)  # fmt: skip
    model.init_weights(seed=0)
    return model


def loss(model, step=0):
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))
    return model(ids, ids)


def mlp_of(layers, block=0):
    return [layers[f"layers.{block}.mlp.{child}"] for child in MLP]


@pytest.mark.parametrize(("rank", "neurons"), [(4, 12), (0.25, 12), (1.0, 48), (0.3, 14), (1, 3)])
def test_an_mlp_trains_as_large_a_share_of_its_neurons_as_of_its_rows_otherwise(rank, neurons):
    layers, auto = (convert_linears(llama(), rank, side=side) for side in ("neurons", "auto"))
    assert [layer.side for layer in mlp_of(layers)] == ["rows", "rows", "columns"]
    assert [layer.rank for layer in mlp_of(layers)] == [neurons] * 3
    if rank != 0.3:  # its rounding differs
        assert {n: layer.rows.numel() for n, layer in layers.items()} == {n: x.rows.numel() for n, x in auto.items()}
    of_attention = [name for name in layers if "self_attn" in name]
    assert [(layers[n].side, layers[n].rank) for n in of_attention] == [
        (auto[n].side, auto[n].rank) for n in of_attention
    ]


def test_attention_can_train_a_larger_share():
    layers = convert_linears(llama(), 0.5, side="neurons", attention_weight=4)
    assert layers["layers.0.self_attn.q_proj"].rank == 16 and len({layer.rank for layer in mlp_of(layers)}) == 1
    assert mlp_of(layers)[0].rank == 16  # a third: 3/4 of all elements are in the MLP


@pytest.mark.parametrize("selection", ["cyclic", "top_r", "uniform"])
def test_the_linears_of_an_mlp_always_select_the_same_neurons(selection):
    model = llama()
    layers = convert_linears(model, 0.25, side="neurons")
    optimizer = inner_optimizer("muon", parameter_groups(model, lr=1e-2, linear_lr=1e-2))
    grass = Grass(model, optimizer, refresh_every=2, selection=selection)
    grass.start(lambda: loss(model).backward())
    seen = set()
    for step in range(6):
        loss(model, step).backward()
        optimizer.step()
        model.zero_grad()
        for block in range(2):
            gate, up, down = mlp_of(layers, block)
            assert torch.equal(gate.index, up.index) and torch.equal(gate.index, down.index)
            seen.add(tuple(gate.index.tolist()))
    assert len(seen) > 4  # other ones in other blocks and windows


def test_neurons_are_chosen_by_the_joint_norm_of_their_gradients():
    model, dense = llama(), llama()
    layers = convert_linears(model, 0.25, side="neurons")
    loss(dense).backward()
    grass = Grass(model, inner_optimizer("adamw", parameter_groups(model, lr=1e-3, linear_lr=1e-3)), **PAPER)
    grass.start(lambda: loss(model).backward())
    for block, of_block in enumerate(dense.layers):
        gate, up, down = (getattr(of_block.mlp, child).weight.grad for child in MLP)
        joint = torch.cat([gate, up, down.T], dim=1).norm(dim=1)
        assert all(torch.equal(layer.index, joint.topk(12).indices.sort().values) for layer in mlp_of(layers, block))


def test_a_linear_with_a_side_of_its_own_is_not_tied():
    layers = convert_linears(llama(), 0.25, side={"*": "neurons", "down_proj": "auto"})
    gate, up, down = mlp_of(layers)
    assert gate.index_group is up.index_group is not None and down.index_group is None and down.side == "rows"
    assert gate.index_group is not mlp_of(layers, block=1)[0].index_group
