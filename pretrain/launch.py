"""torchrun with manners: ``python -m pretrain.launch <torchrun flags> -m pretrain.train <overrides>``.

Torch's own flags, rendezvous and agent do the work. What differs: signals are passed on to the workers, which
get time to finish a step and save; the command ends with the worker's own exit code; what the workers print
stands alone, without the agent's log and traceback (``LOGLEVEL=INFO`` shows torch's log).
"""

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

QUIET = "LOGLEVEL" not in os.environ
CPP_LOG_LEVEL = os.environ.get("TORCH_CPP_LOG_LEVEL")
if __name__ == "__main__":  # before the import of torch, which takes seconds and reads its log level
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there are workers, Ctrl-C just ends this process
    if QUIET and CPP_LOG_LEVEL is None:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # its connection errors come with pages of C++ frames

import torch
from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from pretrain.cli.malloc import keep_freed_memory
from pretrain.cli.signals import EXIT_CODE

# What a signal to this process becomes for the workers. They live in sessions of their own, so that a
# terminal's Ctrl-C reaches them only from here, and once.
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
}

ONE_NODE = ("1", "1:1")
STATIC_PORT = 29500  # torchrun's default


def say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone, the workers still need us
        print(f"launch: {message}", file=sys.stderr, flush=True)


class Agent(LocalElasticAgent):
    """Torch's agent, except that a signal does not end it: its workers get the signal, and time to obey.

    ``GRASS_GRACE_SECONDS`` is that time (default 300). Workers that still run at its end are killed, as they
    are at the third request to stop; the second one is theirs to understand.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grace = float(os.environ.get("GRASS_GRACE_SECONDS", "300"))
        self._received: set[int] = set()  # since the last look; a set, for `timeout` sends its signal twice
        self._requests = 0
        self._deadline: float | None = None
        self._sent: set[int] = set()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for number in PASSED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda received, _frame: self._received.add(received))
        return super()._start_workers(worker_group)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        _end_by_signals()

    def _exit_barrier(self) -> None:
        _end_by_signals()
        super()._exit_barrier()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._pass_signals_on()
        if self._deadline is None and EXIT_CODE in self._failed().values():
            self._deadline = time.monotonic() + self._grace  # a worker was asked to stop in another way
        if self._deadline is not None:
            if self._running() and time.monotonic() < self._deadline:
                return RunResult(state=WorkerState.HEALTHY)
            self._remaining_restarts = 0
            self._kill_running()
        if not (failed := self._failed()) and self._running():
            return RunResult(state=WorkerState.HEALTHY)
        if failed:
            # When a worker is killed, another may fail of the lost connection and be seen first.
            time.sleep(worker_group.spec.monitor_interval)
            failed |= self._failed()
            # What is left of the run cannot go on: it has only to end. One that is stuck does not even do that.
            assert self._pcontext is not None
            self._pcontext.close(signal.SIGTERM, timeout=5)
        result = super()._monitor_workers(worker_group)
        if failed:
            # Torch counts the workers that it ended itself as failures too: they are not the cause.
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
        return {rank: code for rank, process in self._processes().items() if (code := process.poll())}

    def _pass_signals_on(self) -> None:
        while self._received:
            number = PASSED_ON[signal.Signals(self._received.pop())]
            for process in self._processes().values():
                process.send_signal(number)  # not to its children: the step that it finishes may need them
            self._sent.add(number)
            self._requests += 1
            if self._requests in (1, 3):
                self._deadline = time.monotonic() + (self._grace if self._requests == 1 else 0)

    def _kill_running(self) -> None:
        for rank in self._running():
            say(f"worker rank {rank} did not stop in time (GRASS_GRACE_SECONDS={self._grace:g}): killed")
            os.killpg(self._processes()[rank].pid, signal.SIGKILL)
            self._processes()[rank].wait()
            self._sent.add(signal.SIGKILL)

    def _report(self, failures: dict[int, ProcessFailure]) -> None:
        """Say what the workers could not say themselves."""
        for rank, failure in failures.items():
            if failure.exitcode < 0 and -failure.exitcode not in self._sent:
                hint = " (out of memory?)" if -failure.exitcode == signal.SIGKILL else ""
                code = 128 - failure.exitcode
                say(f"worker rank {rank} was killed by {failure.signal_name()}{hint}: exit code {code}")
        if self._remaining_restarts > 0:
            say(f"starting the workers again ({self._remaining_restarts} restarts left)")


def _end_by_signals() -> None:
    """Without workers there is nobody to pass signals on to: let them end this process."""
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def exit_code(failures: dict[int, ProcessFailure]) -> int:
    """The first failed worker's; one that was killed by a signal comes first and gives 128 + signal."""
    codes = [failure.exitcode for failure in failures.values()]
    return next((128 - code for code in codes if code < 0), codes[0])


def explain(error: Exception) -> str:
    """What went wrong between the launchers, in one line: torch's messages end in pages of C++ frames."""
    cause = error.__cause__ or error
    first, *_ = str(cause).splitlines() or [""]
    line = f"{type(cause).__name__}: {first}".rstrip(": ")
    if isinstance(error, RendezvousError | DistError):
        mend = "check NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT or RDZV_ENDPOINT on every node"
        return f"the nodes did not find one another: {mend} ({line})"
    return line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Torchrun's flags and ``PET_*`` variables, with a few defaults of our own."""
    parser = run.get_args_parser()
    parser.usage = "python -m pretrain.launch [torchrun flags] -m module [arguments]"
    args = parser.parse_args(argv)
    args.signals_to_handle = ""  # torch's handlers would end the agent
    if args.log_dir is None and args.redirects == args.tee == "0":
        args.log_dir = os.devnull  # torch would leave an empty folder behind after every run
    if args.local_addr is None and args.nnodes in ONE_NODE:
        args.local_addr = "localhost"  # a laptop's own name may resolve to nowhere
    default = args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port in (None, STATIC_PORT)
    if default and args.nnodes in ONE_NODE:
        args.standalone = True  # at a free port: before torch 2.13 all runs of a machine would take the same one
    # Otherwise all attempts share one store, and a restarted worker may read the address of one that was killed.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Steps with a refresh, a loss in chunks or a validation take other sizes than the rest: less is lost to gaps.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        keep_freed_memory()
    if args.max_restarts and args.nnodes not in ONE_NODE and args.rdzv_backend == "static":
        parser.error("restarts of several nodes need a rendezvous: RDZV_ENDPOINT=host:29400 instead of MASTER_ADDR")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if QUIET:
        logging.disable(logging.CRITICAL)
    if args.nnodes not in ONE_NODE:
        say(f"waiting for the other nodes ({args.nnodes} in all) at {run.get_rdzv_endpoint(args)}")
    api.LocalElasticAgent = Agent  # type: ignore[misc]  # launch_agent takes no other
    try:
        run.run(args)
    except ChildFailedError as error:
        return exit_code(error.failures)
    except Exception as error:
        if not QUIET:
            traceback.print_exc()
        say(explain(error))
        return 1
    return 0


if __name__ == "__main__":
    if CPP_LOG_LEVEL is None:
        os.environ.pop("TORCH_CPP_LOG_LEVEL", None)  # what the workers' C++ has to say is theirs to show
    sys.exit(main())
