"""Measurements that need a GPU: exactness, memory, speed, waits and more.

    python -m benchmarks.gpu                                         all sections that fit into --budget
    python -m benchmarks.gpu --only memory,step_times --budget 560   some sections; a name selects all with that prefix
    python -m benchmarks.gpu --dry                                   tiny sizes, to test the benchmark itself
    python -m benchmarks.gpu --written runs/gpu/gpu.json             the page docs/gpu.md and its pictures, from results

Results are written to gpu.json in the folder --out, row by row. A section that runs again replaces only its own earlier
results, so several calls fill one file. Nothing is downloaded. Exit code: 0, 1 if something failed, 2 without a GPU.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.sections import SECTIONS, chosen

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = """\
No GPU that torch can use is here: torch.cuda.is_available() says no.
On a machine with an NVIDIA GPU, look at nvidia-smi (is there a driver, and is it new enough?) and at
python -c "import torch; print(torch.__version__, torch.version.cuda)" (is it a CUDA build?).
To try the benchmark itself without a GPU: python -m benchmarks.gpu --dry"""


def parser() -> argparse.ArgumentParser:
    width = max(map(len, SECTIONS))
    listed = "\n".join(f"  {s.name:<{width}}  {s.seconds:>4} s  {s.question}" for s in SECTIONS.values())
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"sections, the seconds each should take on an H100, and its question:\n{listed}",
    )  # fmt: skip
    p.add_argument("--only", default="", metavar="A,B", help="these sections (default: all)")
    p.add_argument("--skip", default="", metavar="C", help="not these")
    p.add_argument("--budget", type=float, default=1500, metavar="SECONDS", help="for all of them (default 1500)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/gpu or runs/gpu-dry; with --written, docs")
    p.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU if need be: its numbers mean nothing")
    p.add_argument("--written", type=Path, metavar="FILE", help="make the page from these results, measure nothing")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(arguments)
    try:
        if args.written:
            from benchmarks.gpu.page import write_page

            print(write_page(args.written, args.out or ROOT / "docs"))
            return 0
        sections = chosen(args.only, args.skip)
    except ValueError as error:
        p.error(str(error))
    import torch

    if not args.dry and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    # As ./launch.sh does, and where neither name is set: torch before 2.9 knew the second alone.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    from benchmarks.gpu.results import Results
    from benchmarks.gpu.runner import run_all

    try:
        results = Results(args.out or ROOT / "runs" / ("gpu-dry" if args.dry else "gpu"), args.dry)
    except ValueError as error:
        p.error(str(error))
    good = run_all(sections, results, args.budget)
    print(f"results: {results.path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
