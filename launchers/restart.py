"""Whether a job that has died is started again: python -m launchers.restart RUN_DIR STEP JOB CODE, exit code 0 for yes.

Bad input is never tried again. Anything else is, after a wait that doubles, as long as new checkpoints are written
between (``cluster.max_restarts``), unless it dies at the same step three times. Every decision is a line of
``restarts.jsonl``.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from armd_scale import config as configs
from armd_scale import logs
from armd_scale.config import RunConfig
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest

_SAME_STEP = 3
_LONGEST_WAIT = 600.0
_HOLD_SECONDS = 300.0


class Decision(NamedTuple):
    """What is done about a job that has died."""

    wait: float | None
    """Seconds before it starts again; None: it does not."""
    reason: str
    """Why it died."""
    elsewhere: bool
    """Training never started; requeue on other nodes."""


def decide(config: RunConfig, step: str, job: str, code: int | None) -> Decision:
    """What to do about the job numbered ``job`` of a step; ``code``: its exit code, where it is known."""
    run = config.run_directory
    reason, final = _reason(run, run.error(step, job), code)
    before = [record for record in run.restarts() if record["step"] == step]
    since = before[-1]["time"] if before else 0.0
    reached = _reached(run, run.error(step, job), since) if step == "train" else 0
    checkpoint = _newest_step(run)
    record: dict[str, Any] = {
        "time": time.time(), "step": step, "job": job, "reason": reason, "reached": reached, "checkpoint": checkpoint,
    }  # fmt: skip
    row = _row(before, checkpoint)
    deaths = [each["reached"] for each in row] + [reached]
    if final:
        record["decision"] = "stops: " + reason
    elif step == "train" and deaths[-_SAME_STEP:] == [reached] * _SAME_STEP and reached is not None:
        record["decision"] = reason = f"died {_SAME_STEP} times at step {reached}: {reason}"
        final = True
    elif len(row) >= config.cluster.max_restarts:
        record["decision"] = reason = f"died {len(row) + 1} times without a new checkpoint: {reason}"
        final = True
    wait = min(_LONGEST_WAIT, config.cluster.backoff_seconds * 2 ** len(row))
    if not final:
        record["decision"] = f"starts again after {wait:.0f} s"
    _write_down(run, record)
    return Decision(None if final else wait, reason, reached is None)


def note_requeue(config: RunConfig, job: str, count: int, reason: str) -> None:
    """Write down that Slurm has queued a job for the ``count``-th time again, unless that is known."""
    run = config.run_directory
    if any(record["job"] == job and record.get("requeues") == count for record in run.restarts()):
        return
    checkpoint = _newest_step(run)
    record = {
        "time": time.time(), "step": "train", "job": job, "reason": reason, "reached": checkpoint,
        "checkpoint": checkpoint, "requeues": count, "decision": "queued again",
    }  # fmt: skip
    _write_down(run, record)


def failing(config: RunConfig, step: str, job: str) -> bool:
    """Whether a process of a job has failed while other processes may still run."""
    return config.run_directory.error(step, job) is not None or bool(config.run_directory.stacks())


def requeue() -> None:
    """Have Slurm queue this job again, and hold still until it is ended."""
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    hold()


def hold() -> None:
    """Wait for Slurm to end a process of a job that is queued again: an end of its own would count for the job."""
    time.sleep(_HOLD_SECONDS)


def clear(config: RunConfig, step: str, job: str) -> None:
    """Remove the error, results and stacks of a job that died, so that its next start is not taken for dead."""
    run = config.run_directory
    for path in [run.error_path(run.job(step, job)), *run.result_paths(step, job)]:
        path.unlink(missing_ok=True)
    for path in run.stacks().values():
        path.replace(path.with_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))


def _newest_step(run: RunDirectory) -> int | None:
    newest = manifest.readable(run)
    return run.step_of(newest) if newest else None


def _write_down(run: RunDirectory, record: dict[str, Any]) -> None:
    with run.restarts_path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _row(before: list[dict[str, Any]], checkpoint: int | None) -> list[dict[str, Any]]:
    """The deaths since the newest checkpoint was written or a job was stopped for good."""
    row: list[dict[str, Any]] = []
    for each in reversed(before):
        if each["checkpoint"] != checkpoint or not each["decision"].startswith("starts again"):
            break
        row.insert(0, each)
    return row


def _reason(run: RunDirectory, error: dict[str, Any] | None, code: int | None) -> tuple[str, bool]:
    """Why a job died, and whether it would die again; ``error``: of the first process that failed."""
    stacks = run.stacks()
    if stacks:
        hung = ", ".join(path.stem for path in stacks.values())
        return f"a hang: no step finished; stacks of {hung} in {run.stack_path(0).parent}{_without_stacks(run)}", False
    if error is None:
        return "a process died without a word" + (f" (exit code {code})" if code else ""), False
    return f"{error['line']}", bool(error["bad_input"])


def _without_stacks(run: RunDirectory) -> str:
    """Ranks that wrote no stacks, in words."""
    written = run.stacks()
    quiet = [f"rank {beat['rank']} on {beat['host']}" for beat in run.heartbeats() if beat["rank"] not in written]
    return f"; {', '.join(quiet)} wrote none" if quiet else ""


def _reached(run: RunDirectory, error: dict[str, Any] | None, since: float) -> int | None:
    """The last step that any rank has finished, from the ``error`` of the rank that failed, else from the heartbeats.

    None when there is no heartbeat ``since`` the last death: training never started.
    """
    if error and error["reached"] is not None:
        return int(error["reached"])
    steps = [beat["step"] for beat in run.heartbeats() if beat["time"] > since]
    return max([*steps, *(record["step"] for record in run.metrics()[-1:])]) if steps else None


def main() -> int:
    run_dir, step, job, code = sys.argv[1:]
    logs.configure()
    config = configs.load_run(RunDirectory(Path(run_dir)))
    wait, reason, elsewhere = decide(config, step, job, int(code))
    if wait is None:
        logs.JOB.error("the job is not started again: %s", reason)
        return 1
    logs.JOB.warning("the job starts again in %.0f s: %s", wait, reason)
    time.sleep(wait)
    clear(config, step, job)
    if elsewhere:
        requeue()
    return 0


if __name__ == "__main__":
    sys.exit(main())
