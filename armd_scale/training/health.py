"""Health of a run: signals, a watchdog against hangs, heartbeats, slow ranks and loss spikes.

Each rank monitors itself. Ranks exchange the flags of signals together with the loss of a step (``Engine.train_step``).
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
"""Flags of a rank that received Slurm's warning before the time limit, and of a rank that was asked to stop. The flags
of ranks can be summed."""
_WINDOW = 64  # applied steps whose median loss sets the spike limit
_LEAST = 16  # applied steps that the spike limit needs
_SLOW = 1.5  # smallest step time of a slow rank, as a multiple of the median
_SLOW_SECONDS = 0.1  # smallest excess of a slow rank over the median: less is noise
_BEAT_SECONDS = 5.0


class Signals:
    """Turns signals into flags that the training loop reads after a step.

    SIGUSR2 is Slurm's warning before the time limit and before preemption, as submitit requests it. SIGTERM means that
    the job is cancelled or preempted.
    """

    def __init__(self) -> None:
        self.flag = 0
        for number, flag in ((signal.SIGUSR2, REQUEUE), (signal.SIGTERM, STOP)):
            signal.signal(number, lambda *_, flag=flag: setattr(self, "flag", flag))


class Watchdog:
    """Writes the stacks of this rank into the run directory and ends the process when a step takes too long.

    Runs in a C thread that does not need Python's lock. A rank whose process is stopped writes no stacks, but its peers
    wait for the rank, write their stacks and end, and Slurm then ends the whole job.
    """

    def __init__(self, run: RunDirectory, rank: int, train: TrainConfig) -> None:
        self._path = run.stack_path(rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        self._train = train
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self.arm(10)

    def step(self, seconds: float) -> None:
        """Record that a step took ``seconds``; the next step may take ``hang_factor`` times the median."""
        self._seconds.append(seconds)
        self.go_on()

    def go_on(self) -> None:
        """Set the limit for the next step."""
        limit = max(self._train.hang_seconds, self._train.hang_factor * statistics.median(self._seconds))
        faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    def arm(self, times: float) -> None:
        """Set the limit for work other than a step: ``times`` x ``hang_seconds``."""
        faulthandler.dump_traceback_later(times * self._train.hang_seconds, exit=True, file=self._file)

    def close(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink(missing_ok=True)


class Heartbeat:
    """Rewrites a small file every few seconds with the host, the process and the last step of this rank."""

    def __init__(self, run: RunDirectory, rank: int) -> None:
        self._path = run.heartbeat_path(rank)
        self._facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._written = -math.inf
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int) -> None:
        """Record that this rank has finished ``step`` steps."""
        now = time.monotonic()
        if now - self._written < _BEAT_SECONDS:
            return
        self._written = now
        partial = self._path.with_suffix(".partial")
        with contextlib.suppress(OSError):  # a full disk is reported where it matters
            partial.write_text(json.dumps({**self._facts, "step": step, "time": time.time()}), encoding="utf-8")
            os.replace(partial, self._path)


class Spikes:
    """Computes the spike limit: the largest loss with which a step is applied.

    The limit of a step is the median loss of recent applied steps plus ``nats``. Step n + 1 starts before the loss of
    step n is read, so its limit ignores step n. All ranks see the same losses and compute the same limit. Checkpoints
    hold ``state``.
    """

    def __init__(self, nats: float | None, state: dict[str, Any]) -> None:
        self._nats = nats
        recent = state.get("recent_losses", [])
        # Checkpoints of version 0.1.0 hold losses without steps.
        pairs = [entry if isinstance(entry, list) else [-1, entry] for entry in recent]
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
        """Record the loss of an applied step."""
        self._recent.append([step, loss])


def slow_ranks(seconds: np.ndarray) -> dict[int, float]:
    """Slow ranks: rank -> its step time as a multiple of the median."""
    median = max(float(np.median(seconds)), 1e-9)
    slow = (seconds > _SLOW * median) & (seconds - median > _SLOW_SECONDS)
    return {int(rank): float(seconds[rank] / median) for rank in np.flatnonzero(slow)}
