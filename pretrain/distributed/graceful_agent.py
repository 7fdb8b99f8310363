"""Torch's elastic agent, changed so that the workers can save after a signal before they end.

Torchrun's ``--signals-to-handle`` and ``--shutdown-timeout`` are not suitable: they also signal the children of a
worker, which a step that is being finished may need; after a second signal, the workers continue without an agent; and
the exit codes of the workers are lost. Torch 2.11 has no ``--shutdown-timeout``.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pretrain.cli.signals import EXIT_CODE

# Signals to this process, and the signals that the workers get instead. Workers have separate sessions: a Ctrl-C in the
# terminal reaches them only through this process, and only once.
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
}


class GracefulAgent(LocalElasticAgent):
    """Passes signals on to its workers, and gives them ``GRASS_GRACE_SECONDS`` (default 300) to end.

    Workers that are still running after this time are killed. The second signal is passed on like the first; the third
    kills the workers at once. ``say`` prints a line for the user.
    """

    say: Callable[[str], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grace = float(os.environ.get("GRASS_GRACE_SECONDS", "300"))
        self._received: set[int] = set()  # since the last poll; a set, because `timeout` sends its signal twice
        self._requests = 0
        self._deadline: float | None = None
        self._sent: set[int] = set()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for number in PASSED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda received, _frame: self._received.add(received))
        return super()._start_workers(worker_group)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        _restore_signals()

    def _exit_barrier(self) -> None:
        _restore_signals()
        super()._exit_barrier()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._pass_signals_on()
        if self._deadline is None and EXIT_CODE in self._failed().values():
            self._deadline = time.monotonic() + self._grace  # a worker got the signal directly, for example from SLURM
        if self._deadline is not None:
            if self._running() and time.monotonic() < self._deadline:
                return RunResult(state=WorkerState.HEALTHY)
            self._remaining_restarts = 0
            self._kill_running()
        failed = self._failed()
        if not failed and self._running():
            return RunResult(state=WorkerState.HEALTHY)
        if failed:
            # If one worker is killed, another may fail because of the lost connection, and be noticed first.
            time.sleep(worker_group.spec.monitor_interval)
            failed |= self._failed()
            assert self._pcontext is not None
            self._pcontext.close(signal.SIGTERM, timeout=5)  # the others cannot continue, and may hang
        result = super()._monitor_workers(worker_group)
        if failed:
            # Torch also counts the workers that it ended as failures, but they are not the cause.
            result.failures = {rank: result.failures[rank] for rank in failed}
            self._report(result.failures)
        return result

    def _processes(self) -> dict[int, subprocess.Popen]:
        """The workers of this node by global rank."""
        assert isinstance(self._pcontext, SubprocessContext)
        handlers = self._pcontext.subprocess_handlers
        return {worker.global_rank: handlers[worker.local_rank].proc for worker in self._worker_group.workers}

    def _running(self) -> list[int]:
        return [rank for rank, process in self._processes().items() if process.poll() is None]

    def _failed(self) -> dict[int, int]:
        """The exit codes, other than 0, of the workers that have ended."""
        return {rank: code for rank, process in self._processes().items() if (code := process.poll())}

    def _pass_signals_on(self) -> None:
        while self._received:
            number = PASSED_ON[signal.Signals(self._received.pop())]
            for process in self._processes().values():
                process.send_signal(number)  # not to its children, which its current step may need
            self._sent.add(number)
            self._requests += 1
            if self._requests in (1, 3):
                self._deadline = time.monotonic() + (self._grace if self._requests == 1 else 0)

    def _kill_running(self) -> None:
        for rank in self._running():
            self.say(f"worker rank {rank} did not stop in time (GRASS_GRACE_SECONDS={self._grace:g}): killed")
            os.killpg(self._processes()[rank].pid, signal.SIGKILL)
            self._processes()[rank].wait()
            self._sent.add(signal.SIGKILL)

    def _report(self, failures: dict[int, ProcessFailure]) -> None:
        """Report the workers that were killed by a signal, because they could not print a message."""
        for rank, failure in failures.items():
            if failure.exitcode < 0 and -failure.exitcode not in self._sent:
                hint = " (out of memory?)" if -failure.exitcode == signal.SIGKILL else ""
                code = 128 - failure.exitcode
                self.say(f"worker rank {rank} was killed by {failure.signal_name()}{hint}: exit code {code}")
        if self._remaining_restarts > 0:
            self.say(f"starting the workers again ({self._remaining_restarts} restarts left)")


def _restore_signals() -> None:
    """Let signals end this process, because there are no workers any more."""
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
