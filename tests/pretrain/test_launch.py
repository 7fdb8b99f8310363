"""The launcher, with small scripts as workers."""

import contextlib
import os
import platform
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# A worker that notes its starts and the signals it gets in <folder>/<rank>, and obeys after a moment.
OBEDIENT = """
import os, pathlib, signal, sys, time
folder, code, moment = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rank = int(os.environ["RANK"])
notes = (folder / str(rank)).open("a", buffering=1)
def note(number, frame):
    print(signal.Signals(number).name, file=notes)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
print("started", sys.stdout.isatty(), file=notes)
while len((folder / str(rank)).read_text().splitlines()) < 1 + int(sys.argv[4]):
    time.sleep(0.02)
time.sleep(moment * (1 + rank))
sys.exit(code)
"""


class Launch:
    """``python -m pretrain.launch`` on a worker script."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder

    def command(self, script: str, *arguments: object, flags: tuple = (), processes: int = 2) -> list[str]:
        worker = self.folder / "worker.py"
        worker.write_text(script)
        flags = ("--nproc-per-node", processes, *flags)
        return [str(x) for x in (sys.executable, "-m", "pretrain.launch", *flags, worker, *arguments)]

    def start(self, *arguments: object, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "LOGLEVEL"} | {"OMP_NUM_THREADS": "1"} | (env or {})
        return subprocess.Popen(
            self.command(*arguments, **options),
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **options) -> tuple[int, str, str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def notes(self, lines: int = 0) -> list[list[str]]:
        """What both workers noted, once each has noted so many lines."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            files = [self.folder / "0", self.folder / "1"]
            notes = [file.read_text().splitlines() if file.exists() else [] for file in files]
            if all(len(note) >= lines for note in notes):
                return notes
            time.sleep(0.05)
        raise TimeoutError(f"the workers noted {notes}")


@pytest.fixture
def launch(root, tmp_path):
    return Launch(root, tmp_path)


def test_a_workers_output_and_exit_code_are_all_that_is_left_of_a_failed_run(launch):
    script = """
import os, sys, time
if os.environ["RANK"] == "0":
    print("a line")
    sys.exit(print("data.paths: folder x holds no text", file=sys.stderr) or 3)
time.sleep(60)
"""
    assert launch.run(script) == (3, "a line\n", "data.paths: folder x holds no text\n")


def test_a_crash_shows_the_workers_own_traceback_once(launch):
    code, out, err = launch.run("raise RuntimeError('boom')", processes=1)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback") and err.endswith("RuntimeError: boom\n")
    assert err.count("Traceback") == err.count("boom')") == 1
    assert "ChildFailedError" not in err and "elastic" not in err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 85), (signal.SIGUSR1, 3), (signal.SIGHUP, 0)]
)
def test_a_signal_reaches_each_worker_once_and_each_ends_in_its_own_time(launch, number, code):
    # Worker 1 takes longer: worker 0 leaving with a code must not have it signalled again, killed or restarted.
    ours = signal.signal(number, signal.SIG_DFL) if number == signal.SIGHUP else None  # these tests may run under nohup
    process = launch.start(OBEDIENT, launch.folder, code, 0.4, 1, flags=("--max-restarts", 2))
    if ours is not None:
        signal.signal(number, ours)
    launch.notes(lines=1)
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == code
    received = "SIGTERM" if number == signal.SIGHUP else number.name
    assert launch.notes() == [["started False", received]] * 2


def test_a_terminal_stays_a_terminal_and_its_ctrl_c_arrives_once_each_time(launch):
    command = launch.command(OBEDIENT, launch.folder, 0, 0.1, 2)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(launch.root)
        os.execve(command[0], command, os.environ | {"OMP_NUM_THREADS": "1"})
    for presses in (1, 2):
        launch.notes(lines=presses)
        os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert launch.notes() == [["started True", "SIGINT", "SIGINT"]] * 2


def test_a_worker_that_does_not_stop_is_killed_after_the_grace_time(launch):
    process = launch.start(OBEDIENT, launch.folder, 0, 0, 9, env={"GRASS_GRACE_SECONDS": "0.5"})
    launch.notes(lines=1)
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL
    says = "launch: worker rank {} did not stop in time (GRASS_GRACE_SECONDS=0.5): killed\n"
    assert err == says.format(0) + says.format(1)


def test_a_killed_worker_is_named_even_if_another_fails_of_its_absence_and_the_run_starts_again(launch):
    script = """
import os, pathlib, signal, sys, time
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    sys.exit(0)
if os.environ["RANK"] == "1":
    pathlib.Path(sys.argv[1]).touch()
    os.kill(os.getpid(), signal.SIGKILL)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.001)
sys.exit(1)
"""
    death = "launch: worker rank 1 was killed by SIGKILL (out of memory?): exit code 137\n"
    again = "launch: starting the workers again (1 restarts left)\n"
    assert launch.run(script, launch.folder / "a") == (137, "", death)
    assert launch.run(script, launch.folder / "b", flags=("--max-restarts", 1)) == (0, "", death + again)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="of glibc, on a CPU")
@pytest.mark.parametrize("keeps", [True, False])
def test_workers_on_a_cpu_keep_what_they_free_unless_told_otherwise(launch, keeps):
    env = {} if keeps else {"GLIBC_TUNABLES": ""}
    tensors = "first = torch.ones(2**24); del first; begun = faults()\nfor _ in range(20): torch.ones(2**24)"
    script = "import torch, resource\ndef faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    code, out, _ = launch.run(f"{script}{tensors}\nprint(faults() - begun)", env=env, processes=1)
    pages = 20 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert code == 0 and (int(out) < pages // 20 if keeps else int(out) > pages // 2 or huge_pages_always())


def huge_pages_always() -> bool:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.exists() and "[always]" in file.read_text()


def test_a_run_on_one_node_needs_no_port_that_another_may_have(launch):
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # another run has it
            taken.bind(("", 29500))
            taken.listen()
        assert launch.run("print('a line')", processes=1) == (0, "a line\n", "")


@pytest.mark.parametrize(("node", "reason"), [(0, "EADDRINUSE"), (1, "timed out")])
def test_nodes_that_cannot_meet_are_told_so_in_one_line(launch, node, reason):
    with socket.socket() as taken:  # a port that node 0 cannot have, and where nobody answers node 1
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        flags = ("--nnodes", 2, "--node-rank", node, "--master-port", port, "--rdzv-conf", "timeout=1")
        code, out, err = launch.run("", flags=flags)
    assert (code, out) == (1, "")
    waiting, error = err.splitlines()
    assert waiting == f"launch: waiting for the other nodes (2 in total) at 127.0.0.1:{port}"
    assert error.startswith("launch: the nodes did not find each other (")
    assert reason in error and "; check NNODES" in error
