"""Tokens per second of several methods, and how close each method comes to its theoretical limit.

python -m benchmarks.step_time --sizes 350m --methods adamw,galore,grass --rank 128 [--json]

Each method runs in a separate process. The processes take turns of one step, so that noise on the machine affects all
methods. Times are medians, and refreshes count once per default interval of their method. The limit of a method is
AdamW's tokens/s times AdamW's FLOPs per token, divided by the FLOPs per token of the method. A method reaches its limit
if it has AdamW's FLOP/s over the complete step, optimizer included. Without adamw among the methods the limit is null.

    python -m benchmarks.step_time --written docs/step_time.jsonl --plot step_time.png    # from outputs of earlier runs

--at also shows the speed of each method relative to the first at other numbers of tokens per step, computed from the
parts of the measured step: forward and backward grow with the tokens, optimizer and refresh do not.

A method may have its own settings, separated by semicolons:
    python -m benchmarks.step_time --methods "grass,grass:train.compile=true,grass:train.loss_chunk_tokens=256"

On a GPU, with JSON as output:
    python -m benchmarks.step_time --sizes 350m,1b_block,7b_block --batch 16 --json train.dtype=bfloat16 > gpu.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.steps import METHODS, PERIOD, Steps, configuration, summarise
from models.flops import flops_per_token
from pretrain.cli.arguments import number
from pretrain.cli.malloc import KEEP, keep_freed_memory
from pretrain.distributed.world import World
from pretrain.runs.figures import new_figure, save

COLUMNS = {
    "method": "", "tokens_per_s": ",.0f", "of_the_first": ".3f", "limit_ratio": ".3f", "step_s": ".3f", "spread": ".1%",
    "forward_s": ".3f", "backward_s": ".3f", "optimizer_s": ".3f", "refresh_s": ".3f", "peak_gib": ".2f",
}  # fmt: skip
PARTS = {
    "forward_s": "forward", "backward_s": "backward", "optimizer_s": "optimizer",
    "refresh_s": "refresh, its share of a step",
}  # fmt: skip
WARM_UP = 2  # steps that are not counted
ONE_BLOCK = "_block"  # 1b_block: one block of the 1b model, with a very small embedding and head


def serve(connection: Connection, method: str, rank: int, overrides: list[str], period: int, threads: int) -> None:
    """Run one method in its process: make a step for each message "step", and after another message send its row.

    ``period`` is the number of steps between refreshes of GaLore and APOLLO.
    """
    torch.set_num_threads(threads)
    name, _, own = method.partition(":")
    config, refresh_every = configuration(name, rank, [*overrides, *filter(None, own.split(";"))], period)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = Steps(config, World(rank=0, size=1, device=device), lora_rank=rank if name == "lora" else None)
    made, timed = iter(steps), []
    connection.send("ready")
    while connection.recv() == "step":
        timed.append(next(made))
        connection.send(timed[-1].total_s)
    counted = timed[WARM_UP:]
    if refresh_every > 1 and not any(step.refreshed for step in counted):
        counted.append(timed[0])  # in a run shorter than the period, only the first step refreshes
    timing = summarise(counted, refresh_every)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send({
        "method": method, "tokens_per_s": config.train.tokens_per_step / timing["step_s"], **timing,
        "steps": len(timed) - WARM_UP,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident,
        "flops_per_token": flops_per_token(steps.model, config.train.seq_len),
    })  # fmt: skip


def measure(
    methods: list[str], rank: int, overrides: list[str], rounds: int, period: int, threads: int
) -> list[dict[str, Any]]:
    """Time all methods in turn, ``rounds`` × ``period`` steps each, and return a row for each method.

    GaLore and APOLLO refresh every ``period`` steps. ``threads`` is the number of CPU threads per method.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()  # as ./launch.sh does
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for method in methods:
        ours, theirs = context.Pipe()
        processes.append(
            context.Process(target=serve, args=(theirs, method, rank, overrides, period, threads), daemon=True)
        )
        processes[-1].start()
        theirs.close()
        ends.append(ours)
        ours.recv()  # builds one method at a time
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for _ in progress.track(range(WARM_UP + rounds * period), description=" ".join(overrides[:1])):
            for method, end, process in zip(methods, ends, processes, strict=True):
                try:
                    end.send("step")
                    end.recv()
                except (EOFError, OSError):
                    process.join()
                    raise SystemExit(
                        f"{method}: its process ended with code {process.exitcode} (-9: killed, probably for lack of "
                        "memory, since all methods are in memory at once; measure fewer --methods together)"
                    ) from None
    rows = []
    for end, process in zip(ends, processes, strict=True):
        end.send("done")
        rows.append(end.recv())
        process.join()
    return compared(rows)


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its speed relative to the first row and to its limit."""
    dense = next((row for row in rows if row["method"] == "adamw"), None)
    for row in rows:
        row["of_the_first"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["limit_ratio"] = None
        if dense:
            limit = dense["tokens_per_s"] * dense["flops_per_token"] / row["flops_per_token"]
            row["limit_ratio"] = row["tokens_per_s"] / limit
        row["peak_gib"] = row["peak_bytes"] / 2**30
    return rows


def relative_at(row: dict[str, Any], first: dict[str, Any], tokens: int) -> float:
    """Return the speed of ``row`` relative to that of ``first``, if every step had ``tokens`` tokens."""

    def seconds(row: dict[str, Any]) -> float:
        factor = tokens / (row["tokens_per_s"] * row["step_s"])
        with_tokens = factor * (row["forward_s"] + row["backward_s"])
        return float(with_tokens + row["optimizer_s"] + row["refresh_s"] / row["refresh_every"])

    return seconds(first) / seconds(row)


def shape_of(size: str, batch: int, seq_len: int) -> list[str]:
    """Return the overrides for a model and its batch. Size 1b_block is one block of 1b with a vocabulary of 256."""
    block = size.endswith(ONE_BLOCK)
    alone = ["model.num_hidden_layers=1", "model.vocab_size=256", "data.vocab_size=256"] if block else []
    return [
        f"model=llama_{size.removesuffix(ONE_BLOCK)}", f"train.seq_len={seq_len}",
        f"train.tokens_per_step={batch * seq_len}", *alone,
    ]  # fmt: skip


def table(size: str, rows: list[dict[str, Any]], at: Sequence[int] = ()) -> Table:
    """Return the rows of a size as a table, with a column of relative speeds for each number of tokens in ``at``."""
    shown = Table(title=size)
    for name in COLUMNS:
        shown.add_column(name.replace("_", " "), justify="left" if name == "method" else "right")
    for tokens in at:
        shown.add_column(f"at {tokens:,}", justify="right")
    for row in rows:
        cells = ["–" if row[name] is None else format(row[name], form) for name, form in COLUMNS.items()]
        shown.add_row(*cells, *(f"{relative_at(row, rows[0], tokens):.2f}" for tokens in at))
    return shown


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the parts of a step: a panel for each run of a size, with a stacked bar for each method."""
    runs = list(by_run(rows))
    lines = [max(len(re.split("[:;]", row["method"])) for row in of_one) for _, of_one in runs]
    heights = [1 + len(of_one) * (0.5 + 0.5 * most) for most, (_, of_one) in zip(lines, runs, strict=True)]
    with new_figure(height=0.8 + 0.27 * sum(heights), grid="x") as figure:
        axes = figure.subplots(len(runs), squeeze=False, height_ratios=heights)
        for axis, (title, of_one) in zip(axes[:, 0], runs, strict=True):
            labels = ["\n".join(re.split("[:;]", row["method"])) for row in of_one]
            left = [0.0] * len(of_one)
            for part, label in PARTS.items():
                share = [row[part] / (row["refresh_every"] if part == "refresh_s" else 1) for row in of_one]
                axis.barh(labels, share, left=left, label=label)
                left = [a + b for a, b in zip(left, share, strict=True)]
            for row, label, end in zip(of_one, labels, left, strict=True):
                axis.text(end, label, f" {row['tokens_per_s']:,.0f} tokens/s", va="center", fontsize=8)
            axis.set_title(f"LLaMA {title}".replace(ONE_BLOCK, ", one block"))
            axis.set_xlim(0, 1.4 * max(left))
            axis.invert_yaxis()
        axes[-1, 0].set_xlabel("seconds per step")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=2, loc="outside upper center")
        save(figure, file)


def written(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file with one output of --json per line. Each row gets the title of its run as ``run``."""
    outputs = [json.loads(line) for line in file.read_text().splitlines()]
    return [{"run": title_of(output, number), **row} for number, output in enumerate(outputs) for row in output["rows"]]


def title_of(output: dict[str, Any], number: int) -> str:
    """Return the title of output ``number`` (from 0) of a file, such as "run 1, rank 128".

    ", default malloc" is added for a CPU run in which malloc did not keep freed memory (``pretrain.cli.malloc``).
    """
    how = "" if output["machine"].get("gpu") or output["machine"].get("malloc") else ", default malloc"
    return f"run {number + 1}, rank {output['rank']}{how}"


def by_run(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a title and the rows for each size of each run."""
    for size, run in dict.fromkeys((row["size"], row.get("run")) for row in rows):
        title = f"{size} ({run})" if run else size
        yield title, [row for row in rows if (row["size"], row.get("run")) == (size, run)]


def machine(threads: int) -> dict[str, Any]:
    """Describe the machine: GPU, platform, threads, version of torch, settings of malloc."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    malloc = {name: os.environ[name] for name in KEEP if name in os.environ}
    return {
        "gpu": gpu, "platform": platform.platform(), "threads": threads, "torch": torch.__version__, "malloc": malloc,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the training command, such as train.compile=true")
    parser.add_argument("--sizes", default="60m", help="model sizes, or one block: 1b_block (default 60m)")
    parser.add_argument(
        "--methods", default="adamw,galore,apollo,grass,grass+muon,grass+head", help=f"from {', '.join(METHODS)}"
    )
    parser.add_argument("--rank", type=int, default=128, help="rank of all methods that have one (default 128)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of --period steps per method (default 3)")
    parser.add_argument("--period", type=int, default=PERIOD, help=f"steps per refresh of GaLore (default {PERIOD})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads per process")
    parser.add_argument(
        "--at", nargs="+", type=number(int, 1), default=(), metavar="TOKENS",
        help="also compute the speed relative to the first method at this many tokens per step",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the parts of a step")
    parser.add_argument("--written", type=Path, metavar="JSONL", help="show saved outputs of --json, measure nothing")
    arguments = parser.parse_args()
    rows = written(arguments.written) if arguments.written else measured(arguments, parser)
    if arguments.written:
        for title, of_one in by_run(rows):
            Console(width=132).print(table(title, of_one, arguments.at))
    if arguments.plot:
        plot(rows, arguments.plot)


def measured(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Measure all sizes. Print the table of each size at once, or all rows as JSON at the end."""
    methods = arguments.methods.split(",")
    if unknown := {method.partition(":")[0] for method in methods} - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
    rows = []
    for size in arguments.sizes.split(","):
        shape = shape_of(size, arguments.batch, arguments.seq_len)
        overrides = [*shape, *arguments.overrides]
        found = measure(methods, arguments.rank, overrides, arguments.rounds, arguments.period, arguments.threads)
        rows += [{"size": size, **row} for row in found]
        if not arguments.json:
            Console(width=132).print(table(size, found, arguments.at))
    if arguments.json:
        print(json.dumps({"rank": arguments.rank, "machine": machine(arguments.threads), "rows": rows}))
    return rows


if __name__ == "__main__":
    main()
