"""How many matrices go into a stack, worked by hand."""

import torch

from models.stacking import stack_size

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_stacks_by_elements_and_evenly_and_a_cpu_always_four():
    assert [stack_size(n, 10, CPU) for n in (1, 4, 5, 100)] == [4, 4, 4, 4]
    assert stack_size(100, 2**20, GPU) == 15  # 7 stacks, of which the last has ten
    assert stack_size(17, 2**20, GPU) == 9  # not sixteen and one
    assert stack_size(15, 2**20, GPU) == 15
    assert stack_size(3, 2**25, GPU) == 1  # each is more than a stack
