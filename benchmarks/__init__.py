"""Benchmark commands that print a table or JSON, and the libraries that they share."""

import math
import sys
from typing import NoReturn


def refuse_to_run(module: str, command: str) -> NoReturn:
    """End with exit code 2: ``benchmarks.<module>`` is a library. The message names the ``command`` that uses it."""
    print(f"benchmarks.{module} is a library and no command; python -m benchmarks.{command} uses it", file=sys.stderr)
    sys.exit(2)


def plain(value: float) -> str:
    """``value`` with four significant digits, and all digits before the decimal point: 0.1235, 12,346.

    Numbers below 0.0001 are written with an exponent.
    """
    if not math.isfinite(value) or abs(value) < 1e-4:
        return f"{value:.4g}"
    text = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
