"""launch.sh, test.sh and the environments that they make, with recorders instead of Python and pip."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

# Stands in for the base Python and for the one in .venv. Notes its arguments in $CALLS, without the two folders.
RECORDER = r"""#!/usr/bin/env bash
line="$*"
echo "${line//$PWD\//}" >>"$CALLS"
case "$*" in
*version_info*) exit "${TOO_OLD:-0}" ;;
*"import venv"*) exit "${NO_ENSUREPIP:-0}" ;;
*sysconfig*) echo "/base/site-packages" ;;
-V) echo "Python 3.8.1" ;;
"-m venv "*)
    venv=${@: -1}
    rm -rf "$venv" && mkdir -p "$venv"/{bin,lib/python3.11/site-packages} && cp "$0" "$venv/bin/python" ;;
"-m pretrain.cli.machine") echo "${BASE_TORCH:-2.12.0a0+nv26.1}" ;;
"-m pretrain.cli.machine 2.10"*) echo "torch 2.10 is too old" >&2 && exit 1 ;;
"-m pip install "*) echo "words of pip" && eval "${ON_PIP:-}" ;;
"-m pretrain.preflight"*) echo "$WORLD_SIZE processes" && eval "${ON_PREFLIGHT:-}" ;;
"-m pretrain.sweep"*) echo "$PET_NPROC_PER_NODE processes a job" ;;
"-m pretrain.launch"*) echo "$$ ${OMP_WAIT_POLICY:-unset} ${OMP_NUM_THREADS:-unset}" ;;
"-m ruff check"*) exit "${RUFF_EXIT:-0}" ;;
"-m pytest"*) echo "1 passed" ;;
esac
"""
MAKE_VENV = [
    "-c import sys; sys.exit(sys.version_info < (3, 10))",
    "-c import venv, ensurepip",
    "-m venv --clear --without-pip .venv",
    "-m ensurepip --default-pip",
]
INSTALL = "-m pip install --quiet --no-input --disable-pip-version-check --requirement=requirements.txt"
PREFLIGHT = "-m pretrain.preflight"
TRAIN = "-m pretrain.launch --nproc-per-node 1 -m pretrain.train"


class Tree:
    """A copy of the scripts in a folder with a space in its name, where Python, pip and the GPUs are not real."""

    def __init__(self, root: Path, folder: Path):
        self.folder, self.home = folder / "a tree", folder
        for name in ("launch.sh", "test.sh", ".ci/run", "scripts/setup_env.sh"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, self.folder / name)
        for file in root.glob("requirements*.txt"):
            shutil.copy(file, self.folder)
        (folder / "bin").mkdir()
        self.script("python3", RECORDER)
        self.script("nvidia-smi", '#!/bin/sh\nfor i in $GPUS; do echo "GPU $i: Some (UUID: GPU-$i)"; done\n')

    def script(self, name: str, text: str) -> None:
        file = self.home / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def start(self, *arguments: str, script: str = "launch.sh", **env: str) -> subprocess.Popen:
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        (self.home / "calls").write_text("")
        return subprocess.Popen(
            [self.folder / script, *arguments],
            cwd=self.home,
            env={"PATH": path, "CALLS": str(self.home / "calls")} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **options: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    @property
    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().splitlines()


@pytest.fixture
def tree(root, tmp_path):
    return Tree(root, tmp_path)


@pytest.fixture
def ready(tree):
    """A tree that is set up."""
    assert tree.run()[0] == 0
    return tree


def test_the_first_run_sets_up_and_the_second_does_not(tree):
    code, _, err = tree.run("train.steps=3", "run.name=two words")
    overrides = " train.steps=3 run.name=two words"
    assert code == 0
    assert tree.calls == [*MAKE_VENV, INSTALL, PREFLIGHT + overrides, TRAIN + overrides]
    assert [line.split()[0] for line in err.splitlines()] == ["Making", "Installing"]
    assert tree.run("train.steps=3", "--cfg", "job")[::2] == (0, "")
    assert tree.calls == ["-m pretrain.train train.steps=3 --cfg job"]


def test_python_takes_the_place_of_the_script(ready):
    process = ready.start()
    assert process.communicate(timeout=30)[0].splitlines()[1].split()[0] == str(process.pid)


def test_changed_requirements_are_installed_and_a_touched_file_is_not(ready):
    requirements = ready.folder / "requirements.txt"
    os.utime(requirements, (1, 1))
    ready.run()
    assert ready.calls == [PREFLIGHT, TRAIN]
    requirements.write_text(requirements.read_text() + "another\n")
    ready.run()
    assert ready.calls == ["-m pip --version", INSTALL, PREFLIGHT, TRAIN]


def test_a_set_up_that_was_killed_is_started_afresh(tree):
    assert tree.run(ON_PIP="kill -KILL $$")[0] == 1
    assert tree.run()[0] == 0
    assert tree.calls == [*MAKE_VENV, INSTALL, PREFLIGHT, TRAIN]


def test_a_pip_that_fails_has_the_last_word_and_is_tried_again(tree):
    code, _, err = tree.run(ON_PIP="exit 1")
    assert code == 1 and "words of pip\n" in err and "pip could not install requirements.txt" in err
    assert tree.calls[-1] == INSTALL
    assert tree.run()[0] == 0
    assert tree.calls == ["-m pip --version", INSTALL, PREFLIGHT, TRAIN]


def test_a_venv_made_by_hand_is_kept(tree):
    (tree.folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(tree.home / "bin/python3", tree.folder / ".venv/bin/python")
    assert tree.run()[0] == 0
    assert tree.calls == ["-m pip --version", INSTALL, PREFLIGHT, TRAIN]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TOO_OLD": "1"}, "Python 3.10 or newer is needed, and python3 is Python 3.8.1"),
        ({"NO_ENSUREPIP": "1"}, "apt install python3-venv"),
        ({"PYTHON": "no-such-python"}, "there is no no-such-python: install Python 3.10 or newer"),
        ({"NPROC": "two"}, "NPROC must be a positive number, not 'two'"),
        ({"NNODES": "1-2"}, "NNODES must be a number or a range like 2:4, not '1-2'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tree, env, message):
    code, out, err = tree.run(**env)
    assert (code, out) == (1, "")
    assert err.startswith("launch.sh: ") and err.count("\n") == 1 and message in err
    assert not (tree.folder / ".venv").exists()


def test_bad_settings_end_the_run_before_any_process_starts(ready):
    assert ready.run("x=1", ON_PREFLIGHT="echo 'no key x' >&2; exit 2") == (2, "1 processes\n", "no key x\n")
    assert ready.calls == [PREFLIGHT + " x=1"]


def test_a_finished_run_starts_no_process(ready):
    assert ready.run(ON_PREFLIGHT="exit 86")[0] == 0
    assert ready.calls == [PREFLIGHT]


def test_the_settings_are_checked_for_as_many_processes_as_there_will_be(ready):
    assert ready.run(NNODES="2:3", NPROC="4")[1].startswith("12 processes\n")


def test_a_signal_ends_the_preparation_too(ready):
    # Everything that holds on to the output must be gone for communicate() to return.
    process = ready.start(ON_PREFLIGHT="exec sleep 60")
    while ready.calls != [PREFLIGHT]:
        time.sleep(0.02)
    time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert ready.calls == [PREFLIGHT]


@pytest.mark.parametrize(
    ("env", "processes"),
    [
        ({"GPUS": ""}, 1),
        ({"GPUS": "0 1 2 3"}, 4),
        ({"GPUS": "0 1 2 3", "NPROC": "2"}, 2),
        ({"GPUS": "", "NPROC": "2"}, 2),
        ({"GPUS": "0 1 2 3", "CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"GPUS": "0 1 2 3", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2,GPU-3"}, 3),
        ({"GPUS": "0 1 2 3", "CUDA_VISIBLE_DEVICES": "3,-1,0"}, 1),
        ({"GPUS": "0 1 2 3", "CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"GPUS": "0 1 2 3", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 1),
        ({"GPUS": "0", "CUDA_VISIBLE_DEVICES": "0,1,2"}, 1),
        ({"GPUS": "", "CUDA_VISIBLE_DEVICES": "0,1"}, 1),
        ({"GPUS": "0", "CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, 2),
    ],
)
def test_there_is_one_process_per_visible_gpu_or_as_many_as_asked_for(ready, env, processes):
    assert ready.run(**env)[0] == 0
    assert ready.calls[-1] == TRAIN.replace("1", str(processes))


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_is_started_outside_torchrun_and_told_the_processes_of_a_job(ready, flag):
    assert ready.run(flag, "optim.rank=4,8", NPROC="2")[:2] == (0, "2 processes a job\n")
    assert ready.calls == [f"-m pretrain.sweep {flag} optim.rank=4,8"]
    code, _, err = ready.run(flag, NNODES="2")
    assert code == 1 and "a sweep starts on one node" in err


def test_torchruns_variables_become_its_flags(ready):
    node = {"NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    ready.run(NNODES="2", **node)
    flags = "--nnodes 2 --node-rank 1 --master-addr host --master-port 29500"
    assert ready.calls[-1] == TRAIN.replace("1 ", f"1 {flags} ")
    ready.run(NNODES="1:4", RDZV_ENDPOINT="host:1234", RDZV_ID="job", MAX_RESTARTS="3")
    flags = "--nnodes 1:4 --rdzv-backend c10d --rdzv-endpoint host:1234 --rdzv-id job --max-restarts 3"
    assert ready.calls[-1] == TRAIN.replace("1 ", f"1 {flags} ")
    ready.run(**node)  # a single node needs no address, and a port could be taken
    assert ready.calls[-1] == TRAIN


def test_on_a_cpu_the_processes_share_the_cores(ready):
    ready.script("nproc", "#!/bin/sh\necho 12\n")
    for env, threads in [
        ({}, "PASSIVE 12"),
        ({"NPROC": "5"}, "PASSIVE 2"),
        ({"NPROC": "16"}, "PASSIVE 1"),
        ({"NPROC": "5", "OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE 7"),
        ({"GPUS": "0"}, "unset unset"),
    ]:
        assert ready.run(**env)[1].endswith(f" {threads}\n"), env


def test_nothing_optional_is_installed_for_a_gpu(tree):
    assert tree.run(GPUS="0 1")[0] == 0
    assert [call for call in tree.calls if "pip install" in call] == [INSTALL]
    tree.run(GPUS="0 1")
    assert tree.calls == [PREFLIGHT, TRAIN.replace("1", "2")]


def of(torch: str, call: str) -> str:
    """``call`` for the environment of GRASS_TORCH=``torch``."""
    venv = f".venv-torch-{torch}"
    files = f"--requirement={venv}/requirements.txt --constraint={venv}/.torch"
    call = call.replace(".venv", venv).replace("--requirement=requirements.txt", files)
    return call + " torch" if "install" in call and torch != "installed" else call


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_another_torch_gets_an_environment_of_its_own(ready):
    pinned = {file.name: file.read_text() for file in (ready.folder / ".venv").glob(".installed-*")}
    assert ready.run(GRASS_TORCH="2.11.0")[0] == 0
    version_check = "-m pretrain.cli.machine 2.11.0"
    made = [of("2.11.0", call) for call in MAKE_VENV]
    assert ready.calls == [*made[:2], version_check, *made[2:], of("2.11.0", INSTALL), PREFLIGHT, TRAIN]
    venv = ready.folder / ".venv-torch-2.11.0"
    assert lines(venv / ".torch") == ["torch==2.11.0"]
    pins = lines(ready.folder / "requirements.txt")
    (torchs,) = (line for line in pins if line.startswith("torch=="))
    assert lines(venv / "requirements.txt") == [line for line in pins if line != torchs]
    ready.run(GRASS_TORCH="2.11.0")
    assert ready.calls == [PREFLIGHT, TRAIN]
    ready.run()
    assert ready.calls == [PREFLIGHT, TRAIN]
    assert {file.name: file.read_text() for file in (ready.folder / ".venv").glob(".installed-*")} == pinned


def test_the_torch_that_is_there_is_kept_whatever_is_installed_beside_it(tree):
    made = [of("installed", call) for call in MAKE_VENV]
    made[2] = made[2].replace("-pip ", "-pip --system-site-packages ")
    made.insert(3, '-c import sysconfig; print(sysconfig.get_path("platlib"))')
    look, install = [*made[:2], "-m pretrain.cli.machine"], of("installed", INSTALL)
    assert tree.run(GRASS_TORCH="installed")[0] == 0
    assert tree.calls == [*look, *made, install, PREFLIGHT, TRAIN]
    venv = tree.folder / ".venv-torch-installed"
    assert lines(venv / ".torch") == [f"torch==2.12.0a0+nv26.1 # of {tree.home / 'bin/python3'}"]
    assert not any("torch==" in line for line in lines(venv / "requirements.txt"))
    assert lines(venv / "lib/python3.11/site-packages/base.pth") == ["/base/site-packages"]
    tree.run(GRASS_TORCH="installed")
    assert tree.calls == [*look, PREFLIGHT, TRAIN]
    tree.run(GRASS_TORCH="installed", BASE_TORCH="2.13.0")  # another container
    assert tree.calls == [*look, "-m pip --version", *made, install, PREFLIGHT, TRAIN]
    assert not (tree.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        ("2.10.1", "torch 2.10 is too old\n"),
        ("../x", "launch.sh: GRASS_TORCH must be a version like 2.11.0, or installed, not '../x'\n"),
        ("==2.11", "launch.sh: GRASS_TORCH must be a version like 2.11.0, or installed, not '==2.11'\n"),
    ],
)
def test_a_torch_that_is_too_old_or_none_is_refused_before_anything_is_made(tree, torch, message):
    assert tree.run(GRASS_TORCH=torch) == (1, "", message)
    assert not list(tree.folder.glob(".venv*/"))


def test_an_environment_on_top_of_another_sees_its_torch_and_pip_leaves_that_alone(tree):
    """With this Python, whose torch is in an environment, as it may be on a cluster."""
    script = """
source scripts/setup_env.sh
create_venv
"$python" -m pip install --quiet --no-index --constraint "$venv/.torch" torch  # only one that is there will do
exec "$python" -c 'import importlib.util; print(importlib.util.find_spec("torch").origin)'
"""
    (tree.folder / "pretrain/cli").mkdir(parents=True)
    for name in ("__init__.py", "cli/__init__.py", "cli/machine.py"):
        shutil.copy(Path(__file__).resolve().parents[1] / "pretrain" / name, tree.folder / "pretrain" / name)
    env = {"PATH": os.environ["PATH"], "GRASS_TORCH": "installed", "PYTHON": sys.executable}
    options = {"cwd": tree.folder, "env": env, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run(["bash", "-ec", script], **options)
    assert (result.returncode, result.stdout) == (0, f"{torch.__file__}\n"), result.stderr
    assert lines(tree.folder / ".venv-torch-installed/.torch") == [f"torch=={version('torch')} # of {sys.executable}"]


def test_types_are_checked_for_the_pinned_torch_alone(tree):
    tree.run(script="test.sh")
    assert "-m mypy" in tree.calls
    assert tree.run(script="test.sh", GRASS_TORCH="2.11.0")[0] == 0
    assert "-m mypy" not in tree.calls and tree.calls[-1].startswith("-m pytest")


@pytest.mark.parametrize("script", ["test.sh", ".ci/run"])
def test_the_tests_run_last_and_any_failed_check_fails(tree, script):
    arguments = () if script == ".ci/run" else ("-k", "name")
    code, out, _ = tree.run(*arguments, script=script)
    assert code == 0 and out.endswith("1 passed\n")
    checks = ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    names = ("dev", "extra", "baselines", "sweep", "docs")
    optional = " ".join(f"--requirement=requirements-{name}.txt" for name in names)
    assert tree.calls[:6] == [*MAKE_VENV, f"{INSTALL} {optional}", checks[0]]
    assert tree.calls[6:8] == checks[1:] and "lint_imports" in tree.calls[8]
    on_all_cores = ("-n auto", "--maxprocesses 8", "--dist loadfile")
    assert tree.calls[9:] == [" ".join(["-m pytest -q", *(arguments or on_all_cores)])]
    code, out, err = tree.run(script=script, RUFF_EXIT="1")
    assert code == 1 and out.endswith("1 passed\n") and err == "FAILED before the tests: ruff check\n"
