"""Measurements in separate processes: ``run_in_process`` starts a process that runs this module."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from armd_scale.errors import UserError
from armd_scale.processes import die_with_parent


def run_in_process(work: str, threads: int = 1, sees_gpu: bool = True, **arguments: Any) -> Any:
    """Call the function ``work`` ("package.module.function") on ``threads`` cores of their own; return its result."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if not sees_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if not work.startswith("data_pipeline."):
        arguments["threads"] = threads

    def start() -> None:
        os.sched_setaffinity(0, cores)
        die_with_parent()

    done = subprocess.run(
        [sys.executable, "-m", "armd_scale.benchmarks.process", work, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=start,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise UserError(f"the measurement {work} failed: {last[0].strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int:
    """Resident bytes of this process without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    module, _, name = sys.argv[1].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    print(json.dumps(function(**json.loads(sys.argv[2]))))
