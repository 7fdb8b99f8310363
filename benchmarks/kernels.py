"""Time of a training step by kind of kernel, from torch's profiler. Runs on the GPU if there is one.

python -m benchmarks.kernels --methods adamw,grass [--size 350m] [overrides, such as model.num_hidden_layers=2]
"""

import argparse
import json
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_time import WARM_UP, shape_of
from benchmarks.steps import METHODS, Steps, configuration
from pretrain.distributed.world import World

# Prefixes of kernel names. The first kind with a matching prefix counts; kernels without a match are "other".
KINDS = {
    "matmuls": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "gather and fold": ("aten::index", "aten::embedding"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "aten::lerp"),
    "norm of the gradient": ("aten::linalg_vector_norm",),
    "loss": ("aten::_log_softmax", "aten::nll_loss"),
    "elementwise operations": (
        "aten::mul", "aten::add", "aten::div", "aten::neg", "aten::silu", "aten::cat", "aten::copy_", "aten::fill_",
        "aten::zero_", "aten::pow", "aten::sum", "aten::mean", "aten::rsqrt",
    ),
}  # fmt: skip


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, by its name."""
    return next((kind for kind, names in KINDS.items() if kernel.startswith(names)), "other")


def measure(method: str, rank: int, overrides: list[str], steps: int) -> Counter[str]:
    """Return the mean seconds per step by kind of kernel (see ``kind_of``), over ``steps`` steps after a warm-up."""
    config, _ = configuration(method, rank, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = iter(Steps(config, World(rank=0, size=1, device=device), lora_rank=rank if method == "lora" else None))
    for _ in range(WARM_UP):
        next(made)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]) as seen:
        for _ in range(steps):
            next(made)
    spent = Counter[str]()
    for kernel in seen.key_averages():
        microseconds = kernel.self_device_time_total if device.type == "cuda" else kernel.self_cpu_time_total
        spent[kind_of(kernel.key)] += microseconds / 1e6 / steps
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the training command")
    parser.add_argument("--size", default="350m", help="model size, or one block such as 1b_block (default 350m)")
    parser.add_argument("--methods", default="adamw,grass", help=f"from {', '.join(METHODS)} (default %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="rank of all methods that have one (default 128)")
    parser.add_argument("--steps", type=int, default=10, help="steps to profile (default 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    overrides = [*shape_of(arguments.size, batch=4, seq_len=256), *arguments.overrides]
    found = {m: measure(m, arguments.rank, overrides, arguments.steps) for m in arguments.methods.split(",")}
    if arguments.json:
        print(json.dumps(found))
        return
    table = Table("kernels, ms per step", *found)
    for kind in [*KINDS, "other"]:
        table.add_row(kind, *(f"{s[kind] * 1e3:,.1f} ({s[kind] / s.total():.1%})" for s in found.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
