"""Run torchrun so that its workers can save when a signal arrives.

python -m pretrain.launch [torchrun flags] -m pretrain.train [key=value ...] uses torch's flags, rendezvous and agent,
with these differences: signals are passed on to the workers, which then have GRASS_GRACE_SECONDS (300 by default) to
finish a step and save; the command ends with the exit code of a worker, such as 85 after saving; torch's log and
traceback are not shown (LOGLEVEL=INFO shows them).

The most common flags:
  --nproc-per-node N   processes on this node (default: 1)
  --nnodes N           nodes, or a range such as 2:4 (default: 1)
  --node-rank I, --master-addr HOST, --master-port PORT   the number of this node, and the address of node 0
  --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id ID   a rendezvous, instead of the line above
  --max-restarts N     how often the workers are started again after a failure (default: 0)
torchrun --help lists all of them.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback

from pretrain.cli.errors import clear_errors
from pretrain.cli.malloc import keep_freed_memory

ONE_NODE = ("1", "1:1")
STATIC_PORT = 29500  # torchrun's default


def say(message: str) -> None:
    with contextlib.suppress(OSError):  # this process must continue for the workers even without a terminal
        print(f"launch: {message}", file=sys.stderr, flush=True)


def exit_code(codes: list[int]) -> int:
    """The launcher's exit code: 128 + signal if a signal killed a worker, else the code of the first failed worker.

    Args:
        codes: the exit codes of the failed workers, at least one; -signal for a worker killed by a signal.
    """
    return next((128 - code for code in codes if code < 0), codes[0])


def explain(error: Exception) -> str:
    """``error`` in one line, without the C++ frames of torch's messages; with advice if the nodes did not connect."""
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousError

    cause = error.__cause__ or error
    first, *_ = str(cause).splitlines() or [""]
    line = f"{type(cause).__name__}: {first}".rstrip(": ")
    if isinstance(error, RendezvousError | DistError):
        advice = "check NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT or RDZV_ENDPOINT on every node"
        return f"the nodes did not find each other ({line}); {advice}"
    return line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` as torchrun does, with the defaults of its flags from ``PET_*`` environment variables.

    Other defaults than torchrun's: no log folder and, on a single node, a free port and the address localhost. A wrong
    flag prints an error and ends the process with 2.

    Args:
        argv: None for the arguments of this process.
    """
    from torch.distributed import run

    parser = run.get_args_parser()
    parser.usage = "python -m pretrain.launch [torchrun flags] -m module [arguments]"
    args = parser.parse_args(argv)
    args.signals_to_handle = ""  # torch's handlers would end the agent
    if args.log_dir is None and args.redirects == args.tee == "0":
        args.log_dir = os.devnull  # otherwise torch creates an empty folder for every run
    if args.local_addr is None and args.nnodes in ONE_NODE:
        args.local_addr = "localhost"  # the host name of a laptop may not resolve
    default = args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port in (None, STATIC_PORT)
    if default and args.nnodes in ONE_NODE:
        args.standalone = True  # at a free port: before torch 2.13, all runs of a machine would use the same port
    if args.max_restarts and args.nnodes not in ONE_NODE and args.rdzv_backend == "static":
        parser.error(
            "MAX_RESTARTS on several nodes needs a rendezvous; set RDZV_ENDPOINT=host:29400 instead of MASTER_ADDR"
        )
    return args


def set_environment() -> None:
    """Set environment variables for torch's store and the memory allocators of the workers, unless already set."""
    import torch

    # Otherwise all attempts share one store, and a restarted worker may read the address of a killed worker.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Steps with a refresh, a loss in chunks or a validation allocate other sizes: this reduces fragmentation.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        keep_freed_memory()


def main(argv: list[str] | None = None) -> int:
    """Run torchrun with ``argv`` (None: the arguments of this process); returns the exit code."""
    quiet = "LOGLEVEL" not in os.environ
    with _quiet_cpp(quiet):
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher import api

        from pretrain.distributed.graceful_agent import GracefulAgent
    args = parse_args(argv)
    set_environment()
    if quiet:
        logging.disable(logging.CRITICAL)
    if args.nnodes not in ONE_NODE:
        say(f"waiting for the other nodes ({args.nnodes} in total) at {run.get_rdzv_endpoint(args)}")
    GracefulAgent.say = staticmethod(say)
    api.LocalElasticAgent = GracefulAgent  # type: ignore[misc]  # launch_agent has no argument for it
    try:
        run.run(args)
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    except Exception as error:
        if not quiet:
            traceback.print_exc()
        say(explain(error))
        return 1
    return 0


@contextlib.contextmanager
def _quiet_cpp(quiet: bool):
    """Set torch's C++ log level, which is read on import, because connection errors print pages of C++ frames."""
    name = "TORCH_CPP_LOG_LEVEL"
    if not quiet or name in os.environ:
        yield
        return
    os.environ[name] = "FATAL"
    yield
    os.environ.pop(name)  # the C++ of the workers still logs


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there are workers, Ctrl-C simply ends this process
    if sys.argv[1:] and sys.argv[1] in ("-h", "--help"):
        with clear_errors():
            print(__doc__.replace("``", "").strip())
            sys.exit()
    sys.exit(main())
