"""Run sections one after the other, each in a separate process.

After an error on a GPU, a process may be unable to use the device, and a section that hangs would use up all the time.
In separate processes, a section that crashes or hangs loses only its own results.
"""

import multiprocessing
import time
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import plain
from benchmarks.gpu.results import DONE, Results, Row
from benchmarks.gpu.sections import Section

PATIENCE, LEAST_LIMIT = 5, 600.0  # stop a section after 5 times its expected seconds, at least 600
ABOUT, ROW, ENDED = "about", "row", "ended"  # kinds of messages from a section's process


def run_all(sections: Sequence[Section], results: Results, budget: float) -> bool:
    """Run ``sections`` within ``budget`` seconds. Return whether none failed; skipped sections do not count."""
    end, good = time.monotonic() + budget, True
    for section in sections:
        left = end - time.monotonic()
        if left < section.seconds:
            print(
                f"{section.name}: skipped, it may take {section.seconds} s and {max(left, 0):.0f} s are left",
                flush=True,
            )
            continue
        good &= run_one(section, results, min(left, max(PATIENCE * section.seconds, LEAST_LIMIT)))
    return good


def run_one(section: Section, results: Results, limit: float) -> bool:
    """Run a section for at most ``limit`` seconds. Return whether the section and all of its rows succeeded."""
    began = time.monotonic()
    results.begin(section.name)
    context = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, section, results.dry, results.path.parent, limit))
    process.start()
    theirs.close()
    try:
        ended = _receive(ours, results, began + limit)
    finally:
        if process.is_alive():
            process.join(timeout=10)
        process.kill()
        process.join()
    if ended is None:
        ended = f"its process ended with code {process.exitcode}"
    results.end(time.monotonic() - began, ended)
    print(f"{section.name}: {ended}", flush=True)
    return ended == DONE and not any("fails" in row for row in results.current["rows"])


def _receive(connection: Connection, results: Results, end: float) -> str | None:
    """Store the section's rows as they arrive. Return how it ended, or None if its process died without a message."""
    while True:
        if not connection.poll(max(0.0, end - time.monotonic())):
            return "stopped, for it took too long"
        try:
            kind, message = connection.recv()
        except EOFError:
            return None
        if kind == ENDED:
            return message
        if kind == ABOUT:
            results.current |= message
            continue
        results.add(message)
        print(f"{results.name}: {_in_a_line(message)}", flush=True)


def _in_a_line(row: Row) -> str:
    shown = (f"{key}={plain(value)}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
    return " ".join(shown)[:400]


def work(connection: Connection, section: Section, dry: bool, folder: Path, seconds: float) -> None:
    """Run a section in its process: send the device, the rows and, last, how the section ended."""
    from benchmarks.gpu.bench import Bench, in_short, quiet

    quiet()
    bench = Bench(dry, folder, seconds, lambda row: connection.send((ROW, row)))
    connection.send((ABOUT, bench.about()))
    try:
        import_module(f"benchmarks.gpu.{section.module}").run(bench, section.case)
        ended = DONE
    except Exception as error:
        ended = f"failed: {in_short(error)}"
    connection.send((ENDED, ended))
    connection.close()
