"""The functions that jobs run: prepare the data, train, export, evaluate.

A job calls a function of the resolved configuration in processes that submitit starts. An error is written to
``error.json`` in the directory of the job, for the launcher and for the restart decision.
"""

import contextlib
import json
import os
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from submitit.core.job_environment import JobEnvironment
from submitit.local.debug import DebugJobEnvironment
from submitit.local.local import LocalJobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from armd_scale import logs
from armd_scale.config import RunConfig
from armd_scale.config_files import load_run
from armd_scale.data.shards import fill_vocabulary
from armd_scale.errors import UserError, is_bad_input, is_permanent, is_user_error
from armd_scale.files import exclusive
from armd_scale.processes import die_with_parent
from armd_scale.run_directory import RunDirectory
from launchers import restart


class Submission(NamedTuple):
    """What the launcher tells the processes of a job. They take it from nowhere else: the variables of Slurm or of
    submitit in their environment can be those of a session in which the launcher runs.
    """

    executor: str
    """``slurm``, ``local`` or ``debug`` (the launcher's own process)."""
    token: str
    """Unique word of the submission."""
    devices: list[str] | None = None
    """GPUs of a local job, as in ``CUDA_VISIBLE_DEVICES``; None: those of the environment."""
    share: int = 0
    """Number of this job in its array."""
    shares: int = 1
    """Jobs of the array."""


def run(step: str, config: RunConfig, submission: Submission) -> dict[str, Any]:
    """Run the job ``step`` in this process. Records and raises errors."""
    job = _ENVIRONMENTS[submission.executor]()
    logs.configure(job.global_rank)
    if submission.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(submission.devices)
    elif not config.cluster.gpus_per_node:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with _living(config, submission, job):
            if step.startswith("tokenise-"):
                part = step.removeprefix("tokenise-")
                return _tokenise_share(config, part, submission.share, submission.shares)
            if step == "train":
                return _train(config, submission, job)
            return _JOBS[step](config)
    except Exception as error:
        traceback.print_exc()
        if submission.executor != "debug":  # there, the launcher catches the error
            _record(config, step, job, error)
        raise


_ENVIRONMENTS: dict[str, type[JobEnvironment]] = {
    "slurm": SlurmJobEnvironment,
    "local": LocalJobEnvironment,
    "debug": DebugJobEnvironment,
}


def _living(config: RunConfig, submission: Submission, job: JobEnvironment) -> contextlib.AbstractContextManager[None]:
    """Makes a local process end with its controller, and shows other launchers that it lives.

    Waits for a process of the same rank of an earlier job.
    """
    if submission.executor != "local":
        return contextlib.nullcontext()
    die_with_parent(int(job.job_id))
    run = config.run_directory
    return exclusive(run.process_path(job.global_rank), f"rank {job.global_rank} of {run.path}", wait=True)


def _record(config: RunConfig, step: str, job: JobEnvironment, error: Exception) -> None:
    """Write the first error of a job to ``error.json``.

    ``bad_input``: the line says what the user can do; ``permanent``: a restart would fail again.
    """
    line = str(error) if is_bad_input(error) else ": ".join(filter(None, (type(error).__name__, str(error))))
    facts = {
        "line": " ".join(line.split())[:2000],
        "bad_input": is_user_error(error),
        "permanent": is_permanent(error),
        "rank": job.global_rank,
        "reached": getattr(error, "step", None),
        "step": step,
    }
    path = RunDirectory.error_path(config.run_directory.job(step, job.job_id))
    with contextlib.suppress(OSError), path.open("x", encoding="utf-8") as file:
        json.dump(facts, file)


def _tokenise_share(config: RunConfig, part: str, share: int, shares: int) -> dict[str, Any]:
    from armd_scale.training import samples
    from data_pipeline import prepare

    prepare.step(config, part, share, shares)
    if part == "finish":
        samples.check(config)
    return {}


def tokenise(config: RunConfig) -> dict[str, Any]:
    """Prepare the data of a run in this job; returns the number of training samples."""
    from armd_scale.training import samples
    from data_pipeline.prepare import prepare

    index = prepare(config)
    samples.check(config)
    return {"samples": index["samples"]}


def _train(config: RunConfig, submission: Submission, job: JobEnvironment) -> dict[str, Any]:
    from armd_scale.training import health
    from armd_scale.training.loop import train

    on_slurm = submission.executor == "slurm"
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", 0)) if on_slurm else 0
    if requeues and job.global_rank == 0:
        restart.note_requeue(config, job.job_id, requeues, "preempted or lost a node")
    flag = train(config, job.global_rank, job.num_tasks, job.local_rank, rendezvous(config, submission, job))
    if not flag:
        return {}
    if flag == health.REQUEUE and on_slurm:
        if job.global_rank == 0:
            logs.JOB.info("the state is saved, requeueing the job")
            restart.note_requeue(config, job.job_id, requeues + 1, "warned before the time limit or preemption")
            restart.requeue()
        restart.hold()
    raise UserError("stopped by a signal: the state is saved, run the same command to resume")


def rendezvous(config: RunConfig, submission: Submission, job: JobEnvironment) -> str:
    """The rendezvous: an address on the first node of a Slurm job, or a file for local processes."""
    if submission.executor == "slurm":
        # srun runs on the first node. Other nodes may not resolve its name, so the address is used.
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or job.hostnames[0]
        return f"tcp://{host}:{20000 + int(os.environ['SLURM_JOB_ID']) % 20000}"
    path = config.run_directory.rendezvous_path(submission.token)
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)


def _export(config: RunConfig) -> dict[str, Any]:
    from armd_scale.training import export

    _set_threads(config)
    config = fill_vocabulary(load_run(config.run_directory))
    facts = export.export(config, export.newest_checkpoint(config), config.run_directory.export)
    logs.EXPORT.info("largest difference to the logits of the training model: %.1e", facts["difference"])
    return facts


def _evaluate(config: RunConfig) -> dict[str, Any]:
    from armd_scale.evaluation import report

    _set_threads(config)
    config = fill_vocabulary(load_run(config.run_directory))
    return report.write(config, config.run_directory.export)


def _set_threads(config: RunConfig) -> None:
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), config.cluster.cpus_per_task * config.cluster.tasks_per_node))


_JOBS: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "tokenise": tokenise,
    "export": _export,
    "evaluate": _evaluate,
}
