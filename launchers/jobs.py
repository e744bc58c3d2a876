"""The steps of a run, and how each becomes a job: of Slurm, or of processes of this machine, both through submitit.

- ``steps``: what is left to do for a run, in order;
- ``Jobs``: submits steps, with dependencies on Slurm, and knows what has become of them; ``sbatch_text``: the script.

Every job runs the copy of the code that the run directory keeps (``snapshot``), also when it is queued again.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from armd_scale.config import RunConfig, StageConfig
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenise", "train", "export", "evaluate")
_PACKAGES = ("armd_scale", "data_pipeline", "launchers")
_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # the snapshot, not the directory in which the job happens to start
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a lost peer is an error, not a wait
}


class Step(NamedTuple):
    """One job of a run, or an array of them."""

    name: str
    """Also the name of its directory among the jobs of the run."""
    stage: str
    """One of ``STAGES``."""
    shares: int = 1
    """Jobs that share it."""


def steps(config: RunConfig, only: str | None = None, start: str | None = None) -> list[Step]:
    """The steps that are left; what is complete and valid is left out, unless ``only`` or ``start`` names a stage."""
    wanted = (only,) if only else STAGES[STAGES.index(start) :] if start else STAGES
    trained = is_trained(config)
    found = []
    if "tokenise" in wanted and not (trained and only != "tokenise"):
        complete = (config.data_directory / "complete.json").is_file()
        shares = config.data.jobs
        if shares > 1 and not complete:
            parts = (("begin", 1), ("tokenise", shares), ("merge", 1), ("pack", shares), ("finish", 1))
            found += [Step(f"tokenise-{part}", "tokenise", count) for part, count in parts]
        else:
            found.append(Step("tokenise", "tokenise"))
    if "train" in wanted and not trained:
        found.append(Step("train", "train"))
    named = {only, start}
    run = config.run_directory
    for stage, product in (("export", run.export / "config.json"), ("evaluate", run.summary_path)):
        fresh = trained and _made_from(product) == run.checkpoint(config.total_steps).name
        if stage in wanted and (stage in named or not fresh or any(step.stage != "tokenise" for step in found)):
            found.append(Step(stage, stage))
    return found


def is_trained(config: RunConfig) -> bool:
    """Whether the last checkpoint of the run is there already."""
    newest = manifest.newest_good(config.run_directory)
    return newest is not None and RunDirectory.step_of(newest) >= config.total_steps


def _made_from(product: Path) -> str | None:
    """The checkpoint that a product says it was made from."""
    try:
        return str(json.loads(product.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def snapshot(run: RunDirectory) -> Path:
    """Keep a copy of the code in the run directory, under its hash; returns the directory of the copy."""
    sources = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in _PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    name = hashlib.sha256(b"\0".join(name.encode() + b"\0" + text for name, text in sources.items())).hexdigest()[:12]
    folder = run.code / name
    if not folder.is_dir():
        partial = folder.with_name(f".{name}.{os.getpid()}")
        for file, text in sources.items():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).write_bytes(text)
        try:
            os.replace(partial, folder)
        except OSError:  # another launcher was faster
            shutil.rmtree(partial)
    return folder.resolve()


def environment(config: RunConfig, code: Path) -> dict[str, str]:
    """Environment variables of every process of a run."""
    own = config.cluster.environment
    path = os.pathsep.join(filter(None, [str(code), own.get("PYTHONPATH")]))
    return {**_ENVIRONMENT, "OMP_NUM_THREADS": str(config.cluster.cpus_per_task), **own, "PYTHONPATH": path}


def parameters(config: RunConfig, step: Step, code: Path) -> dict[str, Any]:
    """What sbatch is asked for, in submitit's names."""
    cluster = config.cluster
    own: StageConfig = StageConfig() if step.stage == "train" else getattr(cluster, step.stage)
    training = step.stage == "train"
    gpus = cluster.gpus_per_node if training else own.gpus
    if gpus is None:
        gpus = min(1, cluster.gpus_per_node) if step.stage != "tokenise" else 0
    python = _python(config)
    folder = shlex.quote(str(config.directory.resolve()))
    job = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    restart = f"{python} -m launchers.restart {folder} {step.name} ${{job:-$SLURM_JOB_ID}} $code"
    asked: dict[str, Any] = {
        "job_name": f"{config.name}-{step.name}",
        "nodes": cluster.nodes if training else 1,
        "ntasks_per_node": cluster.tasks_per_node if training else 1,
        "cpus_per_task": cluster.cpus_per_task if training else own.cpus or cluster.cpus_per_task,
        "gpus_per_node": gpus or None,
        "mem": f"{memory}GB" if (memory := cluster.memory_gb if training else own.memory_gb) else None,
        "time": own.timeout_minutes or cluster.timeout_minutes,
        "partition": own.partition or cluster.partition,
        "account": cluster.account,
        "signal_delay_s": cluster.warn_seconds,
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": [
            *cluster.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in environment(config, code).items()),
        ],
        # A job that dies starts again in its allocation, as often as launchers/restart.py allows.
        "teardown": ["code=$?", f"job={job}", f'[ $code -eq 0 ] || {{ {restart} && exec bash "$0"; }}', "exit $code"],
        "additional_parameters": {"requeue": True, **cluster.sbatch},
    }
    return {name: value for name, value in asked.items() if value is not None}


def sbatch_text(config: RunConfig, step: Step, code: Path) -> str:
    """The script that is given to sbatch, with ``%j`` for the job's number; needs no Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = _folder(config, step)
    command = f"{_python(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    shares: dict[str, Any] = {"map_count": step.shares} if step.shares > 1 else {}
    return _make_sbatch_string(command=command, folder=folder, **parameters(config, step, code), **shares)


def _python(config: RunConfig) -> str:
    """The command that starts Python in a Slurm job."""
    return config.cluster.python or shlex.quote(sys.executable)


def _folder(config: RunConfig, step: Step) -> Path:
    return config.run_directory.job(step.name, "%j").resolve()


class Submitted(NamedTuple):
    """A step that was given to Slurm or to processes of this machine."""

    step: str
    stage: str
    ids: list[str]
    cluster: str
    processes: list[int]
    """Process numbers of local jobs."""
    time: float


class Jobs:
    """Submits the steps of a run."""

    def __init__(self, config: RunConfig, cluster: str, code: Path) -> None:
        self.config, self.cluster, self.code = config, cluster, code

    def submit(self, step: Step, after: Submitted | None = None) -> tuple[Submitted, list[Any]]:
        """Submit a step that begins when ``after`` has ended well; also submitit's jobs."""
        from launchers import stages

        executor = self._executor(step, after)
        calls = [(step.name, self.config, uuid.uuid4().hex, share, step.shares) for share in range(step.shares)]
        if step.shares > 1:
            jobs = executor.map_array(stages.run, *map(list, zip(*calls, strict=True)))
        else:
            jobs = [executor.submit(stages.run, *calls[0])]
        processes = [job._process.pid for job in jobs if getattr(job, "_process", None)]
        ids = [job.job_id for job in jobs]
        submitted = Submitted(step.name, step.stage, ids, self.cluster, processes, time.time())
        remember(self.config.run_directory, submitted)
        return submitted, jobs

    def _executor(self, step: Step, after: Submitted | None) -> Any:
        import submitit

        folder = _folder(self.config, step)
        asked = parameters(self.config, step, self.code)
        if self.cluster == "slurm":
            # Signals are the trainer's own affair: submitit's count of time-outs never comes to bear.
            slurm = submitit.SlurmExecutor(folder, max_num_timeout=1000, python=self.config.cluster.python)
            if after:
                first = after.ids[0].partition("_")[0]
                asked["dependency"] = f"afterok:{first}"
                asked["additional_parameters"] = {"kill-on-invalid-dep": "yes", **asked["additional_parameters"]}
            slurm.update_parameters(**asked)
            return slurm
        os.environ.update(environment(self.config, self.code))
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        gpus = {"gpus_per_node": asked["gpus_per_node"]} if "gpus_per_node" in asked else {}
        executor.update_parameters(
            name=asked["job_name"], nodes=1, tasks_per_node=asked["ntasks_per_node"], timeout_min=asked["time"], **gpus
        )
        return executor


def remember(run: RunDirectory, submitted: Submitted) -> None:
    """Write down what was submitted."""
    write_atomically(run.jobs_path, json.dumps([job._asdict() for job in [*known(run), submitted]], indent=1))


def known(run: RunDirectory) -> list[Submitted]:
    """All jobs of a run, in the order in which they were submitted."""
    path = run.jobs_path
    try:
        return [Submitted(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it if no job of the run is queued") from error


def states(submitted: list[Submitted]) -> dict[str, str]:
    """Slurm's states of the jobs that it still has, RUNNING for local ones that are alive."""
    found: dict[str, str] = {}
    queued = [job for each in submitted if each.cluster == "slurm" for job in each.ids]
    if queued:
        numbers = sorted({job.partition("_")[0] for job in queued})
        done = subprocess.run(
            ["squeue", "-h", "-r", "-o", "%i %T", "-j", ",".join(numbers)], capture_output=True, text=True, check=False
        )
        if done.returncode and "Invalid job id" not in done.stderr:
            raise OSError(f"squeue does not answer: {done.stderr.strip()}")
        if done.returncode and len(numbers) > 1:  # one that Slurm has forgotten hides the others
            for each in submitted:
                found |= states([each])
            return found
        for line in done.stdout.splitlines():
            job, state = line.split(None, 1)
            found[job] = state.strip()
    for each in submitted:
        for job, process in zip(each.ids, each.processes, strict=False):
            if _is_ours(process):
                found[job] = "RUNNING"
    return {job: state for job, state in found.items() if job in {job for each in submitted for job in each.ids}}


def alive(run: RunDirectory) -> list[Submitted]:
    """Those jobs of a run that wait or run."""
    every = known(run)
    now = states(every)
    return [each for each in every if any(job in now for job in each.ids)]


def cancel(run: RunDirectory) -> list[Submitted]:
    """End all jobs of a run; returns the jobs that were waiting or running."""
    ending = alive(run)
    for each in ending:
        if each.cluster == "slurm":
            subprocess.run(["scancel", *{job.partition("_")[0] for job in each.ids}], check=False)
        for process in each.processes:
            if _is_ours(process):
                os.kill(process, signal.SIGINT)
    return ending


def end_processes(submitted: Submitted) -> None:
    """kill -9 the processes of a local job: submitit's controller waits for all, also for one that is stopped."""
    for process in submitted.processes:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
            for child in map(int, children if _is_ours(process) else []):
                os.kill(child, signal.SIGKILL)


def _is_ours(process: int) -> bool:
    """Whether a process number still belongs to submitit's controller of a local job."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return b"submitit" in words and state != "Z"
