"""Tokens per second of several processes joined by links of a chosen bandwidth, and what each sends in a step.

python -m benchmarks.scaling --size 350m --rank 128 --ranks 2 --mbit 1000 --methods adamw,galore,grass [--json]

Every process is a host of its own (a network namespace whose interface is slowed down), with one sequence of its own a
step, DDP over gloo, float32. As root, on Linux with iproute2; elsewhere it says so and uses the loopback interface,
at its full speed. Refreshes are counted at each method's default interval.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from subprocess import PIPE
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.network import Host, hosts, loopback, sent_bytes
from benchmarks.steps import METHODS, PERIOD, Steps, configuration, summarise
from pretrain.distributed import connect, disconnect

SEQ_LEN = 256


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
    sketches = 4 * sum(layer.selectable for layer in grass.layers.values()) * (grass.sketch_width or 1)
    return gradients + sketches * grass.probe_steps / grass.refresh_every


def work(arguments: argparse.Namespace, method: str) -> None:
    """One process of one method: prints its row as JSON."""
    torch.set_num_threads(arguments.threads)
    config, refresh_every = configuration(method, arguments.rank, overrides(arguments))
    world = connect(timedelta(minutes=10))
    steps = Steps(config, world)
    ring = 2 * (world.size - 1) / world.size  # of what is summed, a process sends this multiple
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    made = iter(steps)
    for _ in range(2):  # kernels and buckets settle
        next(made)
    world.barrier()
    before = sent_bytes(interface)
    timed = [next(made) for _ in range(arguments.periods * PERIOD)]
    world.barrier()
    sent = sent_bytes(interface) - before
    timing = summarise(timed, refresh_every)
    payload = ring * payload_bytes(steps)
    row = {
        "method": method, "tokens_per_s": world.size * SEQ_LEN / timing.step_s, "step_s": timing.step_s,
        "regular_s": timing.regular_s, "with_refresh_s": timing.with_refresh_s, "refresh_every": refresh_every,
        "bytes_per_step": round(payload), "counted_bytes": round(payload * len(timed)), "interface_bytes": sent,
    }  # fmt: skip
    if world.is_main:
        print(json.dumps(row), flush=True)
    disconnect()


def measure(arguments: argparse.Namespace, method: str, places: list[Host]) -> dict[str, Any]:
    """The row of ``method``, from a process on each of ``places``."""
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
    return json.loads(finished[0][0].splitlines()[-1])


def table(rows: list[dict[str, Any]], link: str) -> Table:
    shown = Table(title=link)
    for heading in ("method", "tokens/s", "of the first", "step s", "with refresh", "sent", "wire / counted"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        shown.add_row(
            row["method"], f"{row['tokens_per_s']:,.1f}", f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.2f}",
            f"{row['step_s']:.2f}", f"{row['with_refresh_s']:.2f}", f"{row['bytes_per_step'] / 2**20:,.1f} MiB",
            f"{row['interface_bytes'] / row['counted_bytes']:.3f}",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350m", help="a model of conf/model, such as 130m (default 350m)")
    parser.add_argument("--rank", type=int, default=128, help="of GaLore and Grass (default 128)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--mbit", type=float, default=1000, help="Mbit/s that each sends at most (default 1000)")
    parser.add_argument("--methods", default="adamw,galore,grass,grass+head", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--periods", type=int, default=2, help=f"of {PERIOD} steps with a refresh each (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--worker", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments, arguments.worker)
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
    console = Console(stderr=True)
    rows = []
    for method in methods:
        with console.status(f"{method} …"):
            try:
                with hosts(arguments.ranks, arguments.mbit) as places:
                    rows.append(measure(arguments, method, places))
                link = f"{arguments.mbit:g} Mbit/s"
            except PermissionError as error:
                console.print(f"on the loopback interface, whatever --mbit says: {error}")
                rows.append(measure(arguments, method, loopback(arguments.ranks)))
                link = "loopback"
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("size", "rank", "ranks", "mbit")}
        print(json.dumps({"link": link} | asked | {"rows": rows}))
    else:
        Console().print(table(rows, f"{arguments.size}, rank {arguments.rank}, {arguments.ranks} processes, {link}"))
    return None


if __name__ == "__main__":
    main()
