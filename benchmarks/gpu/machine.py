"""The machine, its optional packages, and its limits: the speed of copies and of a large matmul."""

import os
import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.bench import GIB, NEEDS_GPU, Bench, lacks

# Modules to import, and the name of their package.
OPTIONAL = {
    "galore_torch": "galore-torch", "torchao": "torchao", "flash_attn.flash_attn_interface": "flash-attn (2)",
    "flash_attn_interface": "flash-attn (3)", "flash_attn.cute": "flash-attn (4)",
    "torch.nn.attention.varlen": "torch's varlen_attn",
}  # fmt: skip


def run(bench: Bench, case: str) -> None:
    bench.add(
        what="machine", **bench.about(), gpu_gib=gpu_gib(bench), driver=driver(),
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version() if bench.on_gpu else None,
        python=platform.python_version(), platform=platform.platform(), cpus=os.cpu_count(),
    )  # fmt: skip
    for module, package in OPTIONAL.items():
        if missing := lacks(module, package):
            bench.add(what="optional package", package=package, lacks=missing)
        else:
            bench.add(what="optional package", package=package, version=_version(module))
    _ceilings(bench)


def gpu_gib(bench: Bench) -> float | None:
    """Return the memory of the GPU in GiB, or None without a GPU."""
    return torch.cuda.get_device_properties(bench.device).total_memory / GIB if bench.on_gpu else None


def driver() -> str | None:
    """Return the version of NVIDIA's driver as the kernel reports it, or None if the driver is not loaded."""
    try:
        with open("/sys/module/nvidia/version") as file:
            return file.read().strip()
    except OSError:
        return None


def _version(module: str) -> str:
    try:
        return version(module.partition(".")[0])
    except PackageNotFoundError:
        return "unknown"


def _ceilings(bench: Bench) -> None:
    size = 2**20 if bench.dry else 2**30
    source = torch.zeros(size, dtype=torch.int32, device=bench.device)
    with bench.row(what="copy on the device") as row:
        target = torch.empty_like(source)
        row["tb_per_s"] = 2 * 4 * size / bench.ms(partial(target.copy_, source)) / 1e9  # each byte is read and written
    with bench.row(what="copy to the host's pinned memory") as row:
        if bench.on_gpu:
            part = source[: size // 4]
            host = torch.empty(len(part), dtype=part.dtype, pin_memory=True)
            row["gb_per_s"] = 4 * len(part) / bench.ms(partial(host.copy_, part, non_blocking=True)) / 1e6
        else:
            row["skipped"] = NEEDS_GPU
    n = 128 if bench.dry else 8192
    x, y = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    with bench.row(what=f"bf16 matmul of {n} × {n} matrices") as row:
        row["tflop_per_s"] = 2 * n**3 / bench.ms(lambda: x @ y) / 1e9
