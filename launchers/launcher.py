"""Submits the remaining jobs of a run and follows them, on Slurm or in processes of this machine."""

import json
import pickle
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from armd_scale import config_files, logs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.processes import postponed_signals
from armd_scale.training import manifest, schedules
from armd_scale.training.telemetry import MetricsReader, environment
from launchers import jobs, restart, status

_GRACE_SECONDS = 5.0  # time for the processes of a local job to end after a process has failed
_SHOWN_TOPICS = ("data", "export")  # topics of log lines that the launcher prints
_POLL_SECONDS = {"slurm": 2.0, "local": 0.5}


class Launcher:
    """Submits the jobs of a run and shows their progress."""

    def __init__(self, config: RunConfig, cluster: str, only: str | None, start: str | None) -> None:
        logs.configure()
        self.config, self.cluster = config, cluster
        self.console = Console(highlight=False, markup=False)
        running = jobs.alive(config.run_directory)
        on_slurm = all(record.cluster == "slurm" for record in running)
        if config.run_directory.processes() or (running and not (on_slurm and cluster == "slurm")):
            raise UserError(
                f"jobs of another launcher are running in {config.directory}: wait for them, or cancel them with "
                f"`armd cancel {config.directory}`"
            )
        self.running = running
        if not running:
            _prepare_folder(config)
        self.specs = [] if running else jobs.remaining_jobs(config, only, start)
        where = {"slurm": "processes on Slurm", "local": "local processes", "debug": "process, in the launcher"}[
            cluster
        ]
        self._say(
            f"{config.name}: {config.cluster.processes} {where}: {config.parallel.describe()} x data "
            f"{config.data_parallel}, ZeRO-{config.parallel.zero}; {config.total_steps} steps of "
            f"{config.train.global_batch} x {config.model.length} tokens; run directory {config.directory}"
        )

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def run(self, detach: bool) -> None:
        """Run all jobs; raises ``UserError`` with the reason if a job fails."""
        submitter = jobs.Jobs(self.config, self.cluster, jobs.snapshot(self.config.run_directory))
        if self.cluster != "slurm":
            for spec in self.specs:
                try:
                    (self._debug if self.cluster == "debug" else self._run_here)(submitter, spec)
                finally:
                    for path in self.config.run_directory.rendezvous_paths():
                        path.unlink(missing_ok=True)
        else:
            chain = list(self.running)
            if chain:
                self._say("the jobs are already in the queue: following them")
            for spec in self.specs:
                chain.append(submitter.submit(spec, chain[-1] if chain else None)[0])
                self._say(
                    f"{spec.name}: job {chain[-1].ids[0].partition('_')[0]}" + f" x {spec.shares}" * (spec.shares > 1)
                )
            if detach:
                self._say(f"follow the jobs with `armd status {self.config.directory}`")
                return
            try:
                for submitted in chain:
                    self._follow(submitted)
            except KeyboardInterrupt:
                self._say(
                    f"the jobs continue: see `armd status {self.config.directory}`, run the same command to follow "
                    f"them, or cancel them with `armd cancel {self.config.directory}`"
                )
                raise
        self._close()

    def _debug(self, submitter: jobs.Jobs, spec: jobs.JobSpec) -> None:
        """Run a job in this process and raise its error here; on a terminal the error opens the debugger."""
        for job in submitter.submit(spec)[1]:
            if sys.stdin.isatty():
                job.results()
            elif error := job.exception():
                raise error
        self._say(f"{spec.name}: done")

    def _run_here(self, submitter: jobs.Jobs, spec: jobs.JobSpec) -> None:
        """Run a job in local processes, and restart it after an error that may not recur."""
        try:
            while (wait := self._attempt(submitter, spec)) is not None:
                time.sleep(wait)
        except BaseException as error:  # no job goes on without its launcher
            with postponed_signals():
                jobs.cancel(self.config.run_directory)
            if isinstance(error, KeyboardInterrupt):
                self._say(f"stopped; the same command resumes from the newest checkpoint in {self.config.directory}")
            raise

    def _attempt(self, submitter: jobs.Jobs, spec: jobs.JobSpec) -> float | None:
        """Run a job in local processes; returns the seconds before its restart, None after success."""
        with postponed_signals():  # a job that was started must also be recorded
            submitted, running = submitter.submit(spec)
        try:
            self._follow(submitted, running)
        except _Died as death:
            wait, reason, _ = restart.decide(self.config, spec.name, death.job, None)
            if wait is None:
                raise UserError(_failure(self.config, spec.name, death.job, reason)) from death
            restart.clear(self.config, spec.name, death.job)
            self._say(f"{spec.name} failed and restarts in {wait:.0f} s: {reason}")
            return wait
        return None

    def _follow(self, submitted: jobs.Submitted, running: list[Any] | None = None) -> None:
        """Show the progress of a job until it ends: a live line on a terminal, plain lines elsewhere.

        ``running``: submitit's local jobs. Raises ``_Died`` for a local job that failed, ``UserError`` for a Slurm job.
        """
        config, training = self.config, submitted.stage == "train"
        started, last_line, failing = time.monotonic(), 0.0, 0.0
        metrics = MetricsReader(config.run_directory)
        metrics.read()
        live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        if live:
            live.start()
        try:
            while True:
                ended = (
                    all(j.done() for j in running) if running else not jobs.states(config.run_directory, [submitted])
                )
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
                        jobs.end_processes(config.run_directory, submitted)
                time.sleep(_POLL_SECONDS[self.cluster])
        finally:
            if live:
                live.stop()
        for job in submitted.ids:
            run = config.run_directory
            if not self._succeeded(submitted.step, job):
                if running:
                    raise _Died(job)
                reasons = [record["reason"] for record in run.restarts() if record["job"] == job]
                error = run.error(submitted.step, job)
                reason = error["line"] if error else reasons[-1] if reasons else "the job ended without a result"
                raise UserError(_failure(config, submitted.step, job, reason))
            log = run.log_path(submitted.step, job, rank=0)
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                printed = logs.parse(line)
                if printed and printed.topic in _SHOWN_TOPICS:
                    self._say(f"{printed.topic}: {printed.message}")
        self._say(f"{submitted.step}: {time.monotonic() - started:.0f} s")

    def _succeeded(self, step: str, job: str) -> bool:
        """Whether all processes of a job have written a result. Waits for shared disks, which may show files late."""
        run = self.config.run_directory
        deadline = time.monotonic() + (20.0 if self.cluster == "slurm" else 0.0)
        while not run.result_paths(step, job, rank=0) and time.monotonic() < deadline:
            time.sleep(0.5)
        results = run.result_paths(step, job)
        return bool(results) and all(pickle.loads(path.read_bytes())[0] == "success" for path in results)

    def _close(self) -> None:
        """Print the report of the run."""
        from armd_scale.evaluation.report import lines

        summary = self.config.run_directory.summary()
        if summary is None:
            return
        self.console.rule()
        for line in lines(summary, self.config.run_directory):
            self._say(line)


class _Died(Exception):
    """A local job failed."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job


def _failure(config: RunConfig, step: str, job: str, reason: str) -> str:
    run = config.run_directory
    error = run.error(step, job)
    if error and error["bad_input"]:
        return reason
    if error and error.get("permanent"):  # older jobs do not record it
        log = run.log_path(step, job, error["rank"], "err")
        return f"job '{step}' failed and would fail again: {reason}; see the traceback in {log}"
    return (
        f"job '{step}' failed: {reason} (logs in {run.job(step, job)}): the same command resumes from the newest "
        "checkpoint"
    )


def _prepare_folder(config: RunConfig) -> None:
    """Check that the run directory belongs to this run, and write the configuration and the environment."""
    run = config.run_directory
    newest = manifest.readable(run)
    if newest:
        manifest.check_identity(newest, config)
        state = manifest.read(newest)
        schedules.check(state.get("state", {}).get("schedule", {}), config, state["step"])
    try:
        config_files.save(_movable(config), run.config_path)
        write_atomically(run.environment_path, json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the run directory {run.path} cannot be written: {error}") from error


def _movable(config: RunConfig) -> RunConfig:
    """The configuration with a data directory that means the same from another working directory.

    Data in the run directory move with the run.
    """
    data = config.data_directory.resolve()
    inside = data == config.run_directory.data.resolve()
    changed = config.data.model_copy(update={"directory": None if inside else str(data)})
    return config.model_copy(update={"data": changed})


def _heldout(record: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{name.removeprefix('heldout_').removesuffix('_bits_per_byte').replace('_', ' ')} {value:.3f}"
        for name, value in record.items()
        if name.endswith("_bits_per_byte")
    )
    return f"step {record['step']}: held-out bits/byte: {figures}"
