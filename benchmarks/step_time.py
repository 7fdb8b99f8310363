"""Tokens per second of the methods side by side, and how close each comes to what its arithmetic allows.

python -m benchmarks.step_time --sizes 350m --methods adamw,galore,grass --rank 128 [--json]

Every method lives in a process of its own; the processes make their steps in turn, so that a noisy machine is noisy for
all of them. Medians; refreshes are counted at each method's default interval. The limit of a method is the first one's
tokens/s times the ratio of their counted FLOPs: what it would reach if it did its smaller sum as fast.
"""

import argparse
import json
import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.steps import METHODS, PERIOD, Steps, configuration, summarise
from pretrain.distributed import World
from pretrain.flops import flops_per_token

COLUMNS = {
    "method": "", "tokens_per_s": ",.0f", "of_the_first": ".2f", "limit_ratio": ".3f", "forward_s": ".2f",
    "backward_s": ".2f", "optimizer_s": ".3f", "refresh_s": ".2f", "peak_gib": ".2f",
}  # fmt: skip


def serve(connection: Connection, method: str, rank: int, overrides: list[str], threads: int) -> None:
    """One method's process: a step for each message, and at the end what it came to."""
    torch.set_num_threads(threads)
    config, refresh_every = configuration(method, rank, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = Steps(config, World(rank=0, size=1, device=device))
    made, timed = iter(steps), []
    connection.send("ready")
    while connection.recv() == "step":
        timed.append(next(made))
        connection.send(timed[-1].total_s)
    timing = summarise(timed[PERIOD:], refresh_every)  # the first period warms up
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send({
        "method": method, "tokens_per_s": config.train.tokens_per_step / timing.step_s,
        "forward_s": timing.forward_s, "backward_s": timing.backward_s, "optimizer_s": timing.optimizer_s,
        "refresh_s": timing.with_refresh_s - timing.regular_s, "refresh_every": refresh_every,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident,
        "flops_per_token": flops_per_token(steps.model, config.train.seq_len),
    })  # fmt: skip


def measure(methods: list[str], rank: int, overrides: list[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each of ``methods``, whose steps took turns."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for method in methods:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, method, rank, overrides, threads), daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(ours)
        ours.recv()  # one after the other: building is not to disturb either
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for _ in progress.track(range((rounds + 1) * PERIOD), description=" ".join(overrides[:1])):
            for end in ends:
                end.send("step")
                end.recv()
    rows = []
    for end, process in zip(ends, processes, strict=True):
        end.send("done")
        rows.append(end.recv())
        process.join()
    first = rows[0]
    for row in rows:
        row["of_the_first"] = row["tokens_per_s"] / first["tokens_per_s"]
        row["limit_ratio"] = row["of_the_first"] * row["flops_per_token"] / first["flops_per_token"]
        row["peak_gib"] = row["peak_bytes"] / 2**30
    return rows


def table(size: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=size)
    for name in COLUMNS:
        shown.add_column(name.replace("_", " "), justify="left" if name == "method" else "right")
    for row in rows:
        shown.add_row(*(format(row[name], form) for name, form in COLUMNS.items()))
    return shown


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Where a step's time goes: a stack for each method and size."""
    figure, axis = plt.subplots(figsize=(8, 1 + 0.35 * len(rows)))
    labels, left = [f"{row['size']}  {row['method']}" for row in rows], [0.0] * len(rows)
    for part in ("forward_s", "backward_s", "optimizer_s", "refresh_s"):
        share = [row[part] / (row["refresh_every"] if part == "refresh_s" else 1) for row in rows]
        axis.barh(labels, share, left=left, label=part[:-2] + (", its share of a step" if part == "refresh_s" else ""))
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds a step")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the training command, such as train.compile=true")
    parser.add_argument("--sizes", default="60m", help="models of conf/model, such as 60m,130m,350m (default 60m)")
    parser.add_argument(
        "--methods", default="adamw,adamw8bit,galore,apollo,grass,grass+head", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--rank", type=int, default=128, help="of GaLore, APOLLO and Grass (default 128)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="(default 256)")
    parser.add_argument("--rounds", type=int, default=3, help=f"of {PERIOD} steps of every method (default 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a process on a CPU")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where to draw the parts of a step")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
    rows = []
    for size in arguments.sizes.split(","):
        shape = [
            f"model=llama_{size}", f"train.seq_len={arguments.seq_len}",
            f"train.tokens_per_step={arguments.batch * arguments.seq_len}",
        ]  # fmt: skip
        measured = measure(methods, arguments.rank, [*shape, *arguments.overrides], arguments.rounds, arguments.threads)
        rows += [{"size": size, **row} for row in measured]
        if not arguments.json:
            Console().print(table(size, measured))
    if arguments.json:
        print(json.dumps({"rank": arguments.rank, "rows": rows}))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
