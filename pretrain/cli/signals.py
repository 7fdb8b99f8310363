"""SIGTERM, SIGUSR1 and Ctrl-C stop a run after the current step. A second Ctrl-C stops it at once."""

import os
import signal
import sys
import time
from contextlib import suppress

from pretrain.cli.ranks import is_main_from_env

EXIT_CODE = 85  # of a run that saved and stopped after a signal; the same command resumes it


class StopRequest:
    """Whether a signal has asked the run to stop: ``bool(request)`` is True after SIGTERM, SIGUSR1 or Ctrl-C.

    The message that a signal prints needs ``step``: the number (from 1) of the step after which the run saves and ends.
    This is the running step or, during a validation, the next one; None if the run saves next, as after its last step.
    ``signal`` is the first signal received, None before.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def listen(self) -> None:
        """Handle the three signals from now on; call in the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        # One Ctrl-C can arrive twice: from the terminal, and from a launcher that passes it on.
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self._since > 1.0:
            sys.exit(128 + number)
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            if is_main_from_env():
                self._acknowledge()

    def _acknowledge(self) -> None:
        """Print at once what happens next. Bypasses Python's streams, which may be in the middle of a line."""
        doing = "saving" if self.step is None else f"finishing step {self.step}, then saving"
        clear = "\r\033[2K" if os.isatty(2) else ""  # the progress bar is drawn again on the next line
        with suppress(OSError):
            os.write(2, f"{clear}{doing}; Ctrl-C again stops at once without saving\n".encode())

    def __bool__(self) -> bool:
        return self.signal is not None
