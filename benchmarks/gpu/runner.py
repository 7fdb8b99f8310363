"""Runs sections one after the other, each in a process of its own.

An error on a GPU can leave its process without a usable device, and a hang would take all the time there is: so a
section that crashes or does not end costs its own results alone.
"""

import multiprocessing
import time
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.gpu.results import DONE, Results, Row
from benchmarks.gpu.sections import Section

PATIENCE, LEAST_LIMIT = 5, 600.0  # a section is ended after so many times the seconds it should take, or these
ABOUT, ROW, ENDED = "about", "row", "ended"  # kinds of what a section's process sends


def run_all(sections: Sequence[Section], results: Results, budget: float) -> bool:
    """Run ``sections`` within ``budget`` seconds. Returns whether nothing failed; skipping is no failure."""
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
    """Run a section for at most ``limit`` seconds. Returns whether neither it nor one of its rows failed."""
    began = time.monotonic()
    results.begin(section.name)
    context = multiprocessing.get_context("spawn")  # the driver of a GPU does not survive a fork
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
    """Take the section's rows as they come; returns how it ended, None when its process died without a word."""
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
    shown = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
    return " ".join(shown)[:400]


def work(connection: Connection, section: Section, dry: bool, folder: Path, seconds: float) -> None:
    """The process of a section: sends what it runs on, its rows and, last, how it ended."""
    from benchmarks.gpu.bench import Bench, in_short, quiet

    quiet()
    bench = Bench.make(dry, folder, seconds, lambda row: connection.send((ROW, row)))
    connection.send((ABOUT, bench.about()))
    try:
        import_module(f"benchmarks.gpu.{section.module}").run(bench, section.case)
        ended = DONE
    except Exception as error:
        ended = f"failed: {in_short(error)}"
    connection.send((ENDED, ended))
    connection.close()
