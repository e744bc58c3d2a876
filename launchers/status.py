"""Status of a run: jobs, progress and logs."""

import datetime
import time
from pathlib import Path
from typing import Any

from armd_scale import config_files
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from launchers import jobs


def lines(run: RunDirectory) -> list[str]:
    """Jobs, progress, checkpoints and restarts of a run."""
    config = config_files.load_run(run)
    known = jobs.known(run)
    state_of = jobs.states(run, known)
    out = [f"{config.name}: {run.path}"]
    latest = {job.step: job for job in known}
    for job in latest.values():
        out.append(f"  {job.step:<17} {job.cluster} {_numbers(job.ids):<16} {_state(run, job, state_of)}")
    records = run.metrics()
    if any("loss" in record for record in records):
        out.append("  " + progress(records, config))
    newest = manifest.readable(run)
    if newest:
        age = time.time() - run.manifest_path(newest).stat().st_mtime
        out.append(f"  last checkpoint {newest.name}, {_span(age)} ago")
    beats = run.heartbeats()
    if beats and any(job.stage == "train" and any(number in state_of for number in job.ids) for job in known):
        oldest = min(beats, key=lambda beat: beat["time"])
        age = time.time() - oldest["time"]
        out.append(f"  oldest heartbeat: rank {oldest['rank']} on {oldest['host']}, {_span(age)} ago")
    for failure in run.restarts():
        when = datetime.datetime.fromtimestamp(failure["time"]).strftime("%Y-%m-%d %H:%M:%S")
        out.append(
            f"  {when} {failure['step']} at step {failure['reached']}: {failure['reason']}; {failure['decision']}"
        )
    return out


def progress(records: list[dict[str, Any]], config: RunConfig) -> str:
    """Step, loss, throughput and remaining time, in a line."""
    steps = [record for record in records if "loss" in record]
    if not steps:
        return "train: starting"
    record, total = steps[-1], config.total_steps
    seconds = (total - record["step"]) * sorted(r["seconds_per_step"] for r in steps)[len(steps) // 2]
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    detail = {"strided": f" S={record['streams']}", "permutation": f" k={record['shuffled']}"}.get(record["phase"], "")
    return (
        f"step {record['step']}/{total}  {record['step'] / total:4.0%}  {record['phase']}{detail}  "
        f"loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte  "
        f"{record['tokens_per_second']:,.0f} tokens/s{mfu}  ETA {_span(seconds)}"
    )


def log_of(run: RunDirectory, stage: str, rank: int, stream: str = "out") -> Path:
    """The output file of a process of the newest job of a stage."""
    config_files.load_run(run)
    submitted = [job for job in jobs.known(run) if stage in (job.stage, job.step)]
    if not submitted:
        raise UserError(f"no job '{stage}' was submitted for {run.path}: see `armd status {run.path}`")
    number = submitted[-1].ids[0]
    path = run.log_path(submitted[-1].step, number, rank, stream)
    if not path.is_file():
        raise UserError(f"rank {rank} of job {number} has printed nothing: {path} does not exist")
    return path


def follow(path: Path, going_on: Any) -> None:
    """Print a file as it grows, while ``going_on()`` is true."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            ending = not going_on()
            text = file.read()
            if text:
                print(text, end="", flush=True)
            elif ending:
                return
            else:
                time.sleep(0.5)


def _state(run: RunDirectory, job: jobs.Submitted, state_of: dict[str, str]) -> str:
    current = [state_of[number] for number in job.ids if number in state_of]
    if current:
        counts = {state: current.count(state) for state in sorted(set(current))}
        return ", ".join(f"{count} x {state}" if len(job.ids) > 1 else state for state, count in counts.items())
    for number in job.ids:
        error = run.error(job.step, number)
        if error:
            return f"FAILED: {error['line']}"
    results = [run.result_paths(job.step, number) for number in job.ids]
    return "done" if all(results) else "ENDED without a result"


def _numbers(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0].partition('_')[0]}_[0-{len(ids) - 1}]"


def _span(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
