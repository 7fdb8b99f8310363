"""The split of the trained rows between layers, by hand and against the total that it has to keep."""

import pytest

from models.rank_split import split_ranks, weighted_shares


def test_shares_follow_the_weights_and_what_is_full_leaves_the_rest_to_the_others():
    assert weighted_shares({"a": 0.5, "b": 0.5}, {"a": 100, "b": 300}, {"a": 1, "b": 1}) == {"a": 0.5, "b": 0.5}
    assert weighted_shares({"a": 0.25, "b": 0.25}, {"a": 100, "b": 200}, {"a": 4, "b": 1}) == {"a": 0.5, "b": 0.125}
    # 200 of 400 elements, level 200 / 700: a would train 1.14 of its rows. It trains all 100, b 100 of 300.
    full = weighted_shares({"a": 0.5, "b": 0.5}, {"a": 100, "b": 300}, {"a": 4, "b": 1})
    assert full == {"a": 1.0, "b": pytest.approx(1 / 3)}
    assert weighted_shares({"a": 1.0, "b": 1.0}, {"a": 100, "b": 300}, {"a": 4, "b": 1}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4])
def test_ranks_of_a_real_block_train_as_much_as_before_in_multiples_of_8(share):
    sizes = {"attention": (1024, 4 * 1024), "mlp": (1024, 3 * 2736)}
    before = {name: int(share * rows) for name, (rows, _) in sizes.items()}
    ranks = split_ranks(before, sizes, {"attention": 4.0, "mlp": 1.0})

    def total(of):
        return sum(of[name] * length for name, (_, length) in sizes.items())

    assert all(rank % 8 == 0 for rank in ranks.values())
    assert total(ranks) == pytest.approx(total(before), rel=0.03)
    assert ranks["attention"] == pytest.approx(min(1024, 4 * ranks["mlp"]), abs=16)
