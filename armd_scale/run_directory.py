"""The run directory: the name of every file of a run, and how each file is read.

docs/howto/cluster.md describes the files. Names of files are spelt here and nowhere else; a file keeps its name between
versions, so that existing runs still work. Needs neither torch nor other processes.
"""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

from armd_scale.errors import UserError
from armd_scale.files import Holder, holder, read_json, read_json_lines

_STEP = "step-"
_CHECKPOINT = re.compile(_STEP + r"(\d{8,})")
_REMOVED = ".removed"
_RANK = re.compile(r"rank-(\d{5,})")


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Directory of a run. Properties and methods named ``*_path`` are files, which may not exist."""

    path: Path

    @classmethod
    def around(cls, path: Path) -> "RunDirectory | None":
        """The run directory that ``path`` is, or that holds ``path`` at most two levels down."""
        candidates = (cls(directory) for directory in (path, *path.resolve().parents[:2]))
        return next((run for run in candidates if run.exists()), None)

    @classmethod
    def of_config(cls, path: Path) -> "RunDirectory | None":
        """The run directory whose resolved configuration ``path`` is; None for a configuration elsewhere."""
        run = cls(path.parent)
        started = run.environment_path.is_file() or run.checkpoints.is_dir()
        return run if started and path.name == run.config_path.name else None

    def exists(self) -> bool:
        """Whether this is the directory of a run that was started."""
        return self.config_path.is_file()

    # --- configuration and environment

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        """Versions, machine and source tree."""
        return self.path / "environment.json"

    @property
    def origin_path(self) -> Path:
        """Facts about the pretrained model that the run began with."""
        return self.path / "origin.json"

    def origin(self) -> dict[str, Any]:
        """``model``, ``architecture``, ``dtype`` and ``bos`` of the pretrained model; empty without one."""
        return read_json(self.origin_path) or {}

    @property
    def lock_path(self) -> Path:
        """The lock of the launcher."""
        return self.path / ".lock"

    @property
    def code(self) -> Path:
        """Copies of the source that jobs run, each under its hash."""
        return self.path / "code"

    @property
    def data(self) -> Path:
        """Prepared data, unless ``data.directory`` names another directory."""
        return self.path / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the pretrained model that the run began with."""
        return self.path / "tokenizer"

    # --- checkpoints; ``training.manifest`` says what is in a checkpoint

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def newest_pointer_path(self) -> Path:
        """A file with the name of the checkpoint that was written last."""
        return self.checkpoints / "latest"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` steps."""
        return self.checkpoints / f"{_STEP}{step:08d}"

    def partial_checkpoint(self, step: int) -> Path:
        """The same checkpoint while it is being written."""
        return self.checkpoints / f".{self.checkpoint(step).name}.partial"

    @staticmethod
    def removed_checkpoint(checkpoint: Path) -> Path:
        """The name of a checkpoint whose files are being removed."""
        return checkpoint.with_name(f".{checkpoint.name}{_REMOVED}")

    @staticmethod
    def damaged_checkpoint(checkpoint: Path) -> Path:
        """The name of a damaged checkpoint that is no longer counted."""
        return checkpoint.with_name(f"{checkpoint.name}.damaged")

    @staticmethod
    def manifest_path(checkpoint: Path) -> Path:
        """The manifest of a checkpoint, which is written last."""
        return checkpoint / "manifest.json"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """The step in the name of a checkpoint."""
        match = _CHECKPOINT.fullmatch(checkpoint.name)
        if match is None:
            raise ValueError(f"{checkpoint} does not have the name of a checkpoint")
        return int(match[1])

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints that have a manifest, oldest first; their files are not verified."""
        if not self.checkpoints.is_dir():
            return []
        checkpoints = [
            path
            for path in self.checkpoints.iterdir()
            if _CHECKPOINT.fullmatch(path.name) and self.manifest_path(path).is_file()
        ]
        return sorted(checkpoints, key=self.step_of)

    def removed_checkpoints(self) -> list[Path]:
        """Checkpoints whose removal has begun."""
        return sorted(self.checkpoints.glob(f".{_STEP}*{_REMOVED}"))

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, not verified; None if none exists."""
        checkpoints = self.complete_checkpoints()
        return checkpoints[-1] if checkpoints else None

    # --- records of the training

    @property
    def metrics_path(self) -> Path:
        """A record for each logged step and each held-out evaluation."""
        return self.path / "metrics.jsonl"

    def metrics(self) -> list[dict[str, Any]]:
        """All records."""
        return read_json_lines(self.metrics_path)

    @property
    def wandb(self) -> Path:
        """Runs of Weights & Biases, one directory for each job."""
        return self.path / "wandb"

    def heartbeat_path(self, rank: int) -> Path:
        """Where a rank is and how far it has come."""
        return self.path / "heartbeats" / f"{_rank(rank)}.json"

    def heartbeats(self) -> list[dict[str, Any]]:
        """The last heartbeat of every rank, by rank."""
        beats = map(read_json, _of_ranks(self.heartbeat_path(0)).values())
        return [beat for beat in beats if beat]

    def stack_path(self, rank: int) -> Path:
        """Stacks of a rank that hung."""
        return self.path / "stacks" / f"{_rank(rank)}.txt"

    def stacks(self) -> dict[int, Path]:
        """Ranks that hung in the newest job -> file of their stacks."""
        stacks = {}
        for rank, path in _of_ranks(self.stack_path(0)).items():
            with contextlib.suppress(FileNotFoundError):  # a rank that ends removes its empty file
                if path.stat().st_size:
                    stacks[rank] = path
        return stacks

    def sample_log_path(self, rank: int) -> Path:
        """Numbers of the samples that a rank has trained on, with ``train.log_samples``."""
        return self.path / "samples" / f"{_rank(rank)}.jsonl"

    def sample_logs(self) -> list[dict[str, Any]]:
        """Records of all ranks, in the order of time."""
        records = [record for path in _of_ranks(self.sample_log_path(0)).values() for record in read_json_lines(path)]
        return sorted(records, key=lambda record: record["time"])

    def profile_path(self, rank: int, first: int, last: int) -> Path:
        """Chrome trace of a rank of the steps of ``train.profile``."""
        return self.path / "profiles" / f"steps-{first}-{last}-{_rank(rank)}.json.gz"

    @property
    def left_out_path(self) -> Path:
        """Damaged shards that are left out."""
        return self.path / "left_out.json"

    def damaged_shards(self) -> dict[str, list[str]]:
        """Directory of a data set -> names of its shards that are left out."""
        if not self.left_out_path.exists():
            return {}
        damaged = read_json(self.left_out_path)
        if damaged is None:  # reading the shards again would change the order of the samples
            raise UserError(f"{self.left_out_path} is damaged: restore it, or remove it to find damaged shards again")
        return damaged

    @property
    def attention_path(self) -> Path:
        """Seconds of every attention kernel, and the kernel that the run uses."""
        return self.path / "attention.json"

    # --- jobs

    @property
    def jobs_path(self) -> Path:
        """Jobs that were submitted."""
        return self.path / "jobs.json"

    @property
    def jobs(self) -> Path:
        """Directory of the jobs."""
        return self.path / "jobs"

    def job(self, step: str, job: str) -> Path:
        """Directory of a job of a step: its logs, its results and submitit's files."""
        return self.jobs / step / job

    def rendezvous_path(self, token: str) -> Path:
        """The file by which the processes of a local job find each other. ``token``: unique word of the submission."""
        return self.jobs / f"rendezvous-{token}"

    def rendezvous_paths(self) -> list[Path]:
        """Rendezvous files of all local jobs."""
        return sorted(self.jobs.glob(self.rendezvous_path("*").name))

    def process_path(self, rank: int) -> Path:
        """The lock file that a process of a local job holds while it lives."""
        return self.path / "processes" / f"{_rank(rank)}.pid"

    def processes(self) -> list[Holder]:
        """Living processes of local jobs."""
        holders = map(holder, _of_ranks(self.process_path(0)).values())
        return [process for process in holders if process]

    def log_path(self, step: str, job: str, rank: int, stream: str = "out") -> Path:
        """What a process of a job prints; ``stream``: ``out`` or ``err``."""
        return self.job(step, job) / f"{job}_{rank}_log.{stream}"

    def log_paths(self, step: str, rank: int, stream: str = "out") -> list[Path]:
        """What a rank has printed in all jobs of a step."""
        jobs = (path.parent for path in (self.jobs / step).glob("*/*"))
        paths = {self.log_path(step, job.name, rank, stream) for job in jobs}
        return sorted(path for path in paths if path.is_file())

    def result_paths(self, step: str, job: str, rank: int | None = None) -> list[Path]:
        """Results of the processes of a job that have ended; ``rank``: of one process."""
        process = "*" if rank is None else f"{job}_{rank}"
        return sorted(self.job(step, job).glob(f"{process}_result.pkl"))

    @staticmethod
    def error_path(job: Path) -> Path:
        """What the first process that failed says, in the directory of its job."""
        return job / "error.json"

    def error(self, step: str, job: str) -> dict[str, Any] | None:
        """What the first process of a job that failed has written; None when no process has."""
        return read_json(self.error_path(self.job(step, job)))

    @property
    def restarts_path(self) -> Path:
        """Every death of a job, and what was decided."""
        return self.path / "restarts.jsonl"

    def restarts(self) -> list[dict[str, Any]]:
        """All decisions about jobs that died, oldest first."""
        return read_json_lines(self.restarts_path)

    # --- results

    @property
    def export(self) -> Path:
        """The standalone model directory."""
        return self.path / "export"

    @property
    def summary_path(self) -> Path:
        """Figures of the finished run."""
        return self.path / "summary.json"

    @property
    def samples_page_path(self) -> Path:
        """Texts that the model wrote."""
        return self.path / "samples.md"

    @property
    def loss_plot_path(self) -> Path:
        """Training and held-out loss."""
        return self.path / "loss.png"

    def summary(self) -> dict[str, Any] | None:
        """Figures of the finished run; None when there is no report."""
        return read_json(self.summary_path)


def _rank(rank: int) -> str:
    return f"rank-{rank:05d}"


def _of_ranks(path: Path) -> dict[int, Path]:
    """Rank -> file of that rank, beside the file ``path`` of any rank and with its suffix."""
    found = ((_RANK.fullmatch(file.stem), file) for file in sorted(path.parent.glob(f"*{path.suffix}")))
    return {int(match[1]): file for match, file in found if match}
