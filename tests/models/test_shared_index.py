"""Linears that share an input, an index and one saved slice: the same gradients for fewer bytes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.activation_checkpointing import all_checkpointed
from models.convert import convert_linears
from models.llama import Llama
from optim.grass import Grass
from optim.inner import inner_optimizer
from optim.param_groups import parameter_groups
from tests.helpers import PAPER

RANK, TOKENS = 4, 18
SIDES = ("rows", "columns")


def plain_llama(dtype=torch.float64):
    model = Llama(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    ).to_dtype(dtype)  # fmt: skip
    model.init_weights(seed=0)
    return model


def llama(share_index, dtype=torch.float64, side="columns"):
    model = plain_llama(dtype)
    layers = convert_linears(model, RANK, side=side, share_index=share_index)
    for name, layer in layers.items():
        layer.select(torch.arange(4) * 2 + (1 if "mlp" in name else 0))
    return model, layers


def ids():
    return torch.randint(0, 32, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))


def gradients(model):
    model.zero_grad()
    model(ids(), ids()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def saved_bytes(model, then=None):
    """The bytes in the graph of a forward, each storage once, without parameters; ``then`` gets the loss."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids(), ids())
    total = sum(storages.values())
    if then:
        then(loss)
    return total


def test_gradients_are_those_of_an_index_apart():
    apart, together = llama(False)[0], llama(True)[0]
    assert_same(gradients(together), gradients(apart))
    assert_same(gradients(together), gradients(apart))  # the slices of the first batch are not used for the next


@pytest.mark.parametrize(("side", "slices"), [("columns", 3), ("auto", 1)])
def test_it_saves_two_slices_of_three_for_attention_and_one_of_two_for_the_mlp(side, slices):
    """With side=auto q is square and trains rows, k and v as well: only gate and up select columns."""
    apart, together = (saved_bytes(llama(share, side=side)[0]) for share in (False, True))
    assert apart - together == 2 * slices * TOKENS * RANK * 8


def test_a_column_selection_saves_the_share_r_of_n_of_an_input_that_nothing_else_keeps():
    rows, columns = (saved_bytes(llama(False, side={"*_proj": "rows", "down_proj": side})[0]) for side in SIDES)
    assert rows - columns == 2 * TOKENS * (24 - RANK) * 8


@pytest.mark.parametrize("score", ["exact", "sketch"])
def test_with_stagger_no_forward_of_a_run_keeps_the_whole_inputs_of_more_than_a_block(score):
    """Includes the first window's probes, which choose the columns that one probe of all layers would choose."""
    trained, indices = {}, {}
    for stagger in ("auto", False):
        model, layers = llama(False)
        regular = saved_bytes(model)
        optimizer = inner_optimizer("adamw", parameter_groups(model, lr=1e-3, linear_lr=1e-3))
        grass = Grass(model, optimizer, **PAPER | {"refresh_every": 2, "score": score, "stagger": stagger})
        saved = []
        with all_checkpointed(model.layers):  # as a run does
            grass.start(lambda model=model, saved=saved: saved.append(saved_bytes(model, lambda loss: loss.backward())))
        indices[stagger] = [layer.index.tolist() for layer in layers.values()]
        for _ in range(4):
            saved.append(saved_bytes(model, lambda loss: loss.backward()))
            optimizer.step()
            model.zero_grad()
        trained[stagger] = max(saved) - regular
    assert indices["auto"] == indices[False]
    # Instead of seven slices: the inputs of q, k, v, of gate, up and of down (that of o attention keeps); seven keys,
    # each of 16 bytes with what keeps them apart.
    block = TOKENS * 8 * (16 + 16 + 24 - 7 * RANK) + 7 * 16
    assert trained == {"auto": block, False: 2 * block}


def test_nothing_is_held_once_the_forward_is_over():
    model, layers = llama(True)
    loss = model(ids(), ids())
    with torch.no_grad():
        model(ids())
    assert all(layer.shared.x is layer.shared.slice is None for layer in layers.values() if layer.shared)
    assert sum(layer.shared is not None for layer in layers.values()) == 10
    loss.backward()


def test_checkpointed_blocks_give_the_same_gradients():
    model, _ = llama(True)
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    for block in model.layers:
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    assert_same(gradients(model), expected)


def test_a_compiled_block_is_one_graph_for_all_layers_and_every_index():
    model, layers = llama(True, torch.float32)
    reference = llama(True, torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.layers:
        block.compile(backend=count, fullgraph=True)
    for start in (0, 9):
        for layer in [*layers.values(), *reference[1].values()]:
            layer.select(torch.arange(start, start + RANK))
        found, expected = gradients(model), gradients(reference[0])
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    slices = [node for node in graphs[0].graph.nodes if "index_select" in str(node.target)]
    assert len(slices) == 4  # of the input of q, k, v; of o; of gate, up; of down


@pytest.mark.parametrize("score", ["exact", "sketch"])
def test_the_columns_are_chosen_by_the_joint_norms_of_the_gradients(score):
    model, layers = llama(True)
    dense = plain_llama()
    dense.load_state_dict({name: p for name, p in model.state_dict().items() if name in dense.state_dict()})
    expected = gradients(dense)
    optimizer = inner_optimizer("adamw", parameter_groups(model, lr=1e-3, linear_lr=1e-3))
    grass = Grass(model, optimizer, **PAPER | {"refresh_every": 2, "score": score, "state_at_refresh": "carry"})
    grass.start(lambda: model(ids(), ids()).backward())
    for block in range(2):
        for module, *children in (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj")):
            first, *others = (f"layers.{block}.{module}.{child}" for child in children)
            assert all(torch.equal(layers[name].index, layers[first].index) for name in others)
            if score == "exact":
                joint = torch.cat([expected[f"{name}.weight"] for name in (first, *others)]).norm(dim=0)
                assert torch.equal(layers[first].index, joint.topk(RANK).indices.sort().values)


def test_where_nothing_can_share_it_is_refused():
    with pytest.raises(ValueError, match=r"share_index=true: no module's q_proj, k_proj.* set optim\.side=columns"):
        llama(True, side="rows")
