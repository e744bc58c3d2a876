"""Jobs of a run, submitted with submitit to Slurm or to processes of this machine.

- ``remaining_jobs``: the jobs that a run still needs, in order;
- ``Jobs``: submits jobs, with dependencies on Slurm; ``sbatch_text``: the batch script;
- ``known``, ``alive``, ``states``, ``cancel``: submitted jobs.

Every job runs the copy of the code in the run directory (``snapshot``), also after a requeue.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from armd_scale import logs
from armd_scale.config import RunConfig, StageConfig
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenise", "train", "export", "evaluate")
_PACKAGES = ("armd_scale", "data_pipeline", "launchers")
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
"""How the variables begin that describe a running job."""
_OF_A_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables of the same form that say how to reach Slurm."""
_NO_LIMIT = 100 * 365 * 24 * 60
"""Time limit of a local job in minutes; submitit needs one."""
_END_SECONDS = 5.0
"""Time for local processes to end after SIGINT."""
_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # import from the snapshot, not from the working directory
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",  # torch reads its own files in the encoding of the locale
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a lost peer raises an error
}


class JobSpec(NamedTuple):
    """A job of a run, or an array of jobs."""

    name: str
    """Name of the job, and of its directory in the run directory."""
    stage: str
    """Element of ``STAGES``."""
    shares: int = 1
    """Number of jobs in the array."""


def remaining_jobs(config: RunConfig, only: str | None = None, start: str | None = None) -> list[JobSpec]:
    """The jobs that a run still needs.

    Jobs with complete and valid output are left out, unless ``only`` or ``start`` names them.
    """
    wanted = (only,) if only else STAGES[STAGES.index(start) :] if start else STAGES
    trained = is_trained(config)
    specs = []
    if "tokenise" in wanted and not (trained and only != "tokenise"):
        complete = (config.data_directory / "complete.json").is_file()
        shares = config.data.jobs
        if shares > 1 and not complete:
            parts = (("begin", 1), ("tokenise", shares), ("merge", 1), ("pack", shares), ("finish", 1))
            specs += [JobSpec(f"tokenise-{part}", "tokenise", count) for part, count in parts]
        else:
            specs.append(JobSpec("tokenise", "tokenise"))
    if "train" in wanted and not trained:
        specs.append(JobSpec("train", "train"))
    named = {only, start}
    run = config.run_directory
    for stage, output in (("export", run.export / "config.json"), ("evaluate", run.summary_path)):
        fresh = trained and _source_checkpoint(output) == run.checkpoint(config.total_steps).name
        if stage in wanted and (stage in named or not fresh or any(spec.stage != "tokenise" for spec in specs)):
            specs.append(JobSpec(stage, stage))
    return specs


def is_trained(config: RunConfig) -> bool:
    """Whether the checkpoint of the last step exists."""
    newest = manifest.newest_good(config.run_directory)
    return newest is not None and RunDirectory.step_of(newest) >= config.total_steps


def _source_checkpoint(output: Path) -> str | None:
    """Name of the checkpoint recorded in an output file; None if the file cannot be read."""
    try:
        return str(json.loads(output.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def snapshot(run: RunDirectory) -> Path:
    """Copy the code into the run directory, under its hash; returns the directory of the copy."""
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
        except OSError:  # another launcher has made the copy
            shutil.rmtree(partial)
    return folder.resolve()


def environment(config: RunConfig, code: Path) -> dict[str, str]:
    """Environment variables of all processes of a run."""
    own = config.cluster.environment
    path = os.pathsep.join(filter(None, [str(code), own.get("PYTHONPATH")]))
    return {**_ENVIRONMENT, "OMP_NUM_THREADS": str(config.cluster.cpus_per_task), **own, "PYTHONPATH": path}


def parameters(config: RunConfig, spec: JobSpec, code: Path) -> dict[str, Any]:
    """Parameters of sbatch under their names in submitit."""
    cluster = config.cluster
    own: StageConfig = StageConfig() if spec.stage == "train" else getattr(cluster, spec.stage)
    training = spec.stage == "train"
    gpus = cluster.gpus_per_node if training else own.gpus
    if gpus is None:
        gpus = min(1, cluster.gpus_per_node) if spec.stage != "tokenise" else 0
    python = _python(config)
    folder = shlex.quote(str(config.directory.resolve()))
    job = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    restart = f"{python} -m launchers.restart {folder} {spec.name} ${{job:-$SLURM_JOB_ID}} $code"
    asked: dict[str, Any] = {
        "job_name": f"{config.name}-{spec.name}",
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
        # A job that fails restarts in its allocation, as often as launchers/restart.py allows.
        "teardown": ["code=$?", f"job={job}", f'[ $code -eq 0 ] || {{ {restart} && exec bash "$0"; }}', "exit $code"],
        "additional_parameters": {"requeue": True, **cluster.sbatch},
    }
    return {name: value for name, value in asked.items() if value is not None}


def sbatch_text(config: RunConfig, spec: JobSpec, code: Path) -> str:
    """The batch script, with ``%j`` for the job id. Does not need Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = _folder(config, spec)
    command = f"{_python(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    shares: dict[str, Any] = {"map_count": spec.shares} if spec.shares > 1 else {}
    return _make_sbatch_string(command=command, folder=folder, **parameters(config, spec, code), **shares)


def _python(config: RunConfig) -> str:
    """Command that starts Python in a Slurm job."""
    return config.cluster.python or shlex.quote(sys.executable)


def _folder(config: RunConfig, spec: JobSpec) -> Path:
    return config.run_directory.job(spec.name, "%j").resolve()


class Submitted(NamedTuple):
    """A job that was submitted to Slurm or started on this machine."""

    step: str
    stage: str
    ids: list[str]
    cluster: str
    processes: list[int]
    """Process ids of local jobs."""
    time: float


class Jobs:
    """Submits the jobs of a run."""

    def __init__(self, config: RunConfig, cluster: str, code: Path) -> None:
        self.config, self.cluster, self.code = config, cluster, code

    def submit(self, spec: JobSpec, after: Submitted | None = None) -> tuple[Submitted, list[Any]]:
        """Submit a job that starts when ``after`` has succeeded; returns its record and submitit's jobs."""
        from launchers import stages

        executor = self._executor(spec, after)
        token, devices = uuid.uuid4().hex, self._devices(spec)
        submissions = [stages.Submission(self.cluster, token, devices, n, spec.shares) for n in range(spec.shares)]
        calls = [(spec.name, self.config, submission) for submission in submissions]
        if spec.shares > 1:
            jobs = executor.map_array(stages.run, *map(list, zip(*calls, strict=True)))
        else:
            jobs = [executor.submit(stages.run, *calls[0])]
        processes = [job._process.pid for job in jobs if getattr(job, "_process", None)]
        ids = [job.job_id for job in jobs]
        submitted = Submitted(spec.name, spec.stage, ids, self.cluster, processes, time.time())
        remember(self.config.run_directory, submitted)
        return submitted, jobs

    def _devices(self, spec: JobSpec) -> list[str] | None:
        """The GPUs of a local job."""
        if self.cluster != "local":
            return None
        asked = parameters(self.config, spec, self.code)
        return visible_devices(asked.get("gpus_per_node", 0), environment(self.config, self.code))

    def _executor(self, spec: JobSpec, after: Submitted | None) -> Any:
        import submitit

        folder = _folder(self.config, spec)
        asked = parameters(self.config, spec, self.code)
        _leave_job()
        if self.cluster == "slurm":
            # The trainer handles signals itself, so the limit of submitit on time-outs must not apply.
            slurm = submitit.SlurmExecutor(folder, max_num_timeout=1000, python=self.config.cluster.python)
            if after:
                first = after.ids[0].partition("_")[0]
                asked["dependency"] = f"afterok:{first}"
                asked["additional_parameters"] = {"kill-on-invalid-dep": "yes", **asked["additional_parameters"]}
            slurm.update_parameters(**asked)
            return slurm
        os.environ.update(environment(self.config, self.code))
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        executor.update_parameters(
            name=asked["job_name"], nodes=1, tasks_per_node=asked["ntasks_per_node"], timeout_min=_NO_LIMIT
        )
        return executor


def _leave_job() -> None:
    """Forget the Slurm job in which this launcher may run: what it submits is no part of that job."""
    for name in [name for name in os.environ if name.startswith(_OF_A_JOB) and name not in _OF_A_SITE]:
        del os.environ[name]


def visible_devices(count: int, variables: Mapping[str, str]) -> list[str]:
    """The first ``count`` GPUs that ``CUDA_VISIBLE_DEVICES`` lists in ``variables`` or in the environment.

    Without the variable: 0 to ``count`` - 1. ``UserError`` if it lists fewer.
    """
    listed = {**os.environ, **variables}.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(map(str, range(count)))
    # CUDA ignores what follows an invalid entry.
    devices = list(itertools.takewhile(lambda word: word not in ("", "-1"), map(str.strip, listed.split(","))))
    if len(devices) < count:
        raise UserError(
            f"cluster.gpus_per_node is {count} but CUDA_VISIBLE_DEVICES={listed} lists {len(devices)}: name as many "
            "GPUs or lower cluster.gpus_per_node, cluster.tasks_per_node and the layout"
        )
    return devices[:count]


def remember(run: RunDirectory, submitted: Submitted) -> None:
    """Append a job to the list of submitted jobs."""
    write_atomically(run.jobs_path, json.dumps([job._asdict() for job in [*known(run), submitted]], indent=1))


def known(run: RunDirectory) -> list[Submitted]:
    """All submitted jobs of a run, in the order of submission."""
    path = run.jobs_path
    try:
        return [Submitted(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove the file if no job of the run is queued") from error


def states(run: RunDirectory, submitted: list[Submitted]) -> dict[str, str]:
    """Job id -> state in Slurm's queue, or RUNNING for a live local job; finished jobs are left out."""
    state_of: dict[str, str] = {}
    queued = [job for record in submitted if record.cluster == "slurm" for job in record.ids]
    if queued and not shutil.which("squeue"):  # a run that was copied from a cluster
        logs.JOB.warning("no squeue on this machine: jobs on Slurm are not looked up", extra=logs.ONCE)
    elif queued:
        numbers = sorted({job.partition("_")[0] for job in queued})
        result = subprocess.run(
            ["squeue", "-h", "-r", "-o", "%i %T", "-j", ",".join(numbers)], capture_output=True, text=True, check=False
        )
        if result.returncode and "Invalid job id" not in result.stderr:
            raise OSError(f"squeue failed: {result.stderr.strip()}")
        if result.returncode and len(numbers) > 1:  # squeue lists nothing if any of the ids has left its memory
            for record in submitted:
                state_of |= states(run, [record])
            return state_of
        for line in result.stdout.splitlines():
            job, state = line.split(None, 1)
            state_of[job] = state.strip()
    for record in submitted:
        for job, process in zip(record.ids, record.processes, strict=False):
            if _controls(run, process):
                state_of[job] = "RUNNING"
    ids = {job for record in submitted for job in record.ids}
    return {job: state for job, state in state_of.items() if job in ids}


def alive(run: RunDirectory) -> list[Submitted]:
    """The jobs of a run that are waiting or running.

    Processes of a local job count without their controller too, for example those of another machine.
    """
    submitted = known(run)
    state_of = states(run, submitted)
    living = [record for record in submitted if any(job in state_of for job in record.ids)]
    if not living and run.processes():
        living = [record for record in submitted if record.cluster == "local"][-1:]
    return living


def cancel(run: RunDirectory) -> list[Submitted]:
    """Cancel all jobs of a run; returns the jobs that were waiting or running.

    ``UserError`` if a process lives on another machine.
    """
    cancelled = alive(run)
    for record in cancelled:
        if record.cluster == "slurm":
            subprocess.run(["scancel", *{job.partition("_")[0] for job in record.ids}], check=False)
    _end_local(run, [process for record in cancelled for process in record.processes])
    elsewhere = [process for process in run.processes() if process.host != socket.gethostname()]
    if elsewhere:
        raise UserError(f"{elsewhere[0]} works in {run.path}: run `armd cancel` there")
    return cancelled


def _end_local(run: RunDirectory, controllers: list[int]) -> None:
    """SIGINT to submitit's controllers, which end their processes; later SIGKILL to all that still live."""

    def living() -> list[int]:
        here = [process.pid for process in run.processes() if process.host == socket.gethostname()]
        ranks = [pid for pid in here if pid and b"submitit" in _command(pid)]
        return ranks + [pid for pid in controllers if _controls(run, pid)]

    for controller in controllers:
        if _controls(run, controller):
            os.kill(controller, signal.SIGINT)

    deadline = time.monotonic() + _END_SECONDS
    while (left := living()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_processes(run: RunDirectory, submitted: Submitted) -> None:
    """Send SIGKILL to the processes of a local job, as submitit's controller would wait for a stopped process."""
    for process in submitted.processes:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
            for child in map(int, children if _controls(run, process) else []):
                os.kill(child, signal.SIGKILL)


def _controls(run: RunDirectory, process: int) -> bool:
    """Whether a process id still belongs to submitit's controller of a local job of this run."""
    folder = os.fsencode(run.jobs.resolve()) + b"/"
    return b"submitit.local" in (command := _command(process)) and b"\0" + folder in command


def _command(process: int) -> bytes:
    """Command line of a process, its words separated by zeros; empty for a process that has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return b"" if state == "Z" else Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
