"""Benchmark commands that print a table or JSON, and the libraries that they share."""

import sys
from typing import NoReturn


def refuse_to_run(module: str, command: str) -> NoReturn:
    """End with exit code 2: ``benchmarks.<module>`` is a library. The message names the ``command`` that uses it."""
    print(f"benchmarks.{module} is a library and no command; python -m benchmarks.{command} uses it", file=sys.stderr)
    sys.exit(2)
