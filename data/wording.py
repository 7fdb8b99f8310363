"""Numbers of things in messages, and settings as flags of a command."""

import argparse
import re
import sys
from typing import NoReturn


def counted(number: int, noun: str, ending: str = "s") -> str:
    """`number` and `noun`, with `ending` if there is more than one or none: "1 file", "1,024 batches"."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def exit_with(message: str, arguments: argparse.Namespace) -> NoReturn:
    """Print `message` to standard error and exit with 2. Settings data.KEY among `arguments` are named as flags."""

    def named(found: re.Match) -> str:
        return f"--{found[1].replace('_', '-')}" if found[1] in arguments else found[0]

    print(re.sub(r"\bdata\.(\w+)", named, message), file=sys.stderr)
    sys.exit(2)
