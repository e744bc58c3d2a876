"""What keeps a long run alive: signals, a watchdog against hangs, heartbeats, slow ranks, and losses that run away.

Every rank looks after itself; what ranks must agree on travels with the loss of a step (``Engine.train_step``).
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import statistics
import time
from collections import deque
from typing import Any

import numpy as np

from armd_scale.config import TrainConfig
from armd_scale.run_directory import RunDirectory

REQUEUE, STOP = 1, 1 << 20
"""Flags of a rank that was warned of the end of its time, and of one that was told to end; they can be summed."""
_WINDOW = 64  # applied steps whose median loss is the measure of a spike
_LEAST = 16  # steps before which nothing is a spike
_SLOW = 1.5  # times the median of all ranks
_SLOW_SECONDS = 0.1  # and so much more than it: less is noise
_BEAT_SECONDS = 5.0


class Signals:
    """Turns signals into flags that are looked at after a step.

    SIGUSR2 is Slurm's warning before the time limit and before preemption, as submitit asks for it; SIGTERM means that
    the job is cancelled or preempted.
    """

    def __init__(self) -> None:
        self.flag = 0
        for number, flag in ((signal.SIGUSR2, REQUEUE), (signal.SIGTERM, STOP)):
            signal.signal(number, lambda *_, flag=flag: setattr(self, "flag", flag))


class Watchdog:
    """Writes the stacks of this rank into the run folder and ends it when nothing has finished for too long.

    It runs in a thread of C that needs no lock of Python. A rank that is stopped altogether writes nothing, but its
    peers wait for it, write and end, and Slurm ends it with them.
    """

    def __init__(self, run: RunDirectory, rank: int, train: TrainConfig) -> None:
        self._path = run.stack_path(rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        self._train = train
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self.arm(10)

    def step(self, seconds: float) -> None:
        """A step has finished after ``seconds``; the next one may take ``hang_factor`` times the median."""
        self._seconds.append(seconds)
        self.go_on()

    def go_on(self) -> None:
        """A step begins."""
        limit = max(self._train.hang_seconds, self._train.hang_factor * statistics.median(self._seconds))
        faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    def arm(self, times: float) -> None:
        """Something else than a step begins, which may take ``times`` as long as the longest step."""
        faulthandler.dump_traceback_later(times * self._train.hang_seconds, exit=True, file=self._file)

    def close(self) -> None:
        """Watch no more."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink(missing_ok=True)


class Heartbeat:
    """A small file a rank, written again every few seconds: where the rank is and how far it has come."""

    def __init__(self, run: RunDirectory, rank: int) -> None:
        self._path = run.heartbeat_path(rank)
        self._facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._written = -math.inf
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int) -> None:
        """This rank has finished ``step`` steps."""
        now = time.monotonic()
        if now - self._written < _BEAT_SECONDS:
            return
        self._written = now
        partial = self._path.with_suffix(".partial")
        with contextlib.suppress(OSError):  # a full disk is reported where it matters
            partial.write_text(json.dumps({**self._facts, "step": step, "time": time.time()}), encoding="utf-8")
            os.replace(partial, self._path)


class Spikes:
    """The loss above which a step is not applied: far above those of the last applied steps.

    A step begins before the one before it is known, so its limit follows from those before that one, whether others are
    known by now or not. All ranks see the same losses, so all judge alike. ``state`` belongs into checkpoints.
    """

    def __init__(self, nats: float | None, state: dict[str, Any]) -> None:
        self._nats = nats
        recent = state.get("recent_losses", [])
        # Up to 0.1.0, checkpoints held the losses without their steps.
        pairs = [one if isinstance(one, list) else [-1, one] for one in recent]
        self._recent: deque[list[float]] = deque(pairs, maxlen=_WINDOW + 1)

    @property
    def state(self) -> dict[str, Any]:
        return {"recent_losses": list(self._recent)}

    def limit(self, step: int) -> float:
        """The largest loss with which ``step`` is applied."""
        known = [loss for before, loss in self._recent if before < step - 1][-_WINDOW:]
        if self._nats is None or len(known) < _LEAST:
            return math.inf
        return statistics.median(known) + self._nats

    def applied(self, step: int, loss: float) -> None:
        """A step of this loss was applied."""
        self._recent.append([step, loss])


def slow_ranks(seconds: np.ndarray) -> dict[int, float]:
    """Ranks whose own work takes much longer than the median's, each with how many times as long."""
    median = max(float(np.median(seconds)), 1e-9)
    slow = (seconds > _SLOW * median) & (seconds - median > _SLOW_SECONDS)
    return {int(rank): float(seconds[rank] / median) for rank in np.flatnonzero(slow)}
