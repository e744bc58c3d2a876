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
from armd_scale.config import RunConfig
from armd_scale.training import manifest
from armd_scale.training.health import heartbeats

LOG = "restarts.jsonl"
ERROR = "error.json"
"""What the first process that failed says, in the folder of its job."""
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
    """Whether it did not even come to its work, which other machines may mend."""


def decide(config: RunConfig, step: str, job: str, code: int | None) -> Decision:
    """What to do about the job numbered ``job`` of a step; ``code``: its exit code, where it is known."""
    folder = config.directory / "jobs" / step / job
    reason, final = _reason(config, folder, code)
    before = [each for each in read(config.directory) if each["step"] == step]
    reached = _reached(config, folder, before[-1]["time"] if before else 0.0) if step == "train" else 0
    checkpoint = _newest_step(config)
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
    _write_down(config, record)
    return Decision(None if final else wait, reason, reached is None)


def note_requeue(config: RunConfig, job: str, count: int, reason: str) -> None:
    """Write down that Slurm has queued a job for the ``count``-th time again, unless that is known."""
    if any(each["job"] == job and each.get("requeues") == count for each in read(config.directory)):
        return
    checkpoint = _newest_step(config)
    record = {
        "time": time.time(), "step": "train", "job": job, "reason": reason, "reached": checkpoint,
        "checkpoint": checkpoint, "requeues": count, "decision": "queued again",
    }  # fmt: skip
    _write_down(config, record)


def failing(config: RunConfig, step: str, job: str) -> bool:
    """Whether a process of a job has failed while others may still be there."""
    return error_of(config.directory / "jobs" / step / job) is not None or bool(_stacks(config))


def requeue() -> None:
    """Have Slurm queue this job again, and hold still until it is ended."""
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    hold()


def hold() -> None:
    """Wait for Slurm to end a process of a job that is queued again: an end of its own would count for the job."""
    time.sleep(_HOLD_SECONDS)


def clear(config: RunConfig, step: str, job: str) -> None:
    """Remove what a job that died has left, so that its next start is not taken for dead."""
    folder = config.directory / "jobs" / step / job
    for path in [folder / ERROR, *folder.glob("*_result.pkl")]:
        path.unlink(missing_ok=True)
    for path in (config.directory / "stacks").glob("rank-*.txt"):
        if path.stat().st_size:
            path.replace(path.with_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All decisions of a run."""
    path = run_dir / LOG
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def error_of(folder: Path) -> dict[str, Any] | None:
    """What the first process of a job that failed has written."""
    try:
        return json.loads((folder / ERROR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _newest_step(config: RunConfig) -> int | None:
    newest = manifest.readable(config.directory / "checkpoints")
    return manifest.step_of(newest) if newest else None


def _write_down(config: RunConfig, record: dict[str, Any]) -> None:
    with (config.directory / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _row(before: list[dict[str, Any]], checkpoint: int | None) -> list[dict[str, Any]]:
    """The deaths since the newest checkpoint was written or a job was stopped for good."""
    row: list[dict[str, Any]] = []
    for each in reversed(before):
        if each["checkpoint"] != checkpoint or not each["decision"].startswith("starts again"):
            break
        row.insert(0, each)
    return row


def _reason(config: RunConfig, folder: Path, code: int | None) -> tuple[str, bool]:
    """Why a job died, and whether it would die again."""
    stacks = _stacks(config)
    if stacks:
        hung = ", ".join(sorted(path.stem for path in stacks))
        behind = _behind(config)
        return f"a hang: no step finished; stacks of {hung} in {stacks[0].parent}{behind}", False
    error = error_of(folder)
    if error is None:
        return "a process died without a word" + (f" (exit code {code})" if code else ""), False
    return f"{error['line']}", bool(error["bad_input"])


def _stacks(config: RunConfig) -> list[Path]:
    return [path for path in (config.directory / "stacks").glob("rank-*.txt") if path.stat().st_size]


def _behind(config: RunConfig) -> str:
    """Ranks whose last sign of life is much older than the others'."""
    beats = heartbeats(config.directory)
    written = {int(path.stem.removeprefix("rank-")) for path in _stacks(config)}
    quiet = [f"rank {beat['rank']} on {beat['host']}" for beat in beats if beat["rank"] not in written]
    return f"; {', '.join(quiet)} wrote none" if quiet else ""


def _reached(config: RunConfig, folder: Path, since: float) -> int | None:
    """The last step that any rank has finished: as the one says that failed, or else as their signs of life do.

    None when there is no sign of life ``since`` the last death: the processes did not come to train.
    """
    from armd_scale.training.telemetry import read_metrics

    error = error_of(folder)
    if error and error["reached"] is not None:
        return int(error["reached"])
    steps = [beat["step"] for beat in heartbeats(config.directory) if beat["time"] > since]
    return max([*steps, *(record["step"] for record in read_metrics(config.directory)[-1:])]) if steps else None


def main() -> int:
    run_dir, step, job, code = sys.argv[1:]
    config = configs.load(Path(run_dir) / "config.yaml").model_copy(update={"run_dir": run_dir})
    wait, reason, elsewhere = decide(config, step, job, int(code))
    if wait is None:
        print(f"the job is not started again: {reason}", flush=True)
        return 1
    print(f"the job starts again in {wait:.0f} s: {reason}", flush=True)
    time.sleep(wait)
    clear(config, step, job)
    if elsewhere:
        requeue()
    return 0


if __name__ == "__main__":
    sys.exit(main())
