"""What is made ahead is what was asked for, and is there when it is asked for."""

import threading
import time

import pytest
import torch

from data.loading.prefetch import Prefetch


def test_batches_are_those_of_the_step_asked_for_whatever_the_order():
    prefetch = Prefetch(lambda step: ((torch.tensor([step, i]), torch.tensor(i)) for i in range(3)))
    for step in (0, 1, 2, 7, 8, 3, 3, 4):
        batches = prefetch(step)
        assert [(a.tolist(), int(b)) for a, b in batches] == [([step, i], i) for i in range(3)]
    prefetch.close()


def test_the_next_step_is_made_while_this_one_is_at_work():
    made = {step: threading.Event() for step in range(4)}

    def make(step):
        time.sleep(0.1)
        made[step].set()
        return [(torch.tensor(step),)]

    prefetch = Prefetch(make)
    prefetch(0)
    assert made[1].wait(10)  # nobody asked for it yet
    assert 0.1 <= prefetch.lap() < 5
    prefetch(1)
    assert prefetch.lap() < 0.05
    prefetch.close()


def test_an_error_is_raised_by_the_step_it_is_in():
    def make(step):
        if step == 1:
            raise OSError("input/output error")
        return [(torch.tensor(step),)]

    prefetch = Prefetch(make)
    assert int(prefetch(0)[0][0]) == 0
    with pytest.raises(OSError, match="input/output error"):
        prefetch(1)
    prefetch.close()
