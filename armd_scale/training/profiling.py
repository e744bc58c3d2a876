"""Profiles of chosen steps, and GPU memory."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from armd_scale.config import RunConfig
from armd_scale.logs import TRAIN as log

MEMORY = ("memory_allocated_gb", "memory_reserved_gb", "memory_peak_gb")
"""Names of the figures of ``gpu_memory`` in a record, in gigabytes of 10^9 bytes: memory that PyTorch has allocated and
reserved, and the peak of the allocated memory since the last record. A record holds their maxima over the ranks."""


class Profiler:
    """Writes a Chrome trace of the CPU and GPU work of the steps of ``train.profile``.

    ``active``: whether this rank writes a trace.
    """

    def __init__(self, config: RunConfig, rank: int, active: bool) -> None:
        self._steps = config.train.profile if active else None
        self._run, self._rank = config.run_directory, rank
        self._profile: profile | None = None

    def step(self, step: int) -> AbstractContextManager:
        """Context manager around step ``step`` of the run, counted from 1."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return contextlib.nullcontext()
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        return record_function(f"step {step}")

    def ends_with(self, step: int) -> bool:
        """Whether ``step`` is the last step to profile, after which ``close`` writes the trace."""
        return self._profile is not None and self._steps is not None and step >= self._steps[1]

    def close(self) -> None:
        """Wait for the GPU and write the trace, if a step was profiled; no further step is profiled."""
        if self._profile is None or self._steps is None:
            return
        path = self._run.profile_path(self._rank, *self._steps)
        try:
            self._profile.stop()
            path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(path))
            log.info("profile of steps %d to %d: %s", *self._steps, path)
        except (OSError, RuntimeError) as error:
            log.warning("profile %s not written, training continues: %s", path, error)
        self._profile = self._steps = None


def gpu_memory(device: torch.device) -> Sequence[float]:
    """The figures ``MEMORY`` of this rank, empty without a GPU. Resets the peak."""
    if device.type != "cuda":
        return ()
    figures = (
        torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats(device)
    return [count / 1e9 for count in figures]


def memory_record(figures: np.ndarray) -> dict[str, float]:
    """Fields of a record from the ``gpu_memory`` of all ranks [ranks, figures]."""
    return dict(zip(MEMORY, figures.max(axis=0).tolist(), strict=False))
