"""The norm-growth limiter, against numbers worked by hand."""

import pytest
import torch
from torch import nn

from optim.norm_growth import NormGrowthLimiter


def test_a_norm_may_grow_by_the_limit_and_shrink_as_it_likes():
    big, small = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    limiter = NormGrowthLimiter([big, small], limit=1.5)

    def limited(first, second):
        big.grad, small.grad = torch.tensor(first), torch.tensor(second)
        limiter()
        return big.grad.tolist(), small.grad.tolist()

    assert limited([3.0, 4.0], [0.0, 2.0]) == ([3.0, 4.0], [0.0, 2.0])  # norms 5 and 2: nothing to compare with
    # 20 is more than 1.5 · 5 = 7.5 and comes down to it; 2.5 is less than 1.5 · 2 = 3 and stays.
    first, second = limited([12.0, 16.0], [1.5, 2.0])
    assert first == pytest.approx([4.5, 6.0]) and second == [1.5, 2.0]
    assert limiter.norms.tolist() == pytest.approx([7.5, 2.5])
    first, second = limited([0.6, 0.8], [30.0, 40.0])
    assert first == pytest.approx([0.6, 0.8]) and second == pytest.approx([2.25, 3.0])


def test_a_gradient_of_zero_neither_breaks_nor_freezes_later_steps():
    p = nn.Parameter(torch.zeros(2))
    limiter = NormGrowthLimiter([p], limit=1.01)
    for gradient in ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [3.0, 4.0]):
        p.grad = torch.tensor(gradient)
        limiter()
        assert p.grad.isfinite().all()
    assert p.grad.norm() > 0
