"""Records the times of forward and backward passes through the timers of Megatron-Core's schedules."""

import time
from typing import NamedTuple


class Timed(NamedTuple):
    """A pass of a micro-batch, in seconds of a clock that all processes of a machine share."""

    backward: bool
    start: float
    stop: float


class Recorder:
    """The interface of ``timers`` in the schedules: ``timers(name, log_level=...).start()`` and ``.stop()``."""

    _NAMES = ("forward-compute", "backward-compute")

    def __init__(self) -> None:
        self.passes: list[Timed] = []
        self._name = ""
        self._started: dict[str, float] = {}

    def __call__(self, name: str, log_level: int = 0) -> "Recorder":
        self._name = name
        return self

    def start(self, barrier: bool = False) -> None:
        self._started[self._name] = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        if self._name in self._NAMES:
            began = self._started[self._name]
            self.passes.append(Timed(self._name == self._NAMES[1], began, time.perf_counter()))
