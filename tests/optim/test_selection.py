"""The selections by brute force and by Monte-Carlo."""

from itertools import combinations

import pytest
import torch

from optim.selection import SELECTIONS, needs_scores, select

SCORES = torch.tensor([0.5, 3.0, 0.1, 2.0, 1.0, 0.0])


def test_top_r_leaves_the_smallest_residual_of_every_subset():
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(7, 5, generator=g, dtype=torch.float64)
    chosen = select("top_r", gradient.norm(dim=1), 3, seed=0).chosen.tolist()

    def residual(rows):
        rest = [i for i in range(7) if i not in rows]
        return gradient[rest].norm().item()

    assert residual(chosen) == min(residual(rows) for rows in combinations(range(7), 3))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_choice_is_sorted_in_range_and_a_function_of_scores_and_seed(name):
    first, again = select(name, SCORES, 4, seed=3), select(name, SCORES, 4, seed=3)
    assert first.chosen.tolist() == again.chosen.tolist() == sorted(first.chosen.tolist())
    assert set(first.chosen.tolist()) <= set(range(6))
    assert len(first.chosen) == 4
    if name.endswith("with_replacement"):
        assert first.scale is not None
    else:
        assert first.scale is None
        assert len(set(first.chosen.tolist())) == 4


@pytest.mark.parametrize(("name", "power"), [("uniform", 0), ("multinomial_norm", 1), ("multinomial_norm_sq", 2)])
def test_sampling_with_replacement_is_unbiased_and_converges_as_it_should(name, power):
    """E[PPᵀG] = G, and the mean square error of a mean over N draws is the variance of one, worked by hand, over N."""
    g = torch.Generator().manual_seed(1)
    gradient = torch.randn(6, 4, generator=g, dtype=torch.float64)
    norms = gradient.norm(dim=1)
    draws = torch.zeros(6000, 6, 4, dtype=torch.float64)
    for seed, drawn in enumerate(draws):
        index, scale, _ = select(f"{name}_with_replacement", norms, 3, seed=seed)
        drawn.index_add_(0, index, gradient[index] * scale.double().square().unsqueeze(1))
    q = norms**power / (norms**power).sum()
    variance = ((norms.square() / q).sum() - norms.square().sum()).item() / 3
    for together in (1, 10, 60):
        errors = draws.unflatten(0, (-1, together)).mean(1) - gradient
        assert errors.square().sum((1, 2)).mean().item() == pytest.approx(variance / together, rel=0.35)
    assert (draws.mean(0) - gradient).norm().item() < 3 * (variance / len(draws)) ** 0.5


def test_sampling_by_norm_has_the_least_variance_of_the_three():
    g = torch.Generator().manual_seed(2)
    gradient = torch.randn(8, 4, generator=g, dtype=torch.float64) * torch.arange(1, 9).unsqueeze(1)

    def variance(name):
        errors = []
        for seed in range(800):
            index, scale, _ = select(f"{name}_with_replacement", gradient.norm(dim=1), 3, seed=seed)
            estimate = torch.zeros_like(gradient)
            estimate.index_add_(0, index, gradient[index] * scale.double().square().unsqueeze(1))
            errors.append((estimate - gradient).square().sum().item())
        return sum(errors) / len(errors)

    by_norm = variance("multinomial_norm")
    assert by_norm < variance("uniform")
    assert by_norm < variance("multinomial_norm_sq")


def test_rows_without_gradient_are_drawn_last():
    for seed in range(20):
        assert 5 not in select("multinomial_norm", SCORES, 5, seed=seed).chosen.tolist()
    assert select("multinomial_norm", SCORES, 6, seed=0).chosen.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", [name for name in SELECTIONS if needs_scores(name)])
@pytest.mark.parametrize("scores", [torch.zeros(6), torch.tensor([1.0, float("nan"), 1, 1, 1, 1]), SCORES / 0])
def test_useless_scores_give_a_uniform_choice_and_say_so(name, scores):
    chosen = select(name, scores, 4, seed=0)
    assert not chosen.usable
    assert len(set(chosen.chosen.tolist())) == 4
    counts = torch.zeros(6)
    for seed in range(600):
        counts[select(name, scores, 2, seed=seed).chosen] += 1
    assert (counts / 600 - 2 / 6).abs().max() < 0.08


@pytest.mark.parametrize(("rows", "rank"), [(12, 3), (12, 5), (7, 7), (5, 1), (344, 32)])
def test_in_turn_every_row_is_trained_before_any_is_twice(rows, rank):
    turns = -(-rows // rank)
    chosen = [select("cyclic", torch.ones(rows), rank, seed=1, window=w).chosen.tolist() for w in range(3 * turns)]
    rounds = [chosen[start : start + turns] for start in range(0, len(chosen), turns)]
    for parts in rounds:
        assert all(part == sorted(set(part)) and len(part) == rank for part in parts)
        assert set().union(*parts) == set(range(rows))
        assert sum(len(part) for part in parts[:-1]) == len(set().union(*parts[:-1]))
    assert rank == rows or rounds[0] != rounds[1]


def test_turns_do_not_depend_on_scores():
    useless = torch.tensor([0.0, float("nan"), 1, 1, 1, 1])
    found = select("cyclic", useless, 4, seed=0, window=1)
    assert found.usable and found.chosen.tolist() == select("cyclic", SCORES, 4, seed=0, window=1).chosen.tolist()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"optim\.selection='best' is unknown; choose from top_r"):
        select("best", SCORES, 2, seed=0)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_largest_scores_are_the_first_of_a_stable_sort(rank):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(0, 4, (12,), generator=generator).double() + 1 for _ in range(5)]  # with many ties
    scores += [torch.rand(20, generator=generator, dtype=torch.float64)]
    for of_layer in scores:
        found = select("top_r", of_layer, rank, seed=0)
        first = of_layer.argsort(descending=True, stable=True)[:rank].sort().values
        assert found.usable and torch.equal(found.chosen, first)
