"""Commands answer --help, wrong settings and finished runs without importing torch, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pretrain.checkpoint.directory import seal
from pretrain.cli.ranks import on_one_node_from_env
from pretrain.config.compose import load
from pretrain.runs.folder import RunFolder

COMMANDS = [
    *(f"pretrain.{name}" for name in ("train", "launch", "preflight", "sweep", "estimate")),
    *(f"pretrain.{name}" for name in ("evaluate", "generate", "export", "report")),
    *(f"data.{name}" for name in ("prepare", "inspect", "train_tokenizer")),
]
# Runs a module as a command; the last line on standard error says whether torch was imported.
RUN = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("with torch" if "torch" in sys.modules else "without torch", file=sys.stderr)
"""


def run(root: Path, module: str, *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines on standard error."""
    command = [sys.executable, "-c", RUN, module, *arguments]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout, result.stderr.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(root, command):
    code, out, err = run(root, command, "--help")
    assert (code, err) == (0, ["without torch"]) and command in out


@pytest.mark.parametrize("package", ["pretrain/cli", "pretrain/config"])
def test_the_command_line_and_the_configuration_import_no_torch(root, package):
    modules = [str(file.relative_to(root).with_suffix("")).replace("/", ".") for file in (root / package).glob("*.py")]
    imports = "; ".join(f"import {module.removesuffix('.__init__')}" for module in modules)
    check = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=root, timeout=60).returncode == 0


@pytest.mark.parametrize("command", ["train", "preflight", "estimate", "sweep"])
def test_a_wrong_setting_is_reported_before_torch_is_imported(root, command):
    code, out, err = run(root, f"pretrain.{command}", "train.stepz=1")
    assert (code, out) == (2, "") and "did you mean train.steps?" in err[0] and err[-1] == "without torch"


@pytest.fixture
def finished(tmp_path):
    """Settings of a run that has come to its end, as far as its folder says."""
    overrides = ["data.paths=[absent]", "run.name=try", "train.steps=2", "optim.warmup_steps=1", f"run.root={tmp_path}"]
    config = load(overrides)
    folder = RunFolder(config)
    checkpoint = folder.checkpoints / "step-00000002"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, {"step": 2, "seconds": 1.0, "training_seconds": 1.0, "data": {}}, {})
    folder.config_file.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    folder.summary_file.write_text("{}")
    return overrides


@pytest.mark.parametrize(("command", "code"), [("train", 0), ("preflight", 86)])
def test_a_finished_run_is_reported_before_torch_is_imported(root, finished, tmp_path, command, code):
    message = f"{tmp_path}/try is finished at step 2; raise train.steps or choose a new run.name"
    for fewer in ((), ("train.steps=1",)):
        assert run(root, f"pretrain.{command}", *finished, *fewer) == (code, "", [message, "without torch"])
    code, _, err = run(root, f"pretrain.{command}", *finished, "train.seed=1")
    assert (code, err[-2:]) == (2, ["train.seed was 0, is now 1", "without torch"])


def test_processes_on_several_nodes_ask_the_main_process_whether_the_run_is_finished(finished, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not on_one_node_from_env()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert on_one_node_from_env() and RunFolder(load(finished)).report_if_finished(load(finished))
