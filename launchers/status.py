"""How a run stands: its jobs, how far it has come, and what its processes have printed."""

import datetime
import time
from pathlib import Path
from typing import Any

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest
from launchers import jobs


def lines(run: RunDirectory) -> list[str]:
    """Jobs by step, progress, checkpoints and restarts of a run."""
    config = configs.load_run(run)
    known = jobs.known(run)
    now = jobs.states(known)
    out = [f"{config.name}: {run.path}"]
    latest = {each.step: each for each in known}
    for each in latest.values():
        out.append(f"  {each.step:<17} {each.cluster} {_numbers(each.ids):<16} {_state(run, each, now)}")
    records = run.metrics()
    if any("loss" in record for record in records):
        out.append("  " + progress(records, config))
    newest = manifest.readable(run)
    if newest:
        age = time.time() - run.manifest_path(newest).stat().st_mtime
        out.append(f"  last checkpoint {newest.name}, {_span(age)} ago")
    beats = run.heartbeats()
    if beats and any(each.stage == "train" and any(job in now for job in each.ids) for each in known):
        last = min(beats, key=lambda beat: beat["time"])
        out.append(
            f"  rank {last['rank']} on {last['host']} was heard of last, {_span(time.time() - last['time'])} ago"
        )
    for death in run.restarts():
        when = datetime.datetime.fromtimestamp(death["time"]).strftime("%Y-%m-%d %H:%M:%S")
        out.append(f"  {when} {death['step']} at step {death['reached']}: {death['reason']}; {death['decision']}")
    return out


def progress(records: list[dict[str, Any]], config: RunConfig) -> str:
    """Step, loss, speed and time left, in a line."""
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
    """What a process of the newest job of a stage prints."""
    configs.load_run(run)
    found = [submitted for submitted in jobs.known(run) if stage in (submitted.stage, submitted.step)]
    if not found:
        raise UserError(f"no job of stage '{stage}' was submitted for {run.path}")
    job = found[-1].ids[0]
    path = run.log_path(found[-1].step, job, rank, stream)
    if not path.is_file():
        raise UserError(f"rank {rank} of job {job} has printed nothing yet: there is no {path}")
    return path


def follow(path: Path, going_on: Any) -> None:
    """Print a file as it grows, as long as ``going_on()``."""
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


def _state(run: RunDirectory, each: jobs.Submitted, now: dict[str, str]) -> str:
    current = [now[job] for job in each.ids if job in now]
    if current:
        counts = {state: current.count(state) for state in sorted(set(current))}
        return ", ".join(f"{count} x {state}" if len(each.ids) > 1 else state for state, count in counts.items())
    for job in each.ids:
        error = run.error(each.step, job)
        if error:
            return f"FAILED: {error['line']}"
    results = [run.result_paths(each.step, job) for job in each.ids]
    return "done" if all(results) else "ENDED without a result"


def _numbers(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0].partition('_')[0]}_[0-{len(ids) - 1}]"


def _span(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
