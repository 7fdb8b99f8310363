"""Norms and SwiGLU products recomputed: the same gradients from less memory, and no matrix product twice."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models import recompute
from models.recompute import set_lean
from models.rope import rope_tables
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.setup.compiling import compile_blocks
from tests.helpers import allocations
from tests.models.test_activation_checkpointing import IDS, LINEARS, SIZES, assert_same, build, gradients, loss_of


def lean(linears, dtype=torch.float32):
    model = build("none", linears, dtype)
    set_lean(model.layers, True)
    return model


@pytest.mark.parametrize("linears", LINEARS)
def test_gradients_and_probes_differ_by_the_order_of_a_sum_at_most(linears):
    ours, theirs = (gradients(model) for model in (lean(linears, torch.float64), build("none", linears, torch.float64)))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # A norm's input gets its two gradients in another order.
        assert tensor.abs().max() > 0 and (ours[name] - tensor).abs().max() <= 1e-14 * tensor.abs().max(), name


@pytest.mark.parametrize("linears", LINEARS)
def test_in_bfloat16_gradients_and_probes_are_the_same_to_the_bit(linears):
    assert_same(gradients(lean(linears, torch.bfloat16)), gradients(build("none", linears, torch.bfloat16)))


@pytest.mark.parametrize("linears", ["dense", "rows"])
def test_a_block_keeps_at_least_35_percent_less(linears):
    """Measured by the allocator after the forward, without the block's input."""
    kept = []
    for model in (build("none", linears), lean(linears)):
        x = model.embed_tokens(IDS)
        tables = rope_tables(IDS.shape[1], 16, 1e4, like=x)
        kept.append(allocations(lambda: model.layers[0](x, *tables, "sdpa"))[1] - x.nbytes)  # noqa: B023
    assert kept[1] <= 0.65 * kept[0]


@pytest.mark.parametrize("linears", LINEARS)
def test_no_matrix_product_is_computed_again(linears):
    flops = []
    for model in (build("none", linears), lean(linears)):
        with FlopCounterMode(display=False) as counter:
            loss_of(model).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linears", LINEARS)
def test_saved_tensor_hooks_count_at_least_35_percent_less_than_of_the_plain_block(linears, dtype, monkeypatch):
    """Counts saved storages once, the block's input included, without parameters and rotary tables."""

    def saved(model):
        x = model.embed_tokens(IDS)
        tables = rope_tables(IDS.shape[1], 16, 1e4, like=x)
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *tables]}
        storages = {}

        def note(packed):
            if isinstance(packed, torch.Tensor) and (storage := packed.untyped_storage()).data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return packed

        def noting(pack, unpack):  # the hooks of recompute, which come before those around them
            return saved_tensors_hooks(lambda tensor: note(pack(tensor)), unpack)

        monkeypatch.setattr(recompute, "saved_tensors_hooks", noting)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            y = model.layers[0](x, *tables, "sdpa")
        return sum(storages.values()), y

    (plain, _y), (ours, _z) = saved(build("none", "dense", dtype)), saved(lean(linears, dtype))
    assert ours <= 0.65 * plain


@pytest.mark.parametrize("wanted", [True, False])
def test_compiled_blocks_log_once_that_they_decide_themselves(wanted, caplog, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = lean("rows") if wanted else build("none", "rows")
    sizes = [f"model.{name}={value}" for name, value in SIZES.items()]
    config = load([*sizes, "optim.rank=8", "train.seq_len=8", "train.tokens_per_step=8"])
    with caplog.at_level("INFO"):
        compile_blocks(config, model, World(0, 1, torch.device("cpu")))
    assert caplog.text.count("train.lean_activations has no effect in compiled blocks") == wanted
