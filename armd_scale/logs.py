"""Lines that the processes of a job print, through the standard library's logging.

    2026-11-27 18:30:01 INFO rank 0 train: resumed from runs/some/checkpoints/step-00001000

Every line has a time, a level, the rank and a topic: the last part of the name of its logger, ``armd_scale.TOPIC``.
``configure`` is called in each process; the loggers of other packages stay as they are.
"""

import contextlib
import logging
import re
from collections import deque
from typing import NamedTuple

TRAIN = logging.getLogger("armd_scale.train")
CHECKPOINT = logging.getLogger("armd_scale.checkpoint")
DATA = logging.getLogger("armd_scale.data")
EXPORT = logging.getLogger("armd_scale.export")
JOB = logging.getLogger("armd_scale.job")

ONCE = {"once": True}
"""``extra`` of a line that is printed once in a process: ``TRAIN.warning(..., extra=ONCE)``."""

_ROOT = logging.getLogger("armd_scale")
_LINE = re.compile(r"(\S+ \S+) (DEBUG|INFO|WARNING|ERROR|CRITICAL) (?:rank (\d+) )?(\w+): (.*)")
_MOST_WAITING = 100_000


class Line(NamedTuple):
    """A line of a log."""

    time: str
    level: str
    rank: int | None
    topic: str
    message: str


def configure(rank: int | None = None) -> None:
    """Print the lines of this process on its standard output.

    ``rank``: the rank in its job, None for a process that has none. Ranks other than 0 print warnings and errors only.
    A second call changes the rank; lines that wait for room on the disk are kept.
    """
    process = "" if rank is None else f"rank {rank} "
    form = f"%(asctime)s %(levelname)s {process}%(topic)s: %(message)s"
    _PRINTER.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S"))
    _ROOT.addHandler(_PRINTER)
    _ROOT.setLevel(logging.WARNING if rank else logging.INFO)
    _ROOT.propagate = False  # DeepSpeed and others may have given the root logger a handler


def parse(text: str) -> Line | None:
    """A line that a process has printed; None for a line that does not come from here."""
    match = _LINE.fullmatch(text)
    if match is None:
        return None
    time, level, rank, topic, message = match.groups()
    return Line(time, level, int(rank) if rank else None, topic, message)


class _Printer(logging.Handler):
    """Prints lines. A line that cannot be printed, because the disk is full say, is printed before the next line."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[str] = deque(maxlen=_MOST_WAITING)
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            record.topic = record.name.rpartition(".")[2]
            message = record.getMessage()
            if getattr(record, "once", False):
                if message in self._printed:
                    return
                self._printed.add(message)
            self._waiting.append(self.format(record))
            with contextlib.suppress(OSError):
                while self._waiting:
                    _print(self._waiting[0])
                    self._waiting.popleft()
        except Exception:
            self.handleError(record)


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except UnicodeError:
        print(line.encode("ascii", "backslashreplace").decode(), flush=True)
    except ValueError:  # the stream is closed: nothing can be printed any more
        pass


_PRINTER = _Printer()
