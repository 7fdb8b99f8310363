"""Grass as an optimizer: dense training with every row selected, AdamW on only the selected rows with fewer."""

import pytest
import torch
from torch import nn

from models.convert import convert_linears
from models.llama import Llama
from optim.grass import Grass
from optim.inner import inner_optimizer
from optim.param_groups import parameter_groups
from tests.helpers import PAPER

HIDDEN = 16


def tiny_llama(dtype=torch.float64):
    model = Llama(
        vocab_size=32, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    ).to_dtype(dtype)  # fmt: skip
    model.init_weights(seed=0)
    return model


def optimizer_of(model, **kwargs):
    return inner_optimizer("adamw", parameter_groups(model, lr=3e-3, linear_lr=2e-3, weight_decay=0.1, **kwargs))


def loss_at(model, step):
    # Only 8 of the 32 tokens occur, which is something to learn.
    ids = torch.randint(0, 8, (4, 9), generator=torch.Generator().manual_seed(step))
    return model(ids[:, :-1], ids[:, 1:]) / 32


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = loss_at(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def grass_of(rank, dtype=torch.float64, model=None, **kwargs):
    model = model or tiny_llama(dtype)
    layers = convert_linears(model, rank, side=kwargs.pop("side", "auto"))
    optimizer = optimizer_of(model)
    grass = Grass(model, optimizer, **PAPER | {"refresh_every": 1000} | kwargs)
    grass.start(lambda: loss_at(model, 0).backward())
    return model, layers, optimizer, grass


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_with_every_row_selected_training_is_dense_training(dtype, tolerance):
    dense = tiny_llama(dtype)
    dense_losses = train(dense, optimizer_of(dense), 20)
    model, _, optimizer, _ = grass_of(HIDDEN, dtype)
    losses = train(model, optimizer, 20)
    assert max(abs(a - b) for a, b in zip(losses, dense_losses, strict=True)) < tolerance
    assert losses[-1] < losses[0] - 0.01
    weights = dict(model.named_parameters())
    for name, expected in dense.named_parameters():
        torch.testing.assert_close(weights[name].detach(), expected.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", ["auto", "longer", "rows", "columns", "neurons"])
def test_each_step_changes_only_the_selected_rows(side):
    model, layers, optimizer, _ = grass_of(4, side=side, refresh_every=3)
    for step in range(7):
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        index = {name: layer.index.clone() for name, layer in layers.items()}
        train(model, optimizer, 1, first=step)
        for name, layer in layers.items():
            changed = (layer.weight != before[name]).any(dim=1 - layer.dim)
            assert changed.nonzero().flatten().tolist() == index[name].tolist()
            assert torch.equal(layer.weight.index_select(layer.dim, layer.index), layer.rows)


def test_the_step_on_the_rows_is_that_of_adamw_on_the_rows_as_parameters():
    model, layers, optimizer, _ = grass_of(4)
    alone = {name: nn.Parameter(layer.rows.detach().clone()) for name, layer in layers.items()}
    adamw = torch.optim.AdamW(alone.values(), lr=2e-3, weight_decay=0.1)
    for step in range(6):
        loss_at(model, step).backward()
        for name, layer in layers.items():
            alone[name].grad = layer.rows.grad.clone()
        optimizer.step()
        adamw.step()
        model.zero_grad()
        for name, layer in layers.items():
            torch.testing.assert_close(layer.rows, alone[name], rtol=1e-12, atol=1e-12)


def test_a_refresh_takes_the_top_rows_of_the_step_before_it_and_drops_their_moments():
    model, layers, optimizer, _ = grass_of(4, refresh_every=3)
    train(model, optimizer, 2)
    dense = tiny_llama()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
    loss_at(dense, 2).backward()
    for layer in layers.values():
        assert int(optimizer.state[layer.rows]["step"]) == 2
    train(model, optimizer, 1, first=2)
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    for name, layer in layers.items():
        norms = gradients[f"{name}.weight"].norm(dim=1 - layer.dim)
        assert layer.index.tolist() == norms.topk(4).indices.sort().values.tolist()
        assert layer.rows not in optimizer.state


def test_the_first_window_is_probed_without_an_update():
    reference = tiny_llama()
    model, layers, optimizer, grass = grass_of(4)
    assert grass.steps == 0 and not optimizer.state
    for name, expected in reference.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], expected)
    assert any(layer.index.tolist() != [0, 1, 2, 3] for layer in layers.values())
    assert all(p.grad is None for p in model.parameters())


def test_the_head_can_train_rows_of_the_vocabulary():
    """The rows of the largest gradients: here of tokens that occur. Only they change, by AdamW on only them."""
    model = tiny_llama()
    dense = tiny_llama()
    layers = convert_linears(model, 4, ["lm_head", "*_proj"], side={"lm_head": "rows"})
    optimizer = optimizer_of(model)
    grass = Grass(model, optimizer, **PAPER | {"refresh_every": 3, "state_at_refresh": "carry", "score": "exact"})
    grass.start(lambda: loss_at(model, 0).backward())
    loss_at(dense, 0).backward()
    head = layers["lm_head"]
    assert head.index.tolist() == dense.lm_head.weight.grad.norm(dim=1).topk(4).indices.sort().values.tolist()
    losses = []
    for step in range(60):
        index, before = head.index.clone(), head.weight.detach().clone()
        losses += train(model, optimizer, 1, first=step)
        assert head.weight.grad is None
        assert (head.weight != before).any(dim=1).nonzero().flatten().tolist() == index.tolist()
    assert grass.history.rows["lm_head"].count_nonzero() > 4
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_frozen_rows_are_chosen_once():
    model, layers, optimizer, _ = grass_of(4, selection="frozen", refresh_every=2)
    chosen = {name: layer.index.tolist() for name, layer in layers.items()}
    train(model, optimizer, 5)
    assert {name: layer.index.tolist() for name, layer in layers.items()} == chosen
    assert all(layer.probe is None for layer in layers.values())


@pytest.mark.parametrize("selection", ["uniform", "multinomial_norm"])
def test_weighted_samples_train(selection):
    model, layers, optimizer, _ = grass_of(4, selection=f"{selection}_with_replacement", refresh_every=4)
    losses = train(model, optimizer, 30)
    assert sum(losses[-5:]) < sum(losses[:5])
    for layer in layers.values():
        assert torch.equal(layer.weight.index_select(layer.dim, layer.index), layer.rows)


@pytest.mark.parametrize("selection", ["top_r", "multinomial_norm_with_replacement"])
def test_clipping_acts_on_the_norm_of_the_dense_gradient_s_rows_rho_and_repeats_counted(selection):
    """Two micro-batches; the inner optimizer is SGD at rate 1, whose step is the clipped gradient."""
    model, dense = tiny_llama(), tiny_llama()
    layers = convert_linears(model, 8)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    grass = Grass(model, sgd, **PAPER | {"refresh_every": 9, "selection": selection})
    grass.start(lambda: loss_at(model, 0).backward())
    for one in (model, dense):
        for micro_batch in (1, 2):
            loss_at(one, micro_batch).backward()
    names = {f"{name}.weight": layer for name, layer in layers.items()}
    restricted = {}
    for name, p in dense.named_parameters():
        restricted[name] = p.grad
        if layer := names.get(name):
            rho = layer.scale.double().unsqueeze(1 - layer.dim)
            restricted[name] = p.grad.index_select(layer.dim, layer.index) * rho
    norm = torch.stack([g.norm() for g in restricted.values()]).norm()
    clip = norm.item() / 2
    found = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    torch.testing.assert_close(found, norm, rtol=1e-6, atol=0)  # ρ is float32
    sgd.step()
    repeated = 0
    for name, layer in names.items():
        expected = dense.get_parameter(name).detach().clone()
        rho = layer.scale.double().unsqueeze(1 - layer.dim)
        expected.index_add_(layer.dim, layer.index, restricted[name] * rho, alpha=-0.5)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)
        repeated += layer.rank - len(layer.index.unique())
    assert (repeated > 0) == selection.endswith("with_replacement")


def test_useless_scores_do_not_stop_a_run(caplog):
    _, layers, _, grass = grass_of(4, refresh_every=1)
    grass.probes.gathered = {name: torch.full((layer.selectable,), float("nan")) for name, layer in layers.items()}
    grass._refresh(list(layers))
    assert "no usable row scores" in caplog.text


def test_a_model_without_grass_layers_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="convert_linears"):
        Grass(model, optimizer_of(model), refresh_every=1, **PAPER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "best"}, "optim.selection=best is unknown; choose from top_r, frozen, uniform"),
        ({"score": "sketched"}, "optim.score=sketched is unknown; choose from exact, sketch"),
        ({"stagger": "off"}, "optim.stagger=off is unknown; choose from True, False, auto"),
        ({"state_at_refresh": "keep"}, "optim.state_at_refresh=keep is unknown; choose from reset, carry"),
        ({"new_second_moment": "one"}, "optim.new_second_moment=one is unknown; choose from mean, score, zero"),
        ({"probe_steps": 0}, "optim.probe_steps=0 must be at least 1"),
        ({"stagger": True, "refresh_warmup": 2}, "optim.refresh_warmup needs all blocks to choose rows"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    model = tiny_llama()
    convert_linears(model, 4)
    with pytest.raises(ValueError, match=message):
        Grass(model, optimizer_of(model), **PAPER | {"refresh_every": 4} | options)


def test_staggered_blocks_refresh_in_turn_with_all_their_layers():
    model, layers, optimizer, _ = grass_of(4, refresh_every=4, stagger=True, selection="uniform")
    changed = {}
    for step in range(8):
        before = {name: layer.index.clone() for name, layer in layers.items()}
        train(model, optimizer, 1, first=step)
        moved = [name for name, layer in layers.items() if not torch.equal(layer.index, before[name])]
        changed[step + 1] = {name.split(".")[1] for name in moved}
    # Two blocks, a window of four: block 1 is two steps ahead of block 0.
    assert changed == {1: set(), 2: {"1"}, 3: set(), 4: {"0"}, 5: set(), 6: {"1"}, 7: set(), 8: {"0"}}


@pytest.mark.parametrize(
    ("selection", "inner", "in_turn"),
    [
        ("top_r", torch.optim.Muon, True),
        ("cyclic", torch.optim.AdamW, True),  # scores start its second moments
        ("cyclic", torch.optim.Muon, False),
        ("uniform", torch.optim.SGD, False),
    ],
)
def test_auto_lets_blocks_take_turns_only_where_rows_are_scored(selection, inner, in_turn):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False))
    convert_linears(model, 2, ["*"])
    optimizer = inner([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    assert Grass(model, optimizer, selection=selection).schedule.staggered is in_turn


@pytest.mark.parametrize("stagger", [False, True])
def test_in_turn_every_row_of_every_layer_is_trained_within_one_round(stagger):
    model, layers, optimizer, grass = grass_of(4, refresh_every=3, selection="cyclic", stagger=stagger)
    seen = {name: [layer.index.tolist()] for name, layer in layers.items()}
    for step in range(3 * 3):  # the fourth of four windows has begun
        train(model, optimizer, 1, first=step)
        for name, layer in layers.items():
            if layer.index.tolist() != seen[name][-1]:
                seen[name].append(layer.index.tolist())
    for name, windows in seen.items():
        assert len(windows) == 4
        trained = [row for rows in windows for row in rows]
        assert sorted(trained) == list(range(layers[name].selectable))
    assert all((rows != 0).all() for rows in grass.history.rows.values())


def test_a_layer_without_a_gradient_is_sampled_beside_one_that_has_some():
    """The zeros of the second layer leave the first without a gradient, and so without ρ."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    nn.init.zeros_(model[1].weight)
    layers = convert_linears(model, 2, ["*"])
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    grass = Grass(model, optimizer, **PAPER | {"refresh_every": 2, "selection": "multinomial_norm_with_replacement"})
    grass.start(lambda: (model(torch.ones(4, 8)) - 1).square().sum().backward())
    assert torch.equal(layers["0"].scale, torch.ones(2))
    assert (layers["1"].scale != 1).any()


def test_one_backward_chooses_the_initial_rows_of_all_blocks_also_where_they_take_turns():
    model, _, _, grass = grass_of(4, refresh_every=4, stagger=True)
    assert len({*grass.schedule.offsets.values()}) > 1
    chosen, calls, choose = [], [], grass.choose
    grass.choose = lambda names, norms: (chosen.append((names, norms)), choose(names, norms))[1]
    grass.start(lambda: (calls.append(1), loss_at(model, 1).backward()))
    ((names, norms),) = chosen
    assert len(calls) == 1 and names == [*grass.layers]
    assert all((scores > 0).any() for scores in norms)  # none was chosen without scores


@pytest.mark.parametrize("selection", ["cyclic", "uniform"])
def test_a_selection_without_scores_probes_nothing_and_needs_no_first_gradient(selection):
    model, layers, optimizer, grass = grass_of(4, selection=selection, refresh_every=2)
    grass.start(lambda: pytest.fail("a gradient was computed for rows that no gradient decides"))
    for step in range(4):
        assert all(layer.probe is None for layer in layers.values())
        before = {name: layer.index.clone() for name, layer in layers.items()}
        train(model, optimizer, 1, first=step)
        assert any(not torch.equal(layer.index, before[name]) for name, layer in layers.items()) == (step % 2 == 1)
    assert grass.history.means().keys() == {"grass/changed", "grass/coverage"}


def test_second_moments_that_start_from_scores_have_them_under_any_selection():
    model, layers, optimizer, grass = grass_of(
        4, selection="cyclic", refresh_every=3, probe_steps=1, state_at_refresh="carry", new_second_moment="score"
    )
    train(model, optimizer, 2)
    norms = {}

    def choose(names, scores):
        norms.update(zip(names, scores, strict=True))
        return chosen_before(names, scores)

    chosen_before, grass.choose = grass.choose, choose
    train(model, optimizer, 1, first=2)
    for name, layer in layers.items():  # in the first round of "cyclic" every chosen row is new
        mean_square = norms[name][layer.index] ** 2 * layer.selectable / layer.weight.numel()
        second = optimizer.state[layer.rows]["exp_avg_sq"]
        torch.testing.assert_close(second.amin(1 - layer.dim), mean_square, rtol=1e-5, atol=0)
        torch.testing.assert_close(second.amax(1 - layer.dim), mean_square, rtol=1e-5, atol=0)
