"""Side-by-side measurements, each a module that prints a table, or JSON."""

import sys
from typing import NoReturn


def refuse_to_run(module: str, command: str) -> NoReturn:
    """End ``python -m benchmarks.<module>``, a library of the command ``python -m benchmarks.<command>``."""
    print(f"benchmarks.{module} is a library and no command; python -m benchmarks.{command} uses it", file=sys.stderr)
    sys.exit(2)
