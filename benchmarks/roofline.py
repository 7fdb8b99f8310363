"""Predict step times on other machines from FLOPs and bytes. This is a model, not a measurement.

python -m benchmarks.roofline [--sizes 1b,7b,13b] [--methods adamw,galore,grass] [--tokens 4096] [--json]
python -m benchmarks.roofline --fit docs/scaling.jsonl     # compare the model with results of benchmarks.scaling

With one process, a step takes F + B + O. F and B are the times of forward and backward: their FLOPs at half of the peak
FLOP/s (EFFICIENCY). O is the time of the optimizer step: the bytes that it reads and writes, at the memory bandwidth,
and GaLore's projections. With N processes (DDP), gradients are sent during the backward, except the gradient of the
embedding, which is complete last. A step then takes F + max(B, C - C_last) + C_last + O. C = 2 (N - 1) / N · bytes /
link is the time of a ring all-reduce of all gradients, and C_last that of the embedding's gradient.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import plain
from benchmarks.steps import METHODS, configuration
from models.flops import flops_per_token
from models.grass_linear import GrassLinear
from pretrain.config.schema import BaselineConfig
from pretrain.runs.figures import new_figure, save
from pretrain.setup.model import outline

EFFICIENCY = 0.5  # share of peak FLOP/s that well-tuned LLaMA training reaches in matmuls on these GPUs
ADAM_PASSES = 7  # reads of gradient, weight and two moments; writes of weight and two moments


@dataclass(frozen=True)
class Machine:
    """``processes`` GPUs, each with ``flops`` FLOP/s (bf16, dense), ``memory`` bytes/s and a ``link`` to the others.

    FLOP/s and memory bandwidths are from data sheets. ``link`` is the rate in bytes/s that all-reduces reach in
    practice, not the rated bandwidth.
    """

    name: str
    flops: float
    memory: float
    processes: int = 1
    link: float = float("inf")


MACHINES = (
    Machine("A100", 312e12, 2.0e12),
    Machine("H100", 989e12, 3.35e12),
    Machine("8 × A100, NVLink", 312e12, 2.0e12, 8, 230e9),
    Machine("8 × A100, PCIe", 312e12, 2.0e12, 8, 20e9),
    Machine("8 nodes of one A100, 100 Gbit/s", 312e12, 2.0e12, 8, 11e9),
)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step of one process.

    Args:
        forward: FLOPs of the forward per token.
        backward: FLOPs of the backward per token.
        gradients: bytes that are all-reduced.
        last: bytes of the embedding's gradient, which is complete last, so that no backward hides its all-reduce.
        optimizer: bytes that the optimizer step reads and writes.
        fixed: FLOPs of GaLore's two projections; 0 for other methods.
    """

    forward: float
    backward: float
    gradients: float
    last: float
    optimizer: float
    fixed: float = 0.0


def work_of(method: str, size: str, rank: int, seq_len: int, dtype: str = "bfloat16") -> Work:
    """Count the FLOPs per token, and the bytes of a step, of ``method`` for LLaMA ``size``."""
    overrides = [f"model=llama_{size}", f"train.dtype={dtype}", f"train.seq_len={seq_len}"]
    config, _ = configuration(method, rank, overrides)
    dense, _ = configuration("adamw", rank, overrides)
    model = outline(config)
    forward = flops_per_token(outline(dense), seq_len) / 3
    trained = {p for p in model.parameters() if p.requires_grad}
    gradients = sum(p.numel() * p.element_size() for p in trained)
    embedding = model.embed_tokens.weight
    linears = [m.weight for n, m in model.named_modules() if n.endswith("_proj") and not isinstance(m, GrassLinear)]
    projected = isinstance(config.optim, BaselineConfig)
    fixed = sum(2 * 2 * p.numel() * rank for p in linears) if projected else 0
    return Work(
        forward, flops_per_token(model, seq_len) - forward, gradients, embedding.numel() * embedding.element_size(),
        ADAM_PASSES * gradients, fixed,
    )  # fmt: skip


def step_seconds(forward_s: float, backward_s: float, rest_s: float, all_s: float, last_s: float) -> float:
    """Return the seconds of a step by the formula of the module's docstring.

    Args:
        forward_s: F.
        backward_s: B.
        rest_s: O.
        all_s: C.
        last_s: C_last.
    """
    return forward_s + max(backward_s, all_s - last_s) + last_s + rest_s


def predict(work: Work, machine: Machine, tokens: int) -> float:
    """Return the seconds of a step with ``tokens`` tokens per process."""
    speed, ring = machine.flops * EFFICIENCY, 2 * (machine.processes - 1) / machine.processes / machine.link
    return step_seconds(
        work.forward * tokens / speed, work.backward * tokens / speed,
        work.optimizer / machine.memory + work.fixed / speed, ring * work.gradients, ring * work.last,
    )  # fmt: skip


def rows_of(sizes: list[str], methods: list[str], tokens: int, rank: int, seq_len: int) -> list[dict[str, Any]]:
    """Predict a row for each size, machine and method: seconds per step, tokens per second, and relative speed.

    ``tokens`` are those of a step on one process. Speeds are relative to the first method.
    """
    rows = []
    for size in sizes:
        works = {method: work_of(method, size, rank, seq_len) for method in methods}
        for machine in MACHINES:
            seconds = {method: predict(work, machine, tokens) for method, work in works.items()}
            rows += [
                {"machine": machine.name, "size": size, "method": method, "step_s": s,
                 "tokens_per_s": machine.processes * tokens / s, "of_the_first": seconds[methods[0]] / s}
                for method, s in seconds.items()
            ]  # fmt: skip
    return rows


@dataclass(frozen=True)
class Curve:
    """Measured seconds of a regular step of a method, by Mbit/s, and a model that predicts them.

    The compute time is the measured step at the fastest link, minus the time to send the embedding's gradient. Steps at
    slower links are predicted from the compute time.
    """

    measured: dict[float, float]
    work: Work
    ring: float  # seconds to all-reduce a byte at 1 Mbit/s

    @property
    def fastest(self) -> float:
        return max(self.measured)

    def model(self, mbit: float) -> float:
        """Return the predicted seconds at ``mbit`` Mbit/s."""
        computed = self.measured[self.fastest] - self.ring * self.work.last / self.fastest
        forward = self.work.forward / (self.work.forward + self.work.backward) * computed
        sent, last = (self.ring * size / mbit for size in (self.work.gradients, self.work.last))
        return step_seconds(forward, computed - forward, 0.0, sent, last)


def curves(measured: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return the Curve of each method, from outputs of ``benchmarks.scaling --json``."""
    found: dict[str, Curve] = {}
    for run in measured:
        ring = 2 * (run["ranks"] - 1) / run["ranks"] * 8e-6
        for row in run["rows"]:
            if row["method"] not in found:
                work = work_of(row["method"], run["size"], run["rank"], 256, "float32")
                found[row["method"]] = Curve({}, work, ring)
            found[row["method"]].measured[run["mbit"]] = row["regular_s"]
    return found


def fitted(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method and bandwidth except the fastest: predicted and measured seconds of a regular step.

    ``measured`` has outputs of ``benchmarks.scaling --json``.
    """
    return [
        {"method": method, "mbit": mbit, "regular_s": seconds, "model_s": curve.model(mbit),
         "model/measured": curve.model(mbit) / seconds}
        for method, curve in curves(measured).items()
        for mbit, seconds in sorted(curve.measured.items())
        if mbit != curve.fastest
    ]  # fmt: skip


def plot(measured: list[dict[str, Any]], file: Path) -> None:
    """Draw tokens/s against the bandwidth, without GaLore's refreshes: points are measured, lines are the model.

    The lines end at the fastest link. Beyond it, the model's compute time may include waiting for that link.
    """
    with new_figure(height=3.4) as figure:
        axis = figure.add_subplot()
        tokens, slowest = 256 * measured[0]["ranks"], min(run["mbit"] for run in measured)
        for method, curve in curves(measured).items():
            grid = [slowest / 2 * (2 * curve.fastest / slowest) ** (i / 200) for i in range(201)]
            (line,) = axis.plot(grid, [tokens / curve.model(mbit) for mbit in grid], linewidth=1)
            found = sorted(curve.measured.items())
            axis.plot([m for m, _ in found], [tokens / s for _, s in found], "o", color=line.get_color(), label=method)
        axis.set_xscale("log")
        axis.set_title("Tokens per second against bandwidth (points: measured, lines: model)")
        axis.set_xlabel("Mbit/s of each process")
        figure.legend(loc="outside lower center", ncols=4)
        save(figure, file)


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the rows as a table."""
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "))
    for row in rows:
        table.add_row(*(plain(value) if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,7b,13b", help="model sizes (default %(default)s)")
    parser.add_argument("--methods", default="adamw,galore,grass,grass+head", help=f"from {', '.join(METHODS)}")
    parser.add_argument("--rank", type=int, default=512, help="rank of GaLore and Grass (default 512)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per process and step (default 4096)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence (default 256, as in the papers)")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="compare with outputs of benchmarks.scaling --json")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the comparison of --fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.fit:
        parser.error("--plot draws the comparison of --fit; add --fit FILE")
    if arguments.fit:
        measured = [json.loads(line) for line in arguments.fit.read_text().splitlines()]
        rows = fitted(measured)
        if arguments.plot:
            plot(measured, arguments.plot)
        title = "Predicted and measured steps"
    else:
        sizes, methods = arguments.sizes.split(","), arguments.methods.split(",")
        rows = rows_of(sizes, methods, arguments.tokens, arguments.rank, arguments.seq_len)
        title = f"A model, not a measurement: {arguments.tokens} tokens per process, rank {arguments.rank}"
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows, title)


if __name__ == "__main__":
    main()
