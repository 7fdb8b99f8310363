"""SIGTERM, SIGUSR1 and Ctrl-C stop a run after the current step; a second Ctrl-C stops it at once."""

import signal
import sys
import time

EXIT_CODE = 85  # of a run that a signal stopped after it saved its state; the same command resumes it


class StopRequest:
    """True once a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        # One Ctrl-C can arrive twice: from the terminal, and from a launcher that passes it on.
        if self.signal is not None and number == signal.SIGINT and time.monotonic() - self._since > 1.0:
            sys.exit(128 + number)
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()

    def __bool__(self) -> bool:
        return self.signal is not None
