"""Tokens per second and bytes sent per step of several processes that are joined by links of limited bandwidth.

python -m benchmarks.scaling --size 350m --rank 128 --ranks 2 --mbit 1000 --methods adamw,galore,grass [--json]

Each process runs on a simulated host, a network namespace with a slowed interface. It trains one sequence per step,
with DDP over gloo in float32. This needs root on Linux with iproute2. Otherwise the command prints the reason and
uses the loopback interface at full speed. Each method is built once and then measured at one bandwidth after another.

A refresh of GaLore is timed in the first step and counted once per default interval. Grass refreshes its blocks in
turn, so every step includes a part of a refresh.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from statistics import median
from subprocess import PIPE
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.network import Host, hosts, limit, loopback, sent_bytes
from benchmarks.steps import METHODS, Step, Steps, configuration
from pretrain.distributed.world import connect, disconnect

SEQ_LEN = 256
LOOPBACK = "lo"


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides for the model and the batch."""
    tokens = SEQ_LEN * arguments.ranks
    return [
        f"model=llama_{arguments.size}", f"train.seq_len={SEQ_LEN}", f"train.tokens_per_step={tokens}",
        "train.micro_batch_size=1",
    ]  # fmt: skip


def payload_bytes(steps: Steps) -> float:
    """Return the bytes per step that a process all-reduces, averaged over a refresh interval, from the shapes."""
    gradients = sum(p.numel() * p.element_size() for p in steps.model.parameters() if p.requires_grad)
    grass = steps.optim.grass
    if not grass:
        return gradients
    sketches = 4 * sum(layer.selectable for layer in grass.layers.values()) * (grass.probes.sketch_width or 1)
    return gradients + sketches * grass.schedule.probe_steps / grass.schedule.refresh_every


def step_times(first: Step, regular: list[Step], refresh_every: int) -> dict[str, float]:
    """Return the median seconds of the ``regular`` steps, the seconds of a refresh, and the mean step of a long run.

    A long run has a refresh every ``refresh_every`` steps. The time of a refresh is the extra optimizer time of the
    ``first`` step, or 0 if ``refresh_every`` is 1.
    """
    regular_s, optimizer_s = median(step.total_s for step in regular), median(step.optimizer_s for step in regular)
    refresh_s = max(first.optimizer_s - optimizer_s, 0.0) if refresh_every > 1 else 0.0
    return {"step_s": regular_s + refresh_s / refresh_every, "regular_s": regular_s, "refresh_s": refresh_s}


def work(arguments: argparse.Namespace, method: str) -> None:
    """Run ``method`` in one of the processes. The process of rank 0 prints a row of JSON for each bandwidth."""
    torch.set_num_threads(arguments.threads)
    config, refresh_every = configuration(method, arguments.rank, overrides(arguments), period=None)
    world = connect(timedelta(minutes=20))
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    steps = Steps(config, world)
    ring = 2 * (world.size - 1) / world.size  # bytes sent per byte that is all-reduced
    payload = ring * payload_bytes(steps)
    made = iter(steps)
    first, _ = next(made), next(made)  # the second step warms up
    for mbit in arguments.mbit:
        world.barrier()
        if interface != LOOPBACK:
            limit(interface, mbit)
        world.barrier()
        before = sent_bytes(interface)
        timed = [next(made) for _ in range(arguments.steps)]
        world.barrier()
        sent = sent_bytes(interface) - before
        times = step_times(first, timed, refresh_every)
        row = {
            "method": method, "tokens_per_s": world.size * SEQ_LEN / times["step_s"], **times,
            "refresh_every": refresh_every, "bytes_per_step": round(payload),
            "counted_bytes": round(payload * len(timed)), "interface_bytes": sent, "steps": len(timed),
        }  # fmt: skip
        if world.is_main:
            print(json.dumps(row), flush=True)
    disconnect()


def measure(arguments: argparse.Namespace, method: str, places: list[Host]) -> list[dict[str, Any]]:
    """Run ``method`` with a process on each of ``places``. Return a row for each bandwidth."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, place in enumerate(places):
        told = {
            "RANK": rank, "WORLD_SIZE": len(places), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": places[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": place.interface,
            "OMP_NUM_THREADS": arguments.threads,
        }  # fmt: skip
        environment = os.environ | {key: str(value) for key, value in told.items()}
        command = [*place.prefix, sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--worker", method]
        processes.append(subprocess.Popen(command, env=environment, stdout=PIPE, stderr=PIPE, text=True))
    finished = [p.communicate() for p in processes]
    if any(p.returncode for p in processes):
        raise SystemExit(f"{method} failed:\n" + "\n".join(error[-2000:] for _, error in finished))
    return [json.loads(line) for line in finished[0][0].splitlines()[-len(arguments.mbit) :]]


def table(rows: list[dict[str, Any]], link: str) -> Table:
    shown = Table(title=link)
    for heading in ("method", "tokens/s", "of the first", "step s", "a refresh", "sent", "wire / counted"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        shown.add_row(
            row["method"], f"{row['tokens_per_s']:,.1f}", f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.2f}",
            f"{row['step_s']:.2f}", f"{row['refresh_s']:.2f}", f"{row['bytes_per_step'] / 2**20:,.1f} MiB",
            f"{row['interface_bytes'] / row['counted_bytes']:.3f}",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350m", help="model size, such as 130m (default 350m)")
    parser.add_argument("--rank", type=int, default=128, help="rank of GaLore and Grass (default 128)")
    parser.add_argument("--ranks", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("--mbit", default="1000", help="bandwidths in Mbit/s, comma-separated (default 1000)")
    parser.add_argument("--methods", default="adamw,galore,grass,grass+head", help=f"from {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=8, help="steps timed per bandwidth (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per bandwidth instead of tables")
    parser.add_argument("--worker", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.mbit = [float(mbit) for mbit in arguments.mbit.split(",")]
    if arguments.worker:
        return work(arguments, arguments.worker)
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: no method {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    console = Console(stderr=True)
    by_method, links = [], [f"{mbit:g} Mbit/s" for mbit in arguments.mbit]
    for method in methods:
        with console.status(f"{method} …"):
            try:
                with hosts(arguments.ranks) as places:
                    by_method.append(measure(arguments, method, places))
            except PermissionError as error:
                console.print(f"measuring on the loopback interface, and --mbit has no effect: {error}")
                by_method.append(measure(arguments, method, loopback(arguments.ranks)))
                links = ["loopback"] * len(links)
    for mbit, link, *rows in zip(arguments.mbit, links, *by_method, strict=True):
        if arguments.json:
            asked = {"size": arguments.size, "rank": arguments.rank, "ranks": arguments.ranks, "mbit": mbit}
            print(json.dumps({"link": link} | asked | {"rows": rows}))
        else:
            title = f"{arguments.size}, rank {arguments.rank}, {arguments.ranks} processes, {link}"
            Console().print(table(rows, title))
    return None


if __name__ == "__main__":
    main()
