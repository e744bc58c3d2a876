"""How a run stands: its jobs, how far it has come, and what its processes have printed."""

import datetime
import time
from pathlib import Path
from typing import Any

from armd_scale import config as configs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.training import manifest
from armd_scale.training.health import heartbeats
from armd_scale.training.telemetry import read_metrics
from launchers import jobs, restart


def open_run(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run folder."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no config.yaml")
    return configs.load(run_dir / "config.yaml").model_copy(update={"run_dir": str(run_dir)})


def lines(run_dir: Path) -> list[str]:
    """Jobs by step, progress, checkpoints and restarts of a run."""
    config = open_run(run_dir)
    known = jobs.known(run_dir)
    now = jobs.states(known)
    out = [f"{config.name}: {run_dir}"]
    latest = {each.step: each for each in known}
    for each in latest.values():
        out.append(f"  {each.step:<17} {each.cluster} {_numbers(each.ids):<16} {_state(run_dir, each, now)}")
    records = read_metrics(run_dir)
    if any("loss" in record for record in records):
        out.append("  " + progress(records, config))
    newest = manifest.readable(run_dir / "checkpoints")
    if newest:
        age = time.time() - (newest / "manifest.json").stat().st_mtime
        out.append(f"  last checkpoint {newest.name}, {_span(age)} ago")
    beats = heartbeats(run_dir)
    if beats and any(each.stage == "train" and any(job in now for job in each.ids) for each in known):
        last = min(beats, key=lambda beat: beat["time"])
        out.append(
            f"  rank {last['rank']} on {last['host']} was heard of last, {_span(time.time() - last['time'])} ago"
        )
    for death in restart.read(run_dir):
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


def log_of(run_dir: Path, stage: str, rank: int, stream: str = "out") -> Path:
    """What a process of the newest job of a stage prints."""
    open_run(run_dir)
    found = [each for each in jobs.known(run_dir) if stage in (each.stage, each.step)]
    if not found:
        raise UserError(f"no job of stage '{stage}' was submitted for {run_dir}")
    job = found[-1].ids[0]
    path = run_dir / "jobs" / found[-1].step / job / f"{job}_{rank}_log.{stream}"
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


def _state(run_dir: Path, each: jobs.Submitted, now: dict[str, str]) -> str:
    current = [now[job] for job in each.ids if job in now]
    if current:
        counts = {state: current.count(state) for state in sorted(set(current))}
        return ", ".join(f"{count} x {state}" if len(each.ids) > 1 else state for state, count in counts.items())
    for job in each.ids:
        error = restart.error_of(run_dir / "jobs" / each.step / job)
        if error:
            return f"FAILED: {error['line']}"
    results = [list((run_dir / "jobs" / each.step / job).glob("*_result.pkl")) for job in each.ids]
    return "done" if all(results) else "ENDED without a result"


def _numbers(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0].partition('_')[0]}_[0-{len(ids) - 1}]"


def _span(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
