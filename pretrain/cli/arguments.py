"""Types of command-line arguments whose errors name the flag and the limits."""

import argparse
from collections.abc import Callable


def number(kind: Callable[[str], float], low: float, high: float = float("inf"), above: bool = False) -> Callable:
    """A ``type=`` for argparse: a number of ``kind`` (int or float) from ``low`` to ``high``, both included.

    Args:
        above: exclude ``low`` itself.
    """

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            most = f" and at most {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low:g}{most}")
        return value

    parse.__name__ = kind.__name__  # argparse prints this name for a text that is not a number
    return parse
