"""Types of command-line arguments that name their flag and their limits when a value is out of range."""

import argparse
from collections.abc import Callable


def number(kind: Callable[[str], float], low: float, high: float = float("inf"), above: bool = False) -> Callable:
    """An argparse type: a number of ``kind``, int or float, from ``low`` to ``high``.

    Args:
        above: ``low`` itself is not allowed.
    """

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            most = f" and at most {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low:g}{most}")
        return value

    parse.__name__ = kind.__name__  # argparse's own message for a text that is no number names it
    return parse
