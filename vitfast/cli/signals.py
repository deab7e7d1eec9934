"""SIGINT, SIGTERM and SIGHUP as one exception, so that a command that is told to stop keeps what it has done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal came; `code` is the exit code that says which: 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code for an interruption."""
    return error.code if isinstance(error, Stopped) else 128 + signal.SIGINT


class Stopping:
    """The signals that came while a command ran."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def check(self) -> None:
        """Raise Stopped if a signal came: what the handler raised is lost if it came in an interpreter's callback."""
        if self.numbers:
            raise Stopped(self.numbers[0])

    def _handle(self, number: int, _: object) -> None:
        self.numbers.append(number)
        if len(self.numbers) == 1:
            raise Stopped(number)
        if len(self.numbers) > 2:  # the second is often the first again, passed on by a parent; the third is impatience
            os._exit(128 + number)


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """Raise Stopped at the first signal, ignore the second, end the process at the third.

    A signal that is ignored already (by nohup, or in the background of a script) stays so.
    """
    state = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, state._handle)
    try:
        yield state
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that was not set from Python cannot be set from it
                signal.signal(number, handler)
