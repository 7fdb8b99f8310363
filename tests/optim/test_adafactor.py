"""Adafactor's step for a GPU against torch's own, on the CPU."""

import copy

import pytest
import torch

from optim import adafactor
from optim.adafactor import Adafactor
from tests.pretrain.training.test_step_cost import WAITING_KERNELS, Calls, Kernels

OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "d": 1.5}


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 24), (16,), (3, 8, 5), ()]
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def give_gradients(held, step):
    generator = torch.Generator().manual_seed(step)
    for p in held:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** (step % 3)


def step_as_on_a_gpu(optimizer):
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer._update(p, p.grad, group, norms_on_host=False)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("chunk", [2**24, 50])
def test_the_step_for_a_gpu_is_torch_s(dtype, tolerance, chunk, monkeypatch):
    """In bfloat16 to a spacing of the numbers."""
    monkeypatch.setattr(adafactor, "CHUNK", chunk)
    theirs, ours = parameters(dtype), parameters(dtype)
    reference, optimizer = torch.optim.Adafactor(theirs, **OPTIONS), Adafactor(ours, **OPTIONS)
    for step in range(8):
        give_gradients(theirs, step), give_gradients(ours, step)
        reference.step(), step_as_on_a_gpu(optimizer)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        assert optimizer.state[b].keys() == reference.state[a].keys()
        for name, value in reference.state[a].items():
            torch.testing.assert_close(optimizer.state[b][name], value, rtol=tolerance, atol=0)


def test_on_a_cpu_the_step_is_torch_s_to_the_bit():
    theirs = parameters(torch.float32)
    ours = copy.deepcopy(theirs)
    for held, cls in ((theirs, torch.optim.Adafactor), (ours, Adafactor)):
        optimizer = cls(held, **OPTIONS)
        for step in range(3):
            give_gradients(held, step)
            optimizer.step()
    assert all(map(torch.equal, theirs, ours))


def test_hooks_run_once_also_where_torch_s_own_has_been_made():
    """Torch gives the step of a class its hooks when the first of that class is made: a step that called it had two."""
    held, calls = parameters(torch.float32), []
    torch.optim.Adafactor(parameters(torch.float32))
    optimizer = Adafactor(held)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    give_gradients(held, 0)
    optimizer.step()
    assert calls == ["pre"]


def test_the_step_for_a_gpu_never_asks_the_device_for_a_number():
    held = parameters(torch.float32)
    optimizer = Adafactor(held, **OPTIONS)
    give_gradients(held, 0)
    step_as_on_a_gpu(optimizer)
    with Calls() as calls, Kernels() as kernels:
        step_as_on_a_gpu(optimizer)
    asked = [name for name in calls.waits if "item" not in name]  # of its own count, which is on the host
    assert asked == [] and calls.waits.count("torch.Tensor.item") == len(held)
    assert kernels.counts["_local_scalar_dense.default"] == len(held)
    assert not [k for k in kernels.counts if k.startswith(WAITING_KERNELS) and k != "_local_scalar_dense.default"]
