"""GPU benchmark: exactness, memory, speed, waits and more.

    python -m benchmarks.gpu                                         all sections that fit into --budget
    python -m benchmarks.gpu --only memory,step_times --budget 560   some sections; a name selects all with that prefix
    python -m benchmarks.gpu --dry                                   tiny sizes, to test the benchmark itself
    python -m benchmarks.gpu --written runs/gpu/gpu.json             write docs/gpu.md and its plots from results

Results are written to gpu.json in the folder --out, row by row. A section that runs again replaces only its own earlier
results, so several calls fill one file. Nothing is downloaded. Exit code: 0, or 1 if a section failed, or 2 without a
GPU.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.sections import SECTIONS, chosen

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = """\
No GPU that torch can use was found: torch.cuda.is_available() is False.
On a machine with an NVIDIA GPU, check that nvidia-smi shows a recent driver, and that torch is a CUDA build:
python -c "import torch; print(torch.__version__, torch.version.cuda)"
To try the benchmark without a GPU: python -m benchmarks.gpu --dry"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    width = max(map(len, SECTIONS))
    listed = "\n".join(f"  {s.name:<{width}}  {s.seconds:>4} s  {s.question}" for s in SECTIONS.values())
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"sections, with the expected seconds on an H100 and the question of each:\n{listed}",
    )  # fmt: skip
    p.add_argument("--only", default="", metavar="A,B", help="run these sections (default: all)")
    p.add_argument("--skip", default="", metavar="C", help="leave out these sections")
    p.add_argument("--budget", type=float, default=1500, metavar="SECONDS", help="for all sections (default 1500)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/gpu, runs/gpu-dry, or docs (--written)")
    p.add_argument("--dry", action="store_true", help="tiny sizes, also on a CPU; the numbers mean nothing")
    p.add_argument("--written", type=Path, metavar="FILE", help="write the page from these results, measure nothing")
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
    # As in ./launch.sh, unless one of the names is set. torch before 2.9 knows only the second name.
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
