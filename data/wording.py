"""The wording of messages: numbers of things, commands to paste, settings as flags of a command."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NoReturn


def counted(number: int, noun: str, ending: str = "s") -> str:
    """`number` and `noun`, with `ending` unless `number` is 1: "1 file", "1,024 batches"."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def python_command(module: str, *arguments: str) -> str:
    """The command that runs `module` with this Python, to be pasted into a shell in the current folder."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return shlex.join([python, "-m", module, *arguments])


def exit_with(message: str, arguments: argparse.Namespace) -> NoReturn:
    """Print `message` to standard error and exit with 2. data.KEY is printed as --KEY if `arguments` has that flag."""

    def named(found: re.Match) -> str:
        return f"--{found[1].replace('_', '-')}" if found[1] in arguments else found[0]

    print(re.sub(r"\bdata\.(\w+)", named, message), file=sys.stderr)
    sys.exit(2)
