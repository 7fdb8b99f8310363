"""Report on runs and compare them: ``python -m pretrain.report runs/a runs/b …``.

Writes a page that needs no other file and no network, and its figures as PNG files. A folder that contains runs, such
as a sweep's, stands for all of them. Runs that differ only in their seed are drawn as one line with a band. Runs
need not be finished: ``--watch`` keeps the page up to date while they train.
"""

import argparse
import os
import time
from contextlib import suppress
from pathlib import Path

from pretrain.cli.errors import clear_errors


def parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").replace("``", "")
    p = argparse.ArgumentParser(
        prog="python -m pretrain.report", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs, or of sweeps")
    p.add_argument("--out", type=Path, help="the folder to write (default: report/ in the common folder of the runs)")
    p.add_argument("--watch", action="store_true", help="update the page, which reloads, every 30 seconds until Ctrl-C")
    return p


def main(argv: list[str] | None = None) -> None:
    with clear_errors():
        arguments = parser().parse_args(argv)
        from pretrain.runs.report_page import WATCH_SECONDS, write_report

        common = Path(os.path.commonpath([path.resolve() for path in arguments.runs]))
        out = arguments.out or common / "report"
        if arguments.watch:
            with suppress(KeyboardInterrupt):
                print(f"watching: open {write_report(arguments.runs, out, watched=True)}; Ctrl-C ends", flush=True)
                while True:
                    time.sleep(WATCH_SECONDS)
                    write_report(arguments.runs, out, watched=True)
            print("writing the page once more, with its charts as PNG …", flush=True)
        print(f"wrote {write_report(arguments.runs, out)}")


if __name__ == "__main__":
    main()
