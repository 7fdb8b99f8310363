"""How many matrices go into a stack, worked by hand."""

import torch

from models.stacking import stack_size

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_stacks_by_elements_and_evenly_and_a_cpu_always_four():
    assert [stack_size(n, 10, CPU) for n in (1, 4, 5, 100)] == [4, 4, 4, 4]
    assert stack_size(100, 2**20, GPU) == 8  # 13 stacks, of which the last has four
    assert stack_size(9, 2**20, GPU) == 5  # not eight and one
    assert stack_size(7, 2**20, GPU) == 7
    assert stack_size(3, 2**24, GPU) == 1  # each is more than a stack
