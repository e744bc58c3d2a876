"""The stages of a run as jobs: prepare the data, train, finish (export, evaluate, generate, report).

A job is a function of the resolved configuration that runs in processes which submitit starts. A ``UserError``
comes back as a value, so that the front door can print it as one line.
"""

import os
import traceback
from collections.abc import Callable
from typing import Any

from armd_scale.config import RunConfig
from armd_scale.errors import UserError, is_bad_input


def run(stage: str, config: RunConfig, token: str) -> dict[str, Any]:
    """Run one stage in this process; {"error": line} when its input cannot be used.

    ``token``: a word that no other submission has, for files that processes meet at.
    """
    os.environ["ARMD_SUBMISSION"] = token
    if not config.cluster.gpus_per_node:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return _JOBS[stage](config) or {}
    except Exception as error:
        # A training process that fails alone has to end, so that submitit ends the others.
        if stage == "train" and not isinstance(error, UserError):
            raise
        traceback.print_exc()
        name = "" if is_bad_input(error) else f"stage '{stage}' failed: {type(error).__name__}: "
        return {"error": name + str(error)}


def _prepare(config: RunConfig) -> dict[str, Any]:
    from armd_scale.training import samples
    from data_pipeline.prepare import prepare

    index = prepare(config)
    samples.check(config)
    return {"samples": index["samples"]}


def _train(config: RunConfig) -> None:
    import submitit

    from armd_scale.training.loop import train

    job = submitit.JobEnvironment()
    train(config, job.global_rank, job.num_tasks, job.local_rank, _rendezvous(config, job))


def _rendezvous(config: RunConfig, job: Any) -> str:
    """Where the processes meet: the first node of a Slurm job, or a file of the run when all are on this machine."""
    if "SLURM_JOB_ID" in os.environ:
        # The address of the node that runs srun, which is the first; its name may mean nothing to the others.
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or job.hostnames[0]
        return f"tcp://{host}:{20000 + int(os.environ['SLURM_JOB_ID']) % 20000}"
    return str(config.directory / "jobs" / f"rendezvous-{os.environ['ARMD_SUBMISSION']}")


def _finish(config: RunConfig) -> dict[str, Any]:
    import torch

    from armd_scale.evaluation import report
    from armd_scale.training import export

    torch.set_num_threads(min(torch.get_num_threads(), config.cluster.cpus_per_task * config.cluster.tasks_per_node))
    config = export.load_run(config.directory)
    source = export.newest_checkpoint(config)
    out = config.directory / "export"
    facts = export.export(config, source, out)
    print(f"export: largest difference to the training model's logits {facts['difference']:.1e}", flush=True)
    return report.write(config, out, facts["difference"])


_JOBS: dict[str, Callable[[RunConfig], dict[str, Any] | None]] = {
    "prepare": _prepare,
    "train": _train,
    "finish": _finish,
}
