"""What a step should take on machines that nobody here has: a model from counted FLOPs and bytes, not a measurement.

python -m benchmarks.roofline [--sizes 1b,7b,13b] [--methods adamw,galore,grass] [--tokens 4096] [--json]
python -m benchmarks.roofline --fit docs/scaling.jsonl     # the same model against what benchmarks.scaling measured

One process alone takes  F + B + O:  forward and backward by their FLOPs at EFFICIENCY of the peak, the optimizer by the
bytes that it moves through the memory. Under DDP the gradients travel while the backward goes on, all but those of the
embedding, which come last:  F + max(B, C - C_last) + C_last + O,  with C = 2 (N - 1) / N · bytes / link (a ring).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.steps import METHODS, configuration
from models.flops import flops_per_token
from models.grass_linear import GrassLinear
from pretrain.config.schema import BaselineConfig
from pretrain.runs.figures import new_figure, save
from pretrain.setup.model import outline

EFFICIENCY = 0.5  # of the peak, in matrix products: what well-tuned LLaMA training reaches on these GPUs
ADAM_PASSES = 7  # reads of the gradient, weight and two moments, writes of all but the gradient


@dataclass(frozen=True)
class Machine:
    """``processes`` GPUs of ``flops`` (bf16, dense) and ``memory`` bytes/s each, that send ``link`` bytes/s each.

    Peaks are the makers' data sheets'; links are what all-reduces are known to reach, not the wire's figure.
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
    """What a step of one process costs: FLOPs of forward and backward a token, and bytes.

    gradients  that are all-reduced;  last  of them those of the embedding, which no backward is left to hide;
    optimizer  through the memory, of the optimizer's step, with GaLore's two projections as FLOPs in ``fixed``.
    """

    forward: float
    backward: float
    gradients: float
    last: float
    optimizer: float
    fixed: float = 0.0


def work_of(method: str, size: str, rank: int, seq_len: int, dtype: str = "bfloat16") -> Work:
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
    """The model of the module's docstring: seconds of the parts, of sending everything, of sending what comes last."""
    return forward_s + max(backward_s, all_s - last_s) + last_s + rest_s


def predict(work: Work, machine: Machine, tokens: int) -> float:
    """Seconds of a step in which every process has ``tokens`` tokens."""
    speed, ring = machine.flops * EFFICIENCY, 2 * (machine.processes - 1) / machine.processes / machine.link
    return step_seconds(
        work.forward * tokens / speed, work.backward * tokens / speed,
        work.optimizer / machine.memory + work.fixed / speed, ring * work.gradients, ring * work.last,
    )  # fmt: skip


def rows_of(sizes: list[str], methods: list[str], tokens: int, rank: int, seq_len: int) -> list[dict[str, Any]]:
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
    """Seconds of a regular step of a method by Mbit/s: measured ones, and the model's.

    What a process computes is taken from the measured step of the fastest link, as what is left of it when the sending
    of what comes last is taken off; the others are then predictions.
    """

    measured: dict[float, float]
    work: Work
    ring: float  # seconds that sending and summing a byte takes at 1 Mbit/s

    @property
    def fastest(self) -> float:
        return max(self.measured)

    def model(self, mbit: float) -> float:
        computed = self.measured[self.fastest] - self.ring * self.work.last / self.fastest
        forward = self.work.forward / (self.work.forward + self.work.backward) * computed
        sent, last = (self.ring * size / mbit for size in (self.work.gradients, self.work.last))
        return step_seconds(forward, computed - forward, 0.0, sent, last)


def curves(measured: list[dict[str, Any]]) -> dict[str, Curve]:
    """By method, from outputs of benchmarks.scaling."""
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
    """Predicted seconds of a regular step beside the measured ones, of outputs of benchmarks.scaling."""
    return [
        {"method": method, "mbit": mbit, "regular_s": seconds, "model_s": curve.model(mbit),
         "model/measured": curve.model(mbit) / seconds}
        for method, curve in curves(measured).items()
        for mbit, seconds in sorted(curve.measured.items())
        if mbit != curve.fastest
    ]  # fmt: skip


def plot(measured: list[dict[str, Any]], file: Path) -> None:
    """Tokens/s of regular steps against the bandwidth: measured points, and the model's lines, up to the fastest link.

    Beyond it the model would take for computing what may still be waiting for the link.
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
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b,7b,13b", help="models of conf/model")
    parser.add_argument("--methods", default="adamw,galore,grass,grass+head", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rank", type=int, default=512, help="of GaLore and Grass (default 512)")
    parser.add_argument("--tokens", type=int, default=4096, help="of every process in a step (default 4096)")
    parser.add_argument("--seq-len", type=int, default=256, help="(default 256, as in the papers)")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="outputs of benchmarks.scaling --json, a line each")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where to draw what --fit compares")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.fit:
        parser.error("--plot draws what --fit compares; add --fit FILE")
    if arguments.fit:
        measured = [json.loads(line) for line in arguments.fit.read_text().splitlines()]
        rows = fitted(measured)
        if arguments.plot:
            plot(measured, arguments.plot)
        title = "The model against measured steps"
    else:
        sizes, methods = arguments.sizes.split(","), arguments.methods.split(",")
        rows = rows_of(sizes, methods, arguments.tokens, arguments.rank, arguments.seq_len)
        title = f"A model, not a measurement: {arguments.tokens} tokens a process, rank {arguments.rank}"
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows, title)


if __name__ == "__main__":
    main()
