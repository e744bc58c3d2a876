"""Decides whether a failed job restarts: python -m launchers.restart RUN_DIR NAME JOB CODE, exit code 0 for a restart.

A job does not restart after bad input, and after other errors that the same input repeats. After any other error a job
restarts, with a wait that doubles each time, until it has failed at the same step three times, or
``cluster.max_restarts`` times without a new checkpoint. Every decision is a line of ``restarts.jsonl``.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from armd_scale import config_files, logs
from armd_scale.config import RunConfig
from armd_scale.files import append_json_line
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest

_SAME_STEP = 3
_LONGEST_WAIT = 600.0
_HOLD_SECONDS = 300.0


class Decision(NamedTuple):
    """Restart decision for a failed job."""

    wait: float | None
    """Seconds before the restart; None: no restart."""
    reason: str
    """Why the job failed."""
    elsewhere: bool
    """Training never started; requeue on other nodes."""


def decide(config: RunConfig, step: str, job: str, code: int | None) -> Decision:
    """Decide whether job ``job`` restarts, and record the decision.

    ``step``: name of the job; ``code``: exit code, if known.
    """
    run = config.run_directory
    reason, final = _reason(run, run.error(step, job), code)
    before = [record for record in run.restarts() if record["step"] == step]
    since = before[-1]["time"] if before else 0.0
    reached = _reached(run, run.error(step, job), since) if step == "train" else 0
    checkpoint = _newest_step(run)
    record: dict[str, Any] = {
        "time": time.time(), "step": step, "job": job, "reason": reason, "reached": reached, "checkpoint": checkpoint,
    }  # fmt: skip
    failures = _failures(before, checkpoint)
    steps = [failure["reached"] for failure in failures] + [reached]
    if final:
        record["decision"] = "stops: " + reason
    elif step == "train" and steps[-_SAME_STEP:] == [reached] * _SAME_STEP and reached is not None:
        record["decision"] = reason = f"failed {_SAME_STEP} times at step {reached}: {reason}"
        final = True
    elif len(failures) >= config.cluster.max_restarts:
        record["decision"] = reason = f"failed {len(failures) + 1} times without a new checkpoint: {reason}"
        final = True
    wait = min(_LONGEST_WAIT, config.cluster.backoff_seconds * 2 ** len(failures))
    if not final:
        record["decision"] = f"starts again after {wait:.0f} s"
    append_json_line(run.restarts_path, record)
    return Decision(None if final else wait, reason, reached is None)


def note_requeue(config: RunConfig, job: str, count: int, reason: str) -> None:
    """Record requeue number ``count`` of a job, unless it is already recorded."""
    run = config.run_directory
    if any(record["job"] == job and record.get("requeues") == count for record in run.restarts()):
        return
    checkpoint = _newest_step(run)
    record = {
        "time": time.time(), "step": "train", "job": job, "reason": reason, "reached": checkpoint,
        "checkpoint": checkpoint, "requeues": count, "decision": "queued again",
    }  # fmt: skip
    append_json_line(run.restarts_path, record)


def failing(config: RunConfig, step: str, job: str) -> bool:
    """Whether a process of a job has failed while other processes may still run."""
    return config.run_directory.error(step, job) is not None or bool(config.run_directory.stacks())


def requeue() -> None:
    """Requeue this job, and wait for Slurm to end the process."""
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    hold()


def hold() -> None:
    """Wait for Slurm to end this process of a requeued job: its own exit code would end the job."""
    time.sleep(_HOLD_SECONDS)


def clear(config: RunConfig, step: str, job: str) -> None:
    """Remove the error and results of a failed job and rename its stacks, so that they do not fail its restart."""
    run = config.run_directory
    for path in [run.error_path(run.job(step, job)), *run.result_paths(step, job)]:
        path.unlink(missing_ok=True)
    for path in run.stacks().values():
        path.replace(path.with_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))


def _newest_step(run: RunDirectory) -> int | None:
    newest = manifest.readable(run)
    return run.step_of(newest) if newest else None


def _failures(before: list[dict[str, Any]], checkpoint: int | None) -> list[dict[str, Any]]:
    """The failures with a restart since the newest checkpoint, oldest first."""
    failures: list[dict[str, Any]] = []
    for record in reversed(before):
        if record["checkpoint"] != checkpoint or not record["decision"].startswith("starts again"):
            break
        failures.insert(0, record)
    return failures


def _reason(run: RunDirectory, error: dict[str, Any] | None, code: int | None) -> tuple[str, bool]:
    """Why a job failed, and whether a restart would fail again; ``error``: error of the first failed process."""
    stacks = run.stacks()
    if stacks:
        hung = ", ".join(path.stem for path in stacks.values())
        return f"a hang: no step finished; stacks of {hung} in {run.stack_path(0).parent}{_without_stacks(run)}", False
    if error is None:
        return "a process died without an error message" + (f" (exit code {code})" if code else ""), False
    return error["line"], error["permanent"]


def _without_stacks(run: RunDirectory) -> str:
    """The ranks that wrote no stacks, as a clause of the reason."""
    written = run.stacks()
    silent = [f"rank {beat['rank']} on {beat['host']}" for beat in run.heartbeats() if beat["rank"] not in written]
    return f"; no stacks from {', '.join(silent)}" if silent else ""


def _reached(run: RunDirectory, error: dict[str, Any] | None, since: float) -> int | None:
    """The last finished step, from the ``error`` of the failed rank, else from the heartbeats.

    None if no rank wrote a heartbeat ``since`` the last failure: training never started.
    """
    if error and error["reached"] is not None:
        return int(error["reached"])
    steps = [beat["step"] for beat in run.heartbeats() if beat["time"] > since]
    return max([*steps, *(record["step"] for record in run.metrics()[-1:])]) if steps else None


def main() -> int:
    run_dir, step, job, code = sys.argv[1:]
    logs.configure()
    config = config_files.load_run(RunDirectory(Path(run_dir)))
    wait, reason, elsewhere = decide(config, step, job, int(code))
    if wait is None:
        logs.JOB.error("the job does not restart: %s", reason)
        return 1
    logs.JOB.warning("the job restarts in %.0f s: %s", wait, reason)
    time.sleep(wait)
    clear(config, step, job)
    if elsewhere:
        requeue()
    return 0


if __name__ == "__main__":
    sys.exit(main())
