"""What a step costs, in exact numbers: products, kernels, allocations, and waits for the device."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.steps import Steps, configuration
from pretrain.distributed.world import World
from tests.helpers import Allocations

TINY = [
    "model=llama_nano", "model.hidden_size=64", "model.intermediate_size=160", "model.num_attention_heads=2",
    "model.vocab_size=32", "data.vocab_size=32", "train.seq_len=8", "train.tokens_per_step=8",
]  # fmt: skip
# Steps 3, 7, … refresh all blocks, by scores.
TOGETHER = ["optim.selection=top_r", "optim.stagger=false", "optim.refresh_every=4", "optim.probe_steps=1"]
NO_KERNELS = ("_unsafe_view.default", "promote_types.default")

REGULAR = "optim.refresh_every=8"  # the steps that are looked at start no probes
LINEARS = 7  # of a block

# What waits for a GPU: copies to the host, Python numbers, and results whose size depends on values.
WAITS = {
    "cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "argwhere", "unique",
    "bincount", "masked_select", "equal", "allclose", "repeat_interleave",
}  # fmt: skip
WAITING_KERNELS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "bincount")


def steps_of(method, *overrides):
    """A tiny model, its first two steps made."""
    config, _ = configuration(method, 8, [*TINY, *(TOGETHER if method.startswith("grass") else []), *overrides])
    steps = Steps(config, World(rank=0, size=1, device=torch.device("cpu")))
    made = iter(steps)
    next(made), next(made)
    return steps


class Calls(TorchFunctionMode):
    """Notes what Python calls on tensors that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        # A copy from pageable memory, where a device is asked for: what stays on the host goes through pinned memory.
        made_from_python = name in ("tensor", "as_tensor") and "device" in (kwargs or {})
        leaves = name == "to" and "cpu" in args[1:]  # by that name: the run's own device comes as a torch.device
        masked = name in ("__getitem__", "__setitem__") and getattr(args[1], "dtype", None) == torch.bool
        if name in WAITS or made_from_python or leaves or masked:
            self.waits.append(resolve_name(func) or name)
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Counts the operations that launch something: no views, and no questions about dtypes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and not func.is_view and func.__name__ not in NO_KERNELS:
            self.counts[str(func).removeprefix("aten.")] += 1
        return func(*args, **(kwargs or {}))


def waits_of(steps):
    with Calls() as calls, Kernels() as kernels:
        steps.train_step(steps.batch)
    return calls.waits + [name for name in kernels.counts if name.startswith(WAITING_KERNELS)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamw", []),
        ("grass", []),
        ("grass+muon", []),
        ("grass+head", ["optim.clip=0", "train.step_in_backward=true"]),
        ("grass", ["train.dtype=bfloat16"]),
        ("grass", ["train.dtype=bfloat16", "optim.state_dtype=bfloat16"]),
    ],
)
def test_a_step_that_neither_logs_nor_refreshes_never_waits_for_the_device(method, options):
    steps = steps_of(method, *options)
    assert waits_of(steps) == []
    if method != "adamw":
        assert steps.optim.grass.steps == 3 and all(
            layer.probe is not None for layer in steps.optim.grass.layers.values()
        )
        assert "cpu" in " ".join(waits_of(steps))  # the refresh, which chooses on the CPU


def test_a_grass_layer_is_products_gathers_and_what_adds_them_up():
    """All of them kernels that CUDA has fast ones for."""
    steps = steps_of("grass", REGULAR)
    layer = next(iter(steps.optim.grass.layers.values()))
    with Kernels() as kernels:
        layer(torch.randn(8, 64, requires_grad=True)).sum().backward()
        layer.fold()
    assert set(kernels.counts) - {"randn.default", "sum.default", "ones_like.default"} == {
        "mm.default", "index_select.default", "index_copy_.default",
    }  # fmt: skip
    assert kernels.counts["mm.default"] == 3


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_optimizer_s_step_launches_one_kernel_for_each_linear_and_six_in_all(blocks):
    """Fused AdamW takes two for each group, whatever is in it; the fold one for each layer of Grass."""
    steps = steps_of("grass", f"model.num_hidden_layers={blocks}", REGULAR)
    steps.train_step.accumulate(steps.batch)
    with Kernels() as kernels:
        steps.optim.optimizer.step()
    assert kernels.counts == {
        "_foreach_add_.Scalar": 3,
        "_fused_adamw_.default": 3,
        "index_copy_.default": LINEARS * blocks,
    }


def muon_kernels(blocks):
    steps = steps_of("grass+muon", f"model.num_hidden_layers={blocks}", REGULAR)
    steps.train_step.accumulate(steps.batch)
    with Kernels() as kernels:
        steps.optim.optimizer.step()
    return sum(kernels.counts.values())


def test_muon_s_kernels_grow_by_35_for_each_stack_of_matrices():
    """On a CPU that is for each four of one shape; and by the fold's, one for each layer."""
    assert muon_kernels(12) - muon_kernels(8) == 4 * LINEARS + LINEARS * 35


@pytest.mark.parametrize(("method", "score"), [("grass+head", "sketch"), ("grass+muon", "sketch"), ("grass", "exact")])
def test_no_step_makes_a_tensor_as_large_as_a_weight(method, score):
    """A probed step and one with a refresh among them, with the optimizer's; only exact scores form a gradient."""
    steps = steps_of(method, f"optim.score={score}", "optim.sketch_width=4", "model.num_hidden_layers=1")
    with Allocations() as made:
        for _ in range(4):
            steps.train_step(steps.batch)
    smallest = min(layer.weight.numel() for layer in steps.optim.grass.layers.values())
    assert smallest == (32 * 64 if method == "grass+head" else 64 * 64)
    largest = {shape for shape in made.shapes if torch.Size(shape).numel() >= 64 * 64}
    assert bool(largest) == (score == "exact")


def test_the_products_of_forward_backward_and_refresh_in_exact_numbers():
    """For 8 tokens through 4 blocks of 64 with an MLP of 160, rank 8 and a sketch of 16, head in full."""
    steps = steps_of("grass")
    tokens, linears, head, attention = 8, 4 * (4 * 64 * 64 + 3 * 64 * 160), 64 * 32, 4 * 2 * 8 * 64

    def products(work):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            result = work()
        return counter.get_total_flops(), result

    (inputs, targets), layers = steps.batch[0], steps.optim.grass.layers.values()
    grass = steps.optim.grass
    assert not grass.schedule.probing(grass.steps)
    forward, loss = products(lambda: steps.model(inputs, targets))
    assert forward == 2 * tokens * (linears + head + attention)
    backward, _ = products(loss.backward)
    assert backward == 2 * tokens * (linears + linears * 8 // 64 + 2 * head + 2 * attention)
    steps.train_step(steps.batch)  # the step before the one that is probed
    probed, _ = products(lambda: steps.train_step(steps.batch))  # with the refresh that follows it
    sketches = sum(2 * tokens * 16 * (layer.in_features + layer.out_features) for layer in layers)
    assert probed == forward + backward + sketches
