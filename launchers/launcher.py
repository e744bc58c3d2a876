"""Submits what is left of a run and follows it to its end, on Slurm or in processes of this machine."""

import json
import os
import pickle
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from armd_scale import config as configs
from armd_scale import logs
from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.training import manifest
from armd_scale.training.telemetry import MetricsReader, environment
from launchers import jobs, restart, status

_GRACE_SECONDS = 5.0  # in which the processes of a local job end after the first of them has failed
_SHOWN_TOPICS = ("data", "export")  # of the lines of jobs
_POLL_SECONDS = {"slurm": 2.0, "local": 0.5}


class Launcher:
    """Submits the steps of a run and shows how they go on."""

    def __init__(self, config: RunConfig, cluster: str, only: str | None, start: str | None) -> None:
        logs.configure()
        self.config, self.cluster = config, cluster
        self.console = Console(highlight=False, markup=False)
        running = jobs.alive(config.run_directory)
        if running and running[0].cluster != "slurm":
            raise UserError(
                f"jobs of an earlier launcher still run in {config.directory}: wait for them, or end them with "
                f"`armd cancel {config.directory}`"
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
            f"{config.train.global_batch} x {config.model.length} tokens; run directory {config.directory}"
        )

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def run(self, detach: bool) -> None:
        """Do all steps; raises ``UserError`` with the reason when one fails."""
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
                self._say(f"`armd status {self.config.directory}` says how they stand")
                return
            try:
                for each in chain:
                    self._follow(each)
            except KeyboardInterrupt:
                self._say(
                    f"the jobs go on; `armd status {self.config.directory}` says how they stand, the "
                    "same command follows them again, `cancel` ends them"
                )
                raise
        self._close()

    def _debug(self, submitter: jobs.Jobs, step: jobs.Step) -> None:
        """Run a step in this process; what goes wrong in it is raised here, in the debugger on a terminal."""
        for job in submitter.submit(step)[1]:
            os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
            if sys.stdin.isatty():
                job.results()
            elif error := job.exception():
                raise error
        self._say(f"{step.name}: done")

    def _run_here(self, submitter: jobs.Jobs, step: jobs.Step) -> None:
        """Run a step in processes of this machine, and again when it dies of something that may pass."""
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

    def _follow(self, submitted: jobs.Submitted, running: list[Any] | None = None) -> None:
        """Show a step until it ends: one live line on a terminal, plain lines elsewhere.

        ``running``: submitit's jobs of this machine. Raises ``_Died``, or ``UserError`` for a job of Slurm that failed.
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
            log = run.log_path(submitted.step, job, rank=0)
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                printed = logs.parse(line)
                if printed and printed.topic in _SHOWN_TOPICS:
                    self._say(f"{printed.topic}: {printed.message}")
        self._say(f"{submitted.step}: {time.monotonic() - started:.0f} s")

    def _succeeded(self, step: str, job: str) -> bool:
        """Whether every process of a job has written a result; shared disks may show it late."""
        run = self.config.run_directory
        deadline = time.monotonic() + (20.0 if self.cluster == "slurm" else 0.0)
        while not run.result_paths(step, job, rank=0) and time.monotonic() < deadline:
            time.sleep(0.5)
        results = run.result_paths(step, job)
        return bool(results) and all(pickle.loads(path.read_bytes())[0] == "success" for path in results)

    def _close(self) -> None:
        """Print the last screen."""
        from armd_scale.evaluation.report import lines

        summary = self.config.run_directory.summary()
        if summary is None:
            return
        self.console.rule()
        for line in lines(summary, self.config.run_directory):
            self._say(line)


class _Died(Exception):
    """A local job ended without a result."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job


def _failure(config: RunConfig, step: str, job: str, reason: str) -> str:
    folder, error = config.run_directory.job(step, job), config.run_directory.error(step, job)
    if error and error["bad_input"]:
        return reason
    return f"stage '{step}' failed: {reason} (logs in {folder}); the same command goes on from the newest checkpoint"


def _prepare_folder(config: RunConfig) -> None:
    """Refuse a run directory that belongs to another run, and write down what is about to run."""
    run = config.run_directory
    newest = manifest.readable(run)
    if newest:
        manifest.check_identity(newest, config)
    try:
        configs.save(config, run.config_path)
        write_atomically(run.environment_path, json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the run directory {run.path} cannot be written: {error}") from error


def _heldout(record: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{name.removeprefix('heldout_').removesuffix('_bits_per_byte').replace('_', ' ')} {value:.3f}"
        for name, value in record.items()
        if name.endswith("_bits_per_byte")
    )
    return f"step {record['step']}: held-out bits/byte: {figures}"
