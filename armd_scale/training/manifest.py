"""Which checkpoints of a run are good: a folder counts when its manifest is there, and is good when its files
agree with it.

The manifest holds the step, what is kept for every parameter, and the size and SHA-256 of each file. It is
written last, into a folder that gets its final name after that. Needs neither torch nor any other rank.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from armd_scale.errors import UserError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def write(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Close a checkpoint folder: hash its files and write the manifest."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    with (checkpoint / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": {path.name: _facts(path) for path in files}}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, None when there is none."""
    found = complete(folder)
    return found[-1] if found else None


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file against the manifest and return it; ``UserError`` names what is damaged."""
    cure = f"remove {checkpoint} to go on from the checkpoint before it"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint} has no readable {MANIFEST}: {error}; {cure}") from error
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} is missing; {cure}")
        size = path.stat().st_size
        if size != facts["size"]:
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {name} has {size} bytes instead of {facts['size']}; {cure}"
            )
        if _facts(path) != facts:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} does not have its SHA-256; {cure}")
    return manifest


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
