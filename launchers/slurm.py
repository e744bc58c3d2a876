"""Start or go on with a run: prepare the data, train, export, evaluate, report.

    python launchers/slurm.py --config configs/1b.yaml [section.field=value ...]

Jobs are submitted with submitit: to Slurm where ``sbatch`` is found, else to processes of this machine. The same
command goes on where a run stopped.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import UserError, cli
from armd_scale.files import exclusive

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Start or go on with a run")
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see configs/")
    parser.add_argument("--cluster", choices=("slurm", "local"), help="default: slurm where sbatch is found")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    args = parser.parse_args()

    from armd_scale import config as configs

    config = configs.load(args.config, args.overrides)
    cluster = args.cluster or ("slurm" if shutil.which("sbatch") else "local")
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise UserError("--cluster slurm: there is no sbatch on this machine; use --cluster local")
    if cluster == "local" and config.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes is {config.cluster.nodes} but there is no Slurm on this machine: run it where sbatch is, "
            "or set cluster.nodes=1 and a layout that fits"
        )
    try:
        config.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {config.directory} cannot be written: {error}") from error
    # A launcher that is told to end must end its jobs; two of them must not share a run.
    # SIGINT too: started in the background of a script it is ignored, here and in the jobs, which are cancelled by it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    with exclusive(config.directory / ".lock", f"the run folder {config.directory}"):
        _prepare_folder(config)
        launcher = _Launcher(config, cluster)
        launcher.run("prepare")
        if not _trained(config):
            launcher.run("train")
        launcher.run("finish")
        launcher.close()


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _prepare_folder(config: Any) -> None:
    """Make the run folder, refuse one that belongs to another run, and write down what is about to run."""
    from armd_scale import config as configs
    from armd_scale.files import write_atomically
    from armd_scale.training import manifest
    from armd_scale.training.telemetry import environment

    folder = config.directory
    newest = manifest.readable(folder / "checkpoints")
    if newest:
        manifest.check_identity(newest, config)
    try:
        configs.save(config, folder / "config.yaml")
        write_atomically(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error}") from error


def _trained(config: Any) -> bool:
    """Whether the last checkpoint of the run is there already."""
    from armd_scale.training import manifest

    newest = manifest.newest_good(config.directory / "checkpoints")
    return newest is not None and manifest.step_of(newest) >= config.total_steps


class _Launcher:
    """Submits the stages of a run one after another and shows how they go on."""

    def __init__(self, config: Any, cluster: str) -> None:
        from rich.console import Console

        self.config, self.cluster = config, cluster
        self.console = Console(highlight=False, markup=False)
        self.summary: dict[str, Any] | None = None
        where = "Slurm" if cluster == "slurm" else "this machine"
        self.console.print(
            f"{config.name}: {config.cluster.processes} processes on {where}: {config.parallel.describe()} x data "
            f"{config.data_parallel}, ZeRO-{config.parallel.zero}; {config.total_steps} steps of "
            f"{config.train.global_batch} x {config.model.length} tokens; run folder {config.directory}",
            soft_wrap=True,
        )

    def run(self, stage: str) -> None:
        """Run one stage to its end; raises ``UserError`` with the reason when it fails."""
        from launchers import stages

        job = self._executor(stage).submit(stages.run, stage, self.config, uuid.uuid4().hex)
        try:
            _follow(job, stage, self.config, self.console)
        except KeyboardInterrupt:
            job.cancel()
            self.console.print(
                f"stopped; the same command goes on from the newest checkpoint in {self.config.directory}"
            )
            raise
        results = _results(job, stage)
        if stage == "finish":
            self.summary = results[0]

    def close(self) -> None:
        """Print the last screen."""
        from armd_scale.evaluation.report import lines

        assert self.summary is not None
        self.console.rule()
        for line in lines(self.summary, self.config.directory):
            self.console.print(line, soft_wrap=True)

    def _executor(self, stage: str) -> Any:
        import submitit

        cluster = self.config.cluster
        tasks = cluster.tasks_per_node if stage == "train" else 1
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": str(cluster.cpus_per_task),
            "TOKENIZERS_PARALLELISM": "false",
        }
        folder = (self.config.directory / "jobs" / stage).resolve()
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=self.cluster)
        settings: dict[str, Any] = {
            "name": f"{self.config.name}-{stage}",
            "nodes": cluster.nodes if stage == "train" else 1,
            "tasks_per_node": tasks,
            "cpus_per_task": cluster.cpus_per_task,
            "timeout_min": cluster.timeout_minutes,
        }
        if self.cluster == "slurm":
            settings |= {
                "slurm_partition": cluster.partition,
                "slurm_account": cluster.account,
                "slurm_setup": [f"export {name}={value}" for name, value in variables.items()],
            }
            if cluster.gpus_per_node:
                settings["slurm_gpus_per_node"] = cluster.gpus_per_node if stage == "train" else 1
        else:
            os.environ.update(variables)
            if cluster.gpus_per_node:
                settings["gpus_per_node"] = cluster.gpus_per_node
        executor.update_parameters(**{name: value for name, value in settings.items() if value is not None})
        return executor


def _follow(job: Any, stage: str, config: Any, console: Any) -> None:
    """Show a job until it ends: one live line on a terminal, plain lines elsewhere."""
    from rich.live import Live
    from rich.text import Text

    from armd_scale.training.telemetry import read_metrics

    started, last_line = time.monotonic(), 0.0
    shown = len(read_metrics(config.directory))
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    if live:
        live.start()
    try:
        while not job.done():
            time.sleep(0.5)
            records = read_metrics(config.directory) if stage == "train" else []
            line = _status(records, config) if stage == "train" else f"{stage} ... {time.monotonic() - started:.0f} s"
            for record in records[shown:]:
                if "heldout_left_to_right" in record:
                    console.print(_heldout(record), soft_wrap=True)
            if live:
                live.update(Text(line), refresh=True)
            elif len(records) > shown and time.monotonic() - last_line > 10:
                console.print(line, soft_wrap=True)
                last_line = time.monotonic()
            shown = len(records)
    finally:
        if live:
            live.stop()
    for record in read_metrics(config.directory)[shown:] if stage == "train" else []:
        if "heldout_left_to_right" in record:
            console.print(_heldout(record), soft_wrap=True)
    output = (job.stdout() or "") if stage != "train" else ""
    for line in output.splitlines():
        if line.startswith(("data:", "export:")):
            console.print(line, soft_wrap=True)
    console.print(f"{stage}: {time.monotonic() - started:.0f} s", soft_wrap=True)


def _status(records: list[dict[str, Any]], config: Any) -> str:
    steps = [record for record in records if "loss" in record]
    if not steps:
        return "train: starting"
    record, total = steps[-1], config.total_steps
    seconds = (total - record["step"]) * sorted(r["seconds_per_step"] for r in steps)[len(steps) // 2]
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    detail = f" S={record['streams']}" if record["phase"] == "strided" else f" k={record['shuffled']}"
    return (
        f"step {record['step']}/{total}  {record['step'] / total:4.0%}  {record['phase']}{detail}  "
        f"loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte  "
        f"{record['tokens_per_second']:,.0f} tokens/s{mfu}  ETA {datetime.timedelta(seconds=round(seconds))}"
    )


def _heldout(record: dict[str, Any]) -> str:
    kinds = (("left to right", "left_to_right"), ("shuffled", "permutation"), ("strided", "strided"))
    figures = ", ".join(f"{label} {record[f'heldout_{kind}_bits_per_byte']:.3f}" for label, kind in kinds)
    return f"step {record['step']}: held-out bits/byte: {figures}"


def _results(job: Any, stage: str) -> list[dict[str, Any]]:
    """What the tasks of a job returned; ``UserError`` with the first one's reason when it failed."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        results = job.results()
    except (FailedJobError, UncompletedJobError) as error:
        # submitit gives the traceback of the process, then where its logs are.
        raised = [line for line in str(error).splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        reason = raised[-1] if raised else "a process died without a word"
        raise UserError(
            f"stage '{stage}' failed: {reason.strip()} (logs in {job.paths.folder}); "
            "the same command goes on from the newest checkpoint"
        ) from error
    for result in results:
        if "error" in result:
            raise UserError(result["error"])
    return results


if __name__ == "__main__":
    cli(main)
