"""Telemetry of a run: ``metrics.jsonl``, Weights & Biases, and the software environment."""

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from armd_scale.config import RunConfig
from armd_scale.files import ends_torn, parse_json_lines, write_atomically
from armd_scale.logs import ONCE
from armd_scale.logs import TRAIN as log
from armd_scale.run_directory import RunDirectory

_PACKAGES = (
    "torch",
    "megatron-core",
    "deepspeed",
    "webdataset",
    "sentencepiece",
    "numpy",
    "pyarrow",
    "wandb",
    "submitit",
)


def git(*command: str) -> str | None:
    """Output of a git command in the source tree; None without git or outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages, and the state of the source tree."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": git("status", "--porcelain"),
    }


class MetricsReader:
    """Reads new records of the metrics of a run, without reading the whole file again."""

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.metrics_path
        self._file, self._at = 0, 0
        self.records: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Records since the last call."""
        before: list[dict[str, Any]] = []
        try:
            with self._path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                if number != self._file:  # replaced by a run that resumed from a checkpoint
                    before, self.records = self.records, []
                    self._file, self._at = number, 0
                file.seek(self._at)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._at += len(whole) + len(end)
        new = parse_json_lines(self._path, whole)
        self.records += new
        return [record for record in new if record not in before] if before else new


class Lines:
    """A file of JSON lines that survives a full disk: lines that cannot be written are written later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._waiting: deque[bytes] = deque([b"\n"] if ends_torn(self._file) else [], maxlen=_MOST_WAITING)
        self._good = self._file.seek(0, os.SEEK_END)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, or keep it in memory until it can be written."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        try:
            while self._waiting:
                if self._file.write(self._waiting[0]) < len(self._waiting[0]):
                    raise OSError(errno.ENOSPC, "only part of a line was written")
                self._good += len(self._waiting.popleft())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._good)  # drop the partial line
            log.warning("%s not written, training continues: %s", self._path, error, extra=ONCE)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_MOST_WAITING = 100_000


class Telemetry:
    """Writes the records of a run on rank 0; does nothing on other ranks."""

    def __init__(self, config: RunConfig, active: bool, first_step: int) -> None:
        self._wandb: Any = None
        self._file: Lines | None = None
        self._run = config.run_directory
        self._active = active
        if not active:
            return
        self.rewind(first_step)
        self._wandb = _start_wandb(config)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which must hold ``step``."""
        if self._file is None:
            return
        self._file.write(record)
        if self._wandb is not None:
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            try:
                self._wandb.log(numbers, step=record["step"])
            except Exception as error:
                self._wandb = None
                log.warning("wandb failed, training continues without it: %s", error)

    def rewind(self, step: int) -> None:
        """Drop the records after a step, which a run that resumes from this step writes again."""
        if not self._active:
            return
        if self._file is not None:
            self._file.close()
        kept = [record for record in self._run.metrics() if record["step"] <= step]
        write_atomically(self._run.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = Lines(self._run.metrics_path)

    def close(self) -> None:
        """Close the metrics and end the wandb run."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: RunConfig) -> Any:
    """A wandb run in the mode of ``report.wandb``; None if wandb is disabled or does not start."""
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    try:
        import wandb

        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        try:
            return _init(config, mode)
        except wandb.Error as error:
            if mode != "online":
                raise
            log.warning("wandb is not reachable, the run is recorded offline (wandb sync uploads it): %s", error)
            wandb.teardown()
            return _init(config, "offline")
    except Exception as error:
        log.warning("wandb is not available, training continues without it: %s", error)
        return None


def wandb_mode(config: RunConfig) -> str:
    """``report.wandb``, where ``auto`` is the mode of ``WANDB_MODE``."""
    if config.report.wandb != "auto":
        return config.report.wandb
    mode = os.environ.get("WANDB_MODE", "auto").lower()
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)  # older names


def _init(config: RunConfig, mode: Any) -> Any:
    """Start wandb; variables of wandb's such as ``WANDB_PROJECT`` count first, and every job of a run has its id."""
    import wandb

    wanted: dict[str, Any] = {"project": "armd_scale", "name": config.name, "id": _wandb_id(config.run_directory)}
    return wandb.init(
        **{name: value for name, value in wanted.items() if not os.environ.get(_WANDB_VARIABLES[name])},
        resume="allow",
        dir=str(config.directory),
        config=config.model_dump(),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", init_timeout=_WANDB_SECONDS),
    )


_WANDB_VARIABLES = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "id": "WANDB_RUN_ID"}
_WANDB_SECONDS = 30.0  # to reach the server


def _wandb_id(run: RunDirectory) -> str | None:
    """The id of the wandb run of earlier jobs; None for the first job."""
    ids = [re.fullmatch(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)", path.name) for path in run.wandb.glob("*run-*")]
    return max(((found[1], found[2]) for found in ids if found), default=("", None))[1]
