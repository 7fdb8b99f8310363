"""Check that the machine can train: torch is new enough, and can use the GPUs.

    python -m pretrain.cli.machine            print the version of this Python's torch, if it is new enough
    python -m pretrain.cli.machine VERSION    the same for a version that is not installed yet

scripts/setup_env.sh runs this before there is an environment, so only the standard library is imported at the top.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

OLDEST_TORCH = (2, 11)
ON_THE_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
# The oldest driver for each major version of CUDA: docs.nvidia.com/deploy/cuda-compatibility.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def require_torch(found: str) -> None:
    """Raises ValueError if the version ``found``, such as 2.13.0+cu130, is older than the oldest supported version."""
    major, minor = re.findall(r"\d+", f"{found}.0")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ValueError(
            f"torch {found} is too old ({oldest} or newer is needed); ./launch.sh without GRASS_TORCH installs it"
        )


def require_installed_torch() -> None:
    """Raises ValueError if the torch that this Python imports is older than the oldest supported version."""
    import torch

    require_torch(torch.__version__)


def require_usable_gpus() -> None:
    """Refuse to train on the CPU of a machine with GPUs, unless CUDA_VISIBLE_DEVICES selects no GPU.

    nvidia-smi runs only if torch finds no GPU.

    Raises:
        ValueError: nvidia-smi finds GPUs, but torch cannot use any of them, or the driver was updated and the machine
            not restarted; with the likely cause and the fix.
    """
    import torch

    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or (wanted is not None and not re.match(r"\s*(\d|GPU-|MIG-)", wanted)):
        return
    count, driver = _driver()
    if not count:
        return
    cuda = torch.version.cuda
    built = f"built for CUDA {cuda}" if cuda else "a build without CUDA"
    of_wanted = f" of CUDA_VISIBLE_DEVICES={wanted}" if wanted else ""
    reason, fix = _reason_and_fix(driver, cuda)
    raise ValueError(
        f"torch {torch.__version__}, {built}, can use no GPU{of_wanted}, but nvidia-smi lists {count} "
        f"(driver {driver}{reason}); {fix}, or {ON_THE_CPU}"
    )


def _reason_and_fix(driver: str, cuda: str | None) -> tuple[str, str]:
    """Why a torch built for ``cuda`` does not run on ``driver``, to follow the driver's version, and the fix."""
    major = int(driver.partition(".")[0])
    fits = max((family for family, oldest in OLDEST_DRIVER.items() if oldest <= major), default=None)
    another = f"install a torch built for CUDA {fits} (docs/setup.md)" if fits else ""
    if cuda is None:
        return "", another or "update the driver"
    needed = OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if major < needed:
        return f", but CUDA {cuda} needs {needed} or newer", ", or ".join(filter(None, ["update the driver", another]))
    return f", error of CUDA: {_error_of_cuda()}", "fix the cause of this error"


def _error_of_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "this process has no GPU"


def _driver() -> tuple[int, str]:
    """The number of GPUs and the driver version, from nvidia-smi; (0, "") without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, ""
    if "version mismatch" in printed:  # the driver was updated, and the machine was not restarted
        raise ValueError(f"nvidia-smi cannot use the driver ({printed.strip()}); restart the machine, or {ON_THE_CPU}")
    drivers = re.findall(r"^\d+(?:\.\d+)+$", printed, re.M)  # one line per GPU; without a GPU a message
    return len(drivers), drivers[0] if drivers else ""


def main() -> None:
    try:
        found = sys.argv[1] if len(sys.argv) > 1 else version("torch")
        require_torch(found)
    except PackageNotFoundError:
        sys.exit(f"{sys.executable} has no torch; install torch for it, or set PYTHON to an interpreter with torch")
    except ValueError as error:
        sys.exit(str(error))
    print(found)


if __name__ == "__main__":
    main()
