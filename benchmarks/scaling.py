"""Tokens per second of several processes joined by links of a chosen bandwidth, and what each sends in a step.

python -m benchmarks.scaling --size 350m --rank 128 --ranks 2 --mbit 1000 --methods adamw,galore,grass [--json]

Every process is a host of its own (a network namespace whose interface is slowed down), with one sequence of its own a
step, DDP over gloo, float32. As root, on Linux with iproute2; elsewhere it says so and uses the loopback interface,
at its full speed. A method is built once and makes its steps at one bandwidth after the other.

A refresh of GaLore is timed in the first step, and counted once in its default interval; the blocks under Grass take
turns, so that every step holds its share.
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
    tokens = SEQ_LEN * arguments.ranks
    return [
        f"model=llama_{arguments.size}", f"train.seq_len={SEQ_LEN}", f"train.tokens_per_step={tokens}",
        "train.micro_batch_size=1",
    ]  # fmt: skip


def payload_bytes(steps: Steps) -> float:
    """Bytes that a process gives to all-reduces in the mean step of a window, by the shapes."""
    gradients = sum(p.numel() * p.element_size() for p in steps.model.parameters() if p.requires_grad)
    grass = steps.optim.grass
    if not grass:
        return gradients
    sketches = 4 * sum(layer.selectable for layer in grass.layers.values()) * (grass.probes.sketch_width or 1)
    return gradients + sketches * grass.schedule.probe_steps / grass.schedule.refresh_every


def step_times(first: Step, regular: list[Step], refresh_every: int) -> dict[str, float]:
    """Medians of the ``regular`` steps, and the mean step of a long run, which refreshes as the ``first`` one did."""
    regular_s, optimizer_s = median(step.total_s for step in regular), median(step.optimizer_s for step in regular)
    refresh_s = max(first.optimizer_s - optimizer_s, 0.0) if refresh_every > 1 else 0.0
    return {"step_s": regular_s + refresh_s / refresh_every, "regular_s": regular_s, "refresh_s": refresh_s}


def work(arguments: argparse.Namespace, method: str) -> None:
    """One process of one method: prints a row of each bandwidth as JSON."""
    torch.set_num_threads(arguments.threads)
    config, refresh_every = configuration(method, arguments.rank, overrides(arguments), period=None)
    world = connect(timedelta(minutes=20))
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    steps = Steps(config, world)
    ring = 2 * (world.size - 1) / world.size  # of what is summed, a process sends this multiple
    payload = ring * payload_bytes(steps)
    made = iter(steps)
    first, _ = next(made), next(made)  # kernels settle
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
    """The rows of ``method``, one of each bandwidth, from a process on each of ``places``."""
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
    parser.add_argument("--size", default="350m", help="a model of conf/model, such as 130m (default 350m)")
    parser.add_argument("--rank", type=int, default=128, help="of GaLore and Grass (default 128)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--mbit", default="1000", help="Mbit/s that each sends at most, or several (default 1000)")
    parser.add_argument("--methods", default="adamw,galore,grass,grass+head", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=8, help="that are timed at each bandwidth (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--json", action="store_true", help="a JSON object a bandwidth instead of tables")
    parser.add_argument("--worker", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.mbit = [float(mbit) for mbit in arguments.mbit.split(",")]
    if arguments.worker:
        return work(arguments, arguments.worker)
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
    console = Console(stderr=True)
    by_method, links = [], [f"{mbit:g} Mbit/s" for mbit in arguments.mbit]
    for method in methods:
        with console.status(f"{method} …"):
            try:
                with hosts(arguments.ranks) as places:
                    by_method.append(measure(arguments, method, places))
            except PermissionError as error:
                console.print(f"on the loopback interface, whatever --mbit says: {error}")
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
