"""FLOPs of a training step by part, and the largest speed-up that Grass can reach, computed from the shapes.

python -m benchmarks.limit [--sizes 60m,130m,350m,1b,7b] [--rank 128] [--seq-len 256] [--plot limit.png]

Each linear layer needs three matmuls of its size: the forward, the gradient of its input, and the gradient of its
weight. With Grass, the third matmul has r / min(m, n) of its size, for rank r and an m × n weight. Embeddings are
lookups and need no FLOPs. No step is run.
"""

import argparse
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.steps import configuration
from models.flops import flops_per_token
from models.grass_linear import GrassLinear
from pretrain.runs.figures import new_figure, save
from pretrain.setup.model import outline

PARTS = ("forward", "input gradient", "weight gradient", "head", "attention")


def parts_of(method: str, size: str, rank: int, seq_len: int) -> dict[str, float]:
    """Return the FLOPs per token by part: the three matmuls of all attention and MLP linears, the head, attention."""
    config, _ = configuration(method, rank, [f"model=llama_{size}"])
    model = outline(config)
    head = model.lm_head
    linears = [(m.in_features * m.out_features, m) for n, m in model.named_modules() if n.endswith("_proj")]
    whole = 2.0 * sum(weights for weights, _ in linears)
    trained = 2 * sum(w * m.rank / m.selectable if isinstance(m, GrassLinear) else w for w, m in linears)
    share = head.rank / head.selectable if isinstance(head, GrassLinear) else 1
    parts = whole, whole, trained, 2 * (2 + share) * head.in_features * head.out_features
    return dict(zip(PARTS, (*parts, flops_per_token(model, seq_len) - sum(parts)), strict=True))


def plot(found: dict[tuple[str, str], dict[str, float]], file: Path) -> None:
    """Draw the parts of each size and method, as shares of the FLOPs of a full-rank step."""
    labels, left = ["  ".join(names) for names in found], [0.0] * len(found)
    dense = [sum(found[size, "adamw"].values()) for size, _ in found]
    with new_figure(height=1.3 + 0.22 * len(found), grid="x") as figure:
        axis = figure.add_subplot()
        for part in PARTS:
            shares = [parts[part] / whole for parts, whole in zip(found.values(), dense, strict=True)]
            axis.barh(labels, shares, left=left, label=part)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axis.invert_yaxis()
        axis.set_title("FLOPs of a training step, relative to full-rank AdamW")
        figure.legend(ncols=3, loc="outside lower center")
        save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="60m,130m,350m,1b,7b", help="model sizes (default %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="rank of Grass (default 128)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the parts")
    arguments = parser.parse_args()
    every = product(arguments.sizes.split(","), ("adamw", "grass", "grass+head"))
    found = {(size, m): parts_of(m, size, arguments.rank, arguments.seq_len) for size, m in every}
    table = Table("size", "method", *PARTS, "GFLOP/token", "speed-up at best")
    for (size, method), parts in found.items():
        total, dense = sum(parts.values()), sum(found[size, "adamw"].values())
        shares = (f"{part / total:.1%}" for part in parts.values())
        table.add_row(size, method, *shares, f"{total / 1e9:.3f}", f"{dense / total:.3f}")
    Console(width=120).print(table)
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
