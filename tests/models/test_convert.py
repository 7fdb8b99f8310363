"""Conversion of a model's linears to Grass, and back to plain linears."""

import pytest
import torch
from torch import nn

from models.convert import convert_linears, restore_linears
from models.grass_linear import GrassLinear
from models.llama import Llama
from optim.grass import Grass
from tests.helpers import PAPER

IDS = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=bias), "k_proj": nn.Linear(8, 4, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 16, bias=False)})
        self.lm_head = nn.Linear(8, 32, bias=False)


def test_conversion_shares_weights_takes_the_smaller_side_and_logs_the_other_layers(caplog):
    model = nn.ModuleList([Tiny()])
    weights = {name: p for name, p in model.named_parameters()}
    with caplog.at_level("INFO"):
        layers = convert_linears(model, rank=2)
    assert {name: layer.side for name, layer in layers.items()} == {
        "0.self_attn.q_proj": "rows",
        "0.self_attn.k_proj": "rows",
        "0.mlp.up_proj": "columns",
    }
    assert all(layer.weight is weights[f"{name}.weight"] for name, layer in layers.items())
    assert "converted 3 of 4" in caplog.text and "0.lm_head" in caplog.text


def test_the_side_can_be_given_for_each_pattern():
    layers = convert_linears(nn.ModuleList([Tiny()]), rank=2, side={"*.self_attn.*": "columns", "k_proj": "rows"})
    assert [layer.side for layer in layers.values()] == ["columns", "rows", "columns"]


def test_longer_takes_many_short_slices_and_a_share_of_as_many_elements():
    auto, longer = (convert_linears(nn.ModuleList([Tiny()]), 0.5, side=side) for side in ("auto", "longer"))
    assert [layer.side for layer in longer.values()] == ["rows", "columns", "rows"]
    assert [layer.rank for layer in longer.values()] == [4, 4, 8]
    assert [layer.rows.numel() for layer in longer.values()] == [layer.rows.numel() for layer in auto.values()]


def test_the_rank_can_be_given_for_each_pattern():
    layers = convert_linears(nn.ModuleList([Tiny()]), rank={"*": 4, "*.self_attn.*": 2, "k_proj": 3})
    assert [layer.rank for layer in layers.values()] == [2, 3, 4]


def test_the_rank_can_be_a_share_of_the_rows():
    layers = convert_linears(nn.ModuleList([Tiny()]), rank={"*": 0.25, "*.self_attn.*": 0.5, "k_proj": 1.0})
    assert [(layer.selectable, layer.rank) for layer in layers.values()] == [(8, 4), (4, 4), (8, 2)]
    assert [layer.rank for layer in convert_linears(nn.ModuleList([Tiny()]), rank=0.01).values()] == [1, 1, 1]


def test_attention_trains_a_larger_share_at_the_same_total():
    def ranks(rank, weight):
        layers = convert_linears(nn.ModuleList([Tiny()]), rank, attention_weight=weight)
        trained = sum(layer.rows.numel() for layer in layers.values())
        return {name.rpartition(".")[2]: layer.rank for name, layer in layers.items()}, trained

    # Of q 8 × 8, k 4 rows of 8 and up 8 columns of 16 a quarter is 16 + 8 + 32 = 56 elements. A share x of up and 4 x
    # of q and k: x (4 · 64 + 4 · 32 + 128) = 56, so x = 0.109, which is 0.875 columns, 3.5 and 1.75 rows.
    assert ranks(0.25, 4.0) == ({"q_proj": 4, "k_proj": 2, "up_proj": 1}, 4 * 8 + 2 * 8 + 1 * 16)
    # A half is 112 elements: q and k, trained whole, take 96 of them, and up the rest.
    assert ranks(0.5, 20.0) == ({"q_proj": 8, "k_proj": 4, "up_proj": 1}, 112)
    assert ranks(1.0, 4.0) == ({"q_proj": 8, "k_proj": 4, "up_proj": 8}, 224)
    assert ranks({"*": 0.25}, 4.0)[0] == {"q_proj": 2, "k_proj": 1, "up_proj": 2}  # ranks by name are taken as given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": {"*_proj": 2, "nothing": 1}}, "optim.rank: 'nothing' matches no linear layer"),
        ({"rank": {"up_proj": 2}}, "0.self_attn.q_proj and 1 more: optim.rank has no rank for it"),
        ({"rank": "many"}, "optim.rank=many must be between 1 and 8"),
        ({"rank": 2, "side": {"*.down_proj": "rows"}}, r"optim\.side: '\*\.down_proj' matches no linear layer"),
        ({"rank": 2, "patterns": ["*.nothing"]}, "matches no linear layer"),
        ({"rank": 5}, "0.self_attn.k_proj: optim.rank=5 must be between 1 and 4"),
        ({"rank": 0}, "optim.rank=0 must be between 1 and"),
        ({"rank": 2, "attention_weight": 0.0}, "optim.attention_weight=0.0 must be above 0"),
        ({"rank": 1.5}, "optim.rank=1.5 must be between 1 and 8, the number of rows .* or a share"),
        ({"rank": 2, "side": "diagonal"}, "use auto, longer, rows, columns or neurons"),
    ],
)
def test_bad_conversions_are_refused_and_change_nothing(arguments, message):
    model = nn.ModuleList([Tiny()])
    with pytest.raises(ValueError, match=message):
        convert_linears(model, **arguments)
    assert not any(isinstance(m, GrassLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_biased_and_tied_linears_are_refused():
    with pytest.raises(ValueError, match="bias"):
        convert_linears(nn.ModuleList([Tiny(bias=True)]), rank=2)
    model = Tiny()
    model.embed = nn.Embedding(32, 8)
    model.embed.weight = model.lm_head.weight
    with pytest.raises(ValueError, match="tied"):
        convert_linears(model, rank=2, patterns=["lm_head"])


def llama():
    model = Llama(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model.init_weights(seed=0)
    return model


def trained(dtype=torch.float32, **options):
    """A converted model after a few steps with refreshes."""
    model = llama().to_dtype(dtype)
    convert_linears(model, rank=4, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    grass = Grass(model, optimizer, refresh_every=2, **PAPER)
    grass.start(lambda: model(IDS, IDS).backward())
    for _ in range(5):
        model(IDS, IDS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


OPTIONS = {
    "default": {},
    "columns that share an index": {"side": "columns", "share_index": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32 rows of bfloat16 weights": {"dtype": torch.bfloat16, "state_dtype": torch.float32},
    "the head as well": {"patterns": ["*_proj", "lm_head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_restored_model_is_a_plain_one_with_the_trained_weights(options, tmp_path):
    model = trained(**options)
    expected, weights = model(IDS), {name: p.data_ptr() for name, p in model.named_parameters()}
    linears = restore_linears(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in linears)
    assert not any(isinstance(m, GrassLinear) for m in model.modules())
    assert torch.equal(model(IDS), expected)
    assert all(p.data_ptr() == weights[name] and p.requires_grad for name, p in model.named_parameters())

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plain = llama().to_dtype(options.get("dtype", torch.float32))
    assert not torch.equal(plain(IDS), expected)
    plain.load_state_dict(torch.load(tmp_path / "weights.pt"))  # no key too many or too few
    assert torch.equal(plain(IDS), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_in_8_bits_are_restored_in_the_dtype_of_the_rows_or_the_one_asked_for(dtype):
    model = trained(int8=True)
    expected = model(IDS)
    linears = restore_linears(model, dtype)
    assert {linear.weight.dtype for linear in linears.values()} == {dtype or torch.float32}
    if dtype is None:
        assert torch.equal(model(IDS), expected)
    else:
        torch.testing.assert_close(model.to_dtype(dtype)(IDS).float(), expected, rtol=0, atol=0.05)


def test_a_restored_model_can_be_converted_again():
    model = trained()
    index = model.layers[0].mlp.up_proj.index.tolist()
    restore_linears(model)
    assert restore_linears(model) == {}
    layers = convert_linears(model, rank=4)
    assert len(layers) == 14 and layers["layers.0.mlp.up_proj"].index.tolist() == [0, 1, 2, 3] != index
