"""Processes that end with their parent, and signals that wait."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a program to end."""


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent ends (Linux).

    ``parent``: process id of the parent; this process ends at once if that one is no longer its parent.
    """
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent not in (None, os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def postponed_signals() -> Iterator[None]:
    """Postpone signals that ask this program to end to the end of the block, and raise ``KeyboardInterrupt`` there."""
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    heeded = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in heeded:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
