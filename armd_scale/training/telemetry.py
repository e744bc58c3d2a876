"""What a run says about itself: ``metrics.jsonl``, Weights & Biases, and the facts of its environment."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from armd_scale.config import RunConfig
from armd_scale.files import write_atomically

METRICS = "metrics.jsonl"
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


def environment() -> dict[str, Any]:
    """Versions of everything that a result depends on, and the state of the source tree."""
    root = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": git("status", "--porcelain"),
    }


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run; a last line that is still being written is left out."""
    path = run_dir / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Telemetry:
    """Writes the records of a run on rank 0; on other ranks it does nothing."""

    def __init__(self, config: RunConfig, active: bool, first_step: int) -> None:
        self._wandb = None
        self._file = None
        if not active:
            return
        path = config.directory / METRICS
        # A run that goes on from a checkpoint repeats the steps after it; keep one record of each.
        kept = [record for record in read_metrics(config.directory) if record["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        if config.report.wandb == "auto":
            self._wandb = _start_wandb(config)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold ``step``."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if not isinstance(v, str)}, step=record["step"])

    def close(self) -> None:
        """Finish the files."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(config: RunConfig) -> Any:
    """A wandb run: online when a key is set, else offline in the run folder. Training goes on without it."""
    try:
        import wandb

        return wandb.init(
            project="armd_scale",
            name=config.name,
            dir=str(config.directory),
            config=config.model_dump(),
            mode="online" if os.environ.get("WANDB_API_KEY") else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:
        print(f"wandb is not available, the run goes on without it: {error}", flush=True)
        return None
