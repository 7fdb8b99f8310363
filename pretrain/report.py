"""Report on runs and compare them: ``python -m pretrain.report runs/a runs/b …``.

Writes a page that needs no other file and no network, and its figures as PNG files. A folder that contains runs, such
as a sweep's, counts as all of them; runs that differ only in their seed are drawn as a band. Runs need not be finished.
"""

import argparse
import os
from pathlib import Path

from pretrain.cli.errors import clear_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m pretrain.report", description=(__doc__ or "").replace("``", ""))
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of sweeps")
    p.add_argument("--out", type=Path, help="the folder to write (default: report/ in the folder that holds all runs)")
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with clear_errors():
        from pretrain.runs.report_page import write_report  # matplotlib takes a second to import: not for --help

        common = Path(os.path.commonpath([path.resolve() for path in arguments.runs]))
        print(f"wrote {write_report(arguments.runs, arguments.out or common / 'report')}")


if __name__ == "__main__":
    main()
