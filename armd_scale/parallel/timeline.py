"""When a rank's forward and backward passes ran, as Megatron-Core's schedules tell their timers."""

import time
from typing import NamedTuple


class Timed(NamedTuple):
    """A pass of one micro-batch; seconds of a clock that all processes of a machine share."""

    backward: bool
    start: float
    stop: float


class Recorder:
    """What the schedules expect of ``timers``: ``timers(name, log_level=...).start()`` and ``.stop()``."""

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
