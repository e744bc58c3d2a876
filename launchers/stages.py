"""The functions that jobs run: prepare the data, train, export, evaluate.

A job calls a function of the resolved configuration in processes that submitit starts. An error is written to
``error.json`` in the directory of the job, for the launcher and for the restart decision.
"""

import contextlib
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

import submitit

from armd_scale import logs
from armd_scale.config import RunConfig, load_run
from armd_scale.data.shards import fill_vocabulary
from armd_scale.errors import UserError, is_bad_input, is_permanent
from armd_scale.run_directory import RunDirectory
from launchers import restart


def run(step: str, config: RunConfig, token: str, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Run the job ``step`` in this process, as job ``share`` of an array of ``shares``. Records and raises errors.

    ``token``: unique word of this submission, for the rendezvous.
    """
    logs.configure(_rank())
    # Each (re)start uses a fresh rendezvous file.
    os.environ["ARMD_SUBMISSION"] = f"{token}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    if not config.cluster.gpus_per_node:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if step.startswith("tokenise-"):
            return _tokenise_share(config, step.removeprefix("tokenise-"), share, shares)
        return _JOBS[step](config) or {}
    except Exception as error:
        traceback.print_exc()
        _record(step, error)
        raise


def _rank() -> int:
    """The rank of this process in its job; 0 in the launcher's own process."""
    return int(os.environ.get("SUBMITIT_LOCAL_GLOBALID", os.environ.get("SLURM_PROCID", 0)))


def _record(step: str, error: Exception) -> None:
    """Write the first error of a job to ``error.json``."""
    line = str(error) if is_bad_input(error) else f"{type(error).__name__}: {error}"
    facts = {
        "line": " ".join(line.split())[:2000],
        "bad_input": is_permanent(error),
        "rank": _rank(),
        "reached": getattr(error, "step", None),
        "step": step,
    }
    if "SUBMITIT_FOLDER" not in os.environ:  # this is the launcher's process, which catches the error
        return
    folder = submitit.JobEnvironment().paths.folder
    with contextlib.suppress(OSError), RunDirectory.error_path(folder).open("x", encoding="utf-8") as file:
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


def _train(config: RunConfig) -> None:
    from armd_scale.training import health
    from armd_scale.training.loop import train

    job = submitit.JobEnvironment()
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if requeues and job.global_rank == 0:
        restart.note_requeue(config, job.job_id, requeues, "preempted or lost a node")
    flag = train(config, job.global_rank, job.num_tasks, job.local_rank, _rendezvous(config, job))
    if not flag:
        return
    if flag == health.REQUEUE and "SLURM_JOB_ID" in os.environ:
        if job.global_rank == 0:
            logs.JOB.info("the state is saved, requeueing the job")
            restart.note_requeue(config, job.job_id, requeues + 1, "warned before the time limit or preemption")
            restart.requeue()
        restart.hold()
    raise UserError("stopped by a signal: the state is saved, run the same command to resume")


def _rendezvous(config: RunConfig, job: Any) -> str:
    """The rendezvous: an address on the first node of a Slurm job, or a file for local processes."""
    if "SLURM_JOB_ID" in os.environ:
        # srun runs on the first node. Other nodes may not resolve its name, so the address is used.
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or job.hostnames[0]
        return f"tcp://{host}:{20000 + int(os.environ['SLURM_JOB_ID']) % 20000}"
    path = config.run_directory.rendezvous_path(os.environ["ARMD_SUBMISSION"])
    path.parent.mkdir(exist_ok=True)
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


_JOBS: dict[str, Callable[[RunConfig], dict[str, Any] | None]] = {
    "tokenise": tokenise,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
}
