"""A torch that is too old, and GPUs that torch cannot use, end a run before it begins; nvidia-smi is a script here."""

import os
import re
import subprocess
import sys

import pytest
import torch

from pretrain.cli.machine import OLDEST_TORCH, main, require_torch, require_usable_gpus

ON_THE_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on PATH that prints what it is given, and notes that it ran in the file that is returned."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(printed: str, exit_code: int = 0):
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f"#!/bin/sh\necho \"$*\" >>'{tmp_path}/calls'\ncat <<'END'\n{printed}\nEND\nexit {exit_code}\n"
        )
        script.chmod(0o755)
        return tmp_path / "calls"

    return put


@pytest.fixture
def cuda(monkeypatch):
    """Makes torch one that is built for the CUDA it is given, None for a build without, and finds no GPU."""

    def none_found():
        raise RuntimeError("CUDA driver initialization failed\nand more")

    def built_for(version):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", none_found)

    return built_for


@pytest.mark.parametrize("version", ["2.11", "2.11.0a0+git1.nv26.1", "2.11.0", "2.13.0+cpu", "2.20.1", "3.0"])
def test_the_supported_torches_are_taken(version):
    require_torch(version)


@pytest.mark.parametrize("version", ["2", "1.13.1", "2.9.1+cu128", "2.10.0"])
def test_an_older_torch_is_refused(version):
    with pytest.raises(ValueError, match=r"torch .* is too old \(2\.11 or newer is needed\)"):
        require_torch(version)


def test_the_command_names_the_torch_that_is_there_and_refuses_an_old_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["machine"])
    main()
    assert torch.__version__.startswith(capsys.readouterr().out.strip())
    monkeypatch.setattr(sys, "argv", ["machine", "2.10.0"])
    with pytest.raises(SystemExit, match=r"torch 2\.10\.0 is too old"):
        main()
    assert capsys.readouterr().out == ""


def test_the_torch_of_the_requirements_is_supported(root):
    (pin,) = (line for line in (root / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    require_torch(pin.removeprefix("torch=="))
    oldest = ".".join(map(str, OLDEST_TORCH))
    assert f"torch {oldest} " in (root / "README.md").read_text()
    assert f"GRASS_TORCH={oldest}.0 ./test.sh" in (root / "docs/setup.md").read_text()


@pytest.mark.parametrize(
    ("built", "driver", "mend"),
    [
        (
            None,
            "580.65.06",
            "a build without CUDA, can use no GPU, but nvidia-smi lists 2 (driver 580.65.06); ",
        ),
        (None, "580.65.06", "; install a torch built for CUDA 13 (docs/setup.md), or "),
        (None, "560.35", "; install a torch built for CUDA 12 (docs/setup.md), or "),
        (None, "390.157", "; update the driver, or "),
        ("13.0", "535.104.05", ", built for CUDA 13.0, can use no GPU, but nvidia-smi lists 2"),
        (
            "13.0",
            "535.104.05",
            ", but CUDA 13.0 needs 580 or newer); update the driver, or install a torch built for CUDA 12 ",
        ),
        (
            "12.6",
            "470.57.02",
            ", but CUDA 12.6 needs 525 or newer); update the driver, or install a torch built for CUDA 11 ",
        ),
        ("12.6", "535.104.05", ", error of CUDA: CUDA driver initialization failed); fix the cause of this error, or "),
        ("14.1", "600.1", ", error of CUDA: CUDA driver initialization failed); fix the cause of this error, or "),
    ],
)
def test_gpus_that_torch_cannot_use_are_told_with_the_mend(nvidia_smi, cuda, built, driver, mend):
    nvidia_smi(f"{driver}\n{driver}")
    cuda(built)
    with pytest.raises(ValueError) as error:
        require_usable_gpus()
    message = str(error.value)
    assert message.startswith(f"torch {torch.__version__}, ") and mend in message and message.endswith(ON_THE_CPU)
    assert "\n" not in message


@pytest.mark.parametrize("devices", ["", " ", "-1", "-1,0", "NoDevFiles"])
def test_whoever_hides_the_gpus_trains_on_the_cpu(nvidia_smi, cuda, monkeypatch, devices):
    calls = nvidia_smi("535.104.05")
    cuda(None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    require_usable_gpus()
    assert not calls.exists()


@pytest.mark.parametrize("devices", ["0", "1,0", "GPU-7d3f", "MIG-1a2b"])
def test_gpus_that_are_asked_for_by_name_must_be_usable(nvidia_smi, cuda, monkeypatch, devices):
    nvidia_smi("580.65.06")
    cuda("13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with pytest.raises(ValueError, match=f"no GPU of CUDA_VISIBLE_DEVICES={devices}, but nvidia-smi lists 1"):
        require_usable_gpus()


@pytest.mark.parametrize(
    ("printed", "exit_code"),
    [
        ("No devices were found", 6),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9),
        ("", 127),
    ],
)
def test_an_nvidia_smi_that_counts_no_gpu_is_no_obstacle(nvidia_smi, cuda, printed, exit_code):
    calls = nvidia_smi(printed, exit_code)
    cuda("13.0")
    require_usable_gpus()
    assert calls.read_text() == "--query-gpu=driver_version --format=csv,noheader\n"


def test_a_driver_that_was_updated_under_a_running_machine_is_told(nvidia_smi, cuda):
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", 18)
    cuda("13.0")
    with pytest.raises(ValueError, match=rf"version mismatch\); restart the machine, or {re.escape(ON_THE_CPU)}$"):
        require_usable_gpus()


def test_nvidia_smi_is_not_asked_where_torch_has_gpus(nvidia_smi, monkeypatch):
    calls = nvidia_smi("580.65.06")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_usable_gpus()
    assert not calls.exists()


def test_a_machine_without_nvidia_smi_is_no_obstacle(cuda, monkeypatch, tmp_path):
    cuda("13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    require_usable_gpus()


@pytest.mark.parametrize("module", ["pretrain.preflight", "pretrain.train"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPUs of this machine")
def test_a_run_ends_with_one_message_and_exit_code_2(nvidia_smi, root, module, tmp_path):
    nvidia_smi("390.157")
    overrides = ["data=text", f"data.paths=[{root / 'README.md'}]", "model.vocab_size=300", f"run.root={tmp_path}/runs"]
    command = [sys.executable, "-m", module, *overrides, f"data.root={tmp_path}/prepared", "logger.wandb.mode=disabled"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("error"))
    assert "can use no GPU, but nvidia-smi lists 1 (driver 390.157" in message and message.endswith(ON_THE_CPU)
    assert not (tmp_path / "runs").exists()
