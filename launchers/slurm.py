"""Start or go on with a run: prepare the data, train, export, evaluate.

    python launchers/slurm.py --config configs/1b.yaml [section.field=value ...]
    python launchers/slurm.py status|logs|cancel RUN_DIR

Jobs are submitted with submitit: to Slurm where ``sbatch`` is found, else to processes of this machine. The same
command goes on where a run stopped, and does nothing twice.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale import logs
from armd_scale.errors import UserError, cli
from armd_scale.files import exclusive

_GRACE_SECONDS = 5.0  # in which the processes of a local job end after the first of them has failed
_SHOWN_TOPICS = ("data", "export")  # of the lines of jobs
_POLL_SECONDS = {"slurm": 2.0, "local": 0.5}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        _about_a_run()
        return
    stages = ("tokenise", "train", "export", "evaluate")
    parser = argparse.ArgumentParser(
        description="Start or go on with a run; status, logs and cancel RUN_DIR look after one that was started"
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see configs/")
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        help="Slurm, processes of this machine, or this process alone; default: slurm where sbatch is found",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done: configuration, plan, scripts")
    parser.add_argument("--detach", action="store_true", help="submit to Slurm and return")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", choices=stages, help="this stage, also when its product is there")
    some.add_argument("--from", choices=stages, dest="start", help="this stage and those behind it")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    args = parser.parse_args()

    from armd_scale import config as configs

    config = configs.load(args.config, args.overrides)
    cluster = args.cluster or ("slurm" if shutil.which("sbatch") else "local")
    _check(config, cluster, args)
    if args.dry_run:
        _dry_run(config, args)
        return
    try:
        config.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {config.directory} cannot be written: {error}") from error
    # A launcher that is told to end must end the processes it has started; two of them must not share a run.
    # SIGINT too: started in the background of a script it is ignored, here and in the jobs, which are cancelled by it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    with exclusive(config.run_directory.lock_path, f"the run folder {config.directory}"):
        _Launcher(config, cluster, args.only, args.start).run(args.detach)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check(config: Any, cluster: str, args: argparse.Namespace) -> None:
    """``UserError`` for what the chosen cluster cannot do."""
    if cluster == "slurm" and not shutil.which("sbatch") and not args.dry_run:
        raise UserError("--cluster slurm: there is no sbatch on this machine; use --cluster local")
    if cluster != "slurm" and not args.dry_run and config.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes is {config.cluster.nodes} but there is no Slurm on this machine: run it where sbatch is, "
            "or set cluster.nodes=1 and a layout that fits"
        )
    if cluster == "debug" and config.cluster.processes > 1:
        raise UserError(
            "--cluster debug runs everything in one process: set cluster.tasks_per_node=1 and a layout for it"
        )
    if args.detach and cluster != "slurm":
        raise UserError("--detach needs Slurm: processes of this machine end with the command that started them")


def _dry_run(config: Any, args: argparse.Namespace) -> None:
    """Print the resolved configuration, the plan of its layout, and the script of every job."""
    import yaml

    from armd_scale.planning import hardware, report
    from armd_scale.planning.plan import Planner, assume_vocabulary
    from launchers import jobs

    print(yaml.safe_dump(config.model_dump(), sort_keys=False).rstrip())
    planner = Planner(hardware.find("h100" if config.cluster.gpus_per_node else "cpu"))
    plan = planner.plan(assume_vocabulary(config))
    print("\n" + report.table(plan, {config.parallel.recompute: plan}, config.model.vocab_size is None))
    code = config.run_directory.code.resolve() / "SNAPSHOT"
    for step in jobs.steps(config, args.only, args.start):
        print(f"\n--- {step.name}\n{jobs.sbatch_text(config, step, code)}")


class _Launcher:
    """Submits the steps of a run and shows how they go on."""

    def __init__(self, config: Any, cluster: str, only: str | None, start: str | None) -> None:
        from rich.console import Console

        from launchers import jobs

        logs.configure()
        self.config, self.cluster = config, cluster
        self.console = Console(highlight=False, markup=False)
        running = jobs.alive(config.run_directory)
        if running and running[0].cluster != "slurm":
            raise UserError(
                f"jobs of an earlier launcher still run in {config.directory}: wait for them, or end them with "
                f"`launchers/slurm.py cancel {config.directory}`"
            )
        self.running = running
        if not running:
            _prepare_folder(config)
        self.steps = [] if running else jobs.steps(config, only, start)
        where = {"slurm": "processes on Slurm", "local": "processes on this machine", "debug": "process, this one"}[
            cluster
        ]
        self._say(
            f"{config.name}: {config.cluster.processes} {where}: {config.parallel.describe()} x data "
            f"{config.data_parallel}, ZeRO-{config.parallel.zero}; {config.total_steps} steps of "
            f"{config.train.global_batch} x {config.model.length} tokens; run folder {config.directory}"
        )

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def run(self, detach: bool) -> None:
        """Do all steps; raises ``UserError`` with the reason when one fails."""
        from launchers import jobs

        submitter = jobs.Jobs(self.config, self.cluster, jobs.snapshot(self.config.run_directory))
        if self.cluster != "slurm":
            for step in self.steps:
                (self._debug if self.cluster == "debug" else self._run_here)(submitter, step)
        else:
            chain = list(self.running)
            if chain:
                self._say("its jobs are in the queue already: following them")
            for step in self.steps:
                chain.append(submitter.submit(step, chain[-1] if chain else None)[0])
                self._say(
                    f"{step.name}: job {chain[-1].ids[0].partition('_')[0]}" + f" x {step.shares}" * (step.shares > 1)
                )
            if detach:
                self._say(f"`launchers/slurm.py status {self.config.directory}` says how they stand")
                return
            try:
                for each in chain:
                    self._follow(each)
            except KeyboardInterrupt:
                self._say(
                    f"the jobs go on; `launchers/slurm.py status {self.config.directory}` says how they stand, the "
                    "same command follows them again, `cancel` ends them"
                )
                raise
        self._close()

    def _debug(self, submitter: Any, step: Any) -> None:
        """Run a step in this process; what goes wrong in it is raised here, in the debugger on a terminal."""
        for job in submitter.submit(step)[1]:
            os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
            if sys.stdin.isatty():
                job.results()
            elif error := job.exception():
                raise error
        self._say(f"{step.name}: done")

    def _run_here(self, submitter: Any, step: Any) -> None:
        """Run a step in processes of this machine, and again when it dies of something that may pass."""
        from launchers import restart

        while True:
            submitted, running = submitter.submit(step)
            try:
                self._follow(submitted, running)
                return
            except KeyboardInterrupt:
                for job in running:
                    job.cancel()
                self._say(f"stopped; the same command goes on from the newest checkpoint in {self.config.directory}")
                raise
            except _Died as death:
                wait, reason, _ = restart.decide(self.config, step.name, death.job, None)
                if wait is None:
                    raise UserError(_failure(self.config, step.name, death.job, reason)) from death
                restart.clear(self.config, step.name, death.job)
                self._say(f"{step.name} died and starts again in {wait:.0f} s: {reason}")
                time.sleep(wait)

    def _follow(self, submitted: Any, running: list[Any] | None = None) -> None:
        """Show a step until it ends: one live line on a terminal, plain lines elsewhere.

        ``running``: submitit's jobs of this machine. Raises ``_Died``, or ``UserError`` for a job of Slurm that failed.
        """
        from rich.live import Live
        from rich.text import Text

        from armd_scale.training.telemetry import MetricsReader
        from launchers import jobs, restart, status

        config, training = self.config, submitted.stage == "train"
        started, last_line, failing = time.monotonic(), 0.0, 0.0
        metrics = MetricsReader(config.run_directory)
        metrics.read()
        live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        if live:
            live.start()
        try:
            while True:
                ended = all(j.done() for j in running) if running else not jobs.states([submitted])
                new = metrics.read() if training else []
                for record in new:
                    if any(name.startswith("heldout_") for name in record):
                        self._say(_heldout(record))
                waiting = f"{submitted.step} ... {time.monotonic() - started:.0f} s"
                line = status.progress(metrics.records, config) if training else waiting
                if live:
                    live.update(Text(line), refresh=True)
                elif new and time.monotonic() - last_line > 10:
                    self._say(line)
                    last_line = time.monotonic()
                if ended:
                    break
                if running and restart.failing(config, submitted.step, submitted.ids[0]):
                    failing = failing or time.monotonic()
                    if time.monotonic() - failing > _GRACE_SECONDS:
                        jobs.end_processes(submitted)
                time.sleep(_POLL_SECONDS[self.cluster])
        finally:
            if live:
                live.stop()
        for job in submitted.ids:
            run = config.run_directory
            if not self._succeeded(submitted.step, job):
                if running:
                    raise _Died(job)
                reason = [each["reason"] for each in run.restarts() if each["job"] == job][-1:]
                error = run.error(submitted.step, job)
                known = error["line"] if error else reason[0] if reason else "it ended without a result"
                raise UserError(_failure(config, submitted.step, job, known))
            for line in (
                run.log_path(submitted.step, job, rank=0).read_text(encoding="utf-8", errors="replace").splitlines()
            ):
                printed = logs.parse(line)
                if printed and printed.topic in _SHOWN_TOPICS:
                    self._say(f"{printed.topic}: {printed.message}")
        self._say(f"{submitted.step}: {time.monotonic() - started:.0f} s")

    def _succeeded(self, step: str, job: str) -> bool:
        """Whether every process of a job has written a result; shared disks may show it late."""
        import pickle

        run = self.config.run_directory
        deadline = time.monotonic() + (20.0 if self.cluster == "slurm" else 0.0)
        while not run.result_paths(step, job, rank=0) and time.monotonic() < deadline:
            time.sleep(0.5)
        results = run.result_paths(step, job)
        return bool(results) and all(pickle.loads(path.read_bytes())[0] == "success" for path in results)

    def _close(self) -> None:
        """Print the last screen."""
        from armd_scale.evaluation.report import lines

        run = self.config.run_directory
        summary = run.summary()
        if summary is None:
            return
        self.console.rule()
        for line in lines(summary, run):
            self._say(line)


class _Died(Exception):
    """A local job ended without a result."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job


def _failure(config: Any, step: str, job: str, reason: str) -> str:
    run = config.run_directory
    error = run.error(step, job)
    if error and error["bad_input"]:
        return reason
    folder = run.job(step, job)
    return f"stage '{step}' failed: {reason} (logs in {folder}); the same command goes on from the newest checkpoint"


def _prepare_folder(config: Any) -> None:
    """Refuse a run folder that belongs to another run, and write down what is about to run."""
    from armd_scale import config as configs
    from armd_scale.files import write_atomically
    from armd_scale.training import manifest
    from armd_scale.training.telemetry import environment

    run = config.run_directory
    newest = manifest.readable(run)
    if newest:
        manifest.check_identity(newest, config)
    try:
        configs.save(config, run.config_path)
        write_atomically(run.environment_path, json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the run folder {run.path} cannot be written: {error}") from error


def _heldout(record: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{name.removeprefix('heldout_').removesuffix('_bits_per_byte').replace('_', ' ')} {value:.3f}"
        for name, value in record.items()
        if name.endswith("_bits_per_byte")
    )
    return f"step {record['step']}: held-out bits/byte: {figures}"


def _about_a_run() -> None:
    """status, logs and cancel."""
    parser = argparse.ArgumentParser(description="Look after a run that was started")
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--follow", action="store_true", help="go on printing what rank 0 (or --rank) prints")
    parser.add_argument("--rank", type=int, default=0, help="process whose output is meant (default 0)")
    parser.add_argument("--stage", default="train", help="stage whose output is meant (default train)")
    parser.add_argument(
        "--stream", choices=("out", "err"), default="out", help="its output or its errors (default out)"
    )
    args = parser.parse_args()

    from armd_scale.run_directory import RunDirectory
    from launchers import jobs, status

    run = RunDirectory(args.run_dir)
    if args.command == "cancel":
        run.load_config()
        ended = jobs.cancel(run)
        print(f"ended: {', '.join(each.step for each in ended)}" if ended else "no job of this run waits or runs")
        return
    if args.command == "status":
        print("\n".join(status.lines(run)))
        if not args.follow:
            return
    path = status.log_of(run, args.stage, args.rank, args.stream)
    if args.follow:
        status.follow(path, lambda: bool(jobs.alive(run)))
    else:
        print(path.read_text(encoding="utf-8", errors="replace"), end="")


_COMMANDS = ("status", "logs", "cancel")

if __name__ == "__main__":
    cli(main)
