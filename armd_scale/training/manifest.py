"""Which checkpoints of a run are good: a folder counts when its manifest is there, and is good when its files
agree with it.

The manifest holds the step, what is kept for every parameter, and the size and SHA-256 of each file. It is
written last, into a folder that gets its final name after that. Needs neither torch nor any other rank.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from armd_scale.config import RunConfig, identity
from armd_scale.errors import UserError
from armd_scale.files import sha256

MANIFEST = "manifest.json"
POINTER = "latest"
_NAME = re.compile(r"step-(\d{8,})")


def write(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Close a checkpoint folder: hash its files and write the manifest."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    with (checkpoint / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": {path.name: _facts(path) for path in files}}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, final: Path) -> None:
    """Give a closed checkpoint folder its name, and point ``latest`` to it."""
    aside = _aside(final) if final.exists() else None  # written again after a resume
    os.replace(partial, final)
    pointer = final.parent / f".{POINTER}.partial"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    os.replace(pointer, final.parent / POINTER)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    if aside:
        shutil.rmtree(aside)


def _aside(checkpoint: Path) -> Path:
    """Take a checkpoint out of the list in one move; to be removed at leisure."""
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def retain(folder: Path, last: int, every: int | None) -> None:
    """Remove all but the ``last`` newest checkpoints and those whose step is a multiple of ``every``.

    Those newer than the one that ``latest`` names were passed over as damaged: they get another name and do not count.
    A folder loses its name first: a process that dies while it removes files leaves no damaged checkpoint behind.
    """
    good = step_of(folder / (folder / POINTER).read_text(encoding="utf-8").strip())
    for damaged in complete(folder):
        if step_of(damaged) > good:
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(damaged, aside)
    for old in complete(folder)[:-last]:
        if not every or step_of(old) % every:
            _aside(old)
    for removed in folder.glob(".step-*.removed"):
        shutil.rmtree(removed)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that agrees with its manifest, None when there is no checkpoint at all.

    Each damaged one is named on the way; ``UserError`` when all are.
    """
    found = complete(folder)
    for checkpoint in reversed(found):
        try:
            verify(checkpoint)
        except UserError as error:
            print(f"passed over: {error}", flush=True)
        else:
            return checkpoint
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {folder} are damaged: restore one, or remove them to start anew"
        )
    return None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, None when there is none."""
    found = complete(folder)
    return found[-1] if found else None


def read(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        assert isinstance(manifest["files"], dict)
        assert all(facts.keys() >= {"size", "sha256"} for facts in manifest["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"checkpoint {checkpoint} has no readable {MANIFEST} ({error}): use the checkpoint before it"
        ) from error
    return manifest


def readable(folder: Path) -> Path | None:
    """The newest complete checkpoint whose manifest can be read, not verified; None when there is none."""
    for checkpoint in reversed(complete(folder)):
        try:
            read(checkpoint)
        except UserError:
            continue
        return checkpoint
    return None


def check_identity(found: Path, config: RunConfig) -> None:
    """``UserError`` when a checkpoint was made with another model, data, seed or batch than ``config`` asks for."""
    before, now = read(found).get("state", {}).get("identity", {}), identity(config)
    defaults = identity(RunConfig())
    # A field that did not exist then has its default.
    before = {**{name: defaults[name] for name in ("objective", "train.fp8")}, **before}
    for name, values in before.items():
        if isinstance(values, dict):
            before[name] = {**defaults[name], **values}
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise UserError(
            f"{config.directory} holds a run with another '{differing[0]}' (checkpoint {found.name}): "
            "choose another run_dir or remove the folder"
        )


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file against the manifest and return it; ``UserError`` names what is damaged."""
    cure = "use the checkpoint before it"
    manifest = read(checkpoint)
    for name, facts in manifest["files"].items():
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
    return {"size": path.stat().st_size, "sha256": sha256(path)}
