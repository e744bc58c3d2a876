"""Manifests of checkpoints. A checkpoint is a directory whose files match the sizes and SHA-256 of its manifest.

The manifest also holds the step and the names of the tensors kept for every parameter. The manifest is written last,
and the directory is then given its final name. This module needs neither torch nor other ranks.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from armd_scale.config import FORMER_PREFIX, RunConfig, identity
from armd_scale.errors import UserError
from armd_scale.files import in_use, is_in_use, sha256, write_atomically
from armd_scale.logs import CHECKPOINT as log
from armd_scale.run_directory import RunDirectory


def write(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Hash the files of a checkpoint and write its manifest."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    with RunDirectory.manifest_path(checkpoint).open("w", encoding="utf-8") as file:
        json.dump({**facts, "files": {path.name: _facts(path) for path in files}}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(run: RunDirectory, step: int) -> Path:
    """Give the checkpoint of a step its final name, and point to it as the newest; returns its path."""
    partial, final = run.partial_checkpoint(step), run.checkpoint(step)
    removed = _remove_from_list(final) if final.exists() else None  # written again after a resume
    os.replace(partial, final)
    write_atomically(run.newest_pointer_path, final.name + "\n")
    directory = os.open(run.checkpoints, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    if removed:
        shutil.rmtree(removed)
    return final


def _remove_from_list(checkpoint: Path) -> Path:
    """Rename a checkpoint so that it is no longer listed; its files can then be removed at any time."""
    removed = RunDirectory.removed_checkpoint(checkpoint)
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(checkpoint, removed)
    return removed


def retain(run: RunDirectory, last: int, every: int | None, first: bool = False) -> None:
    """Remove all but the ``last`` newest checkpoints, those whose step is a multiple of ``every``, and with ``first``
    checkpoint 0.

    A checkpoint that another process reads (``held``) is removed later.

    Checkpoints newer than the last written checkpoint are damaged and were skipped at the resume: they are renamed and
    do not count. A checkpoint is renamed before its files are removed, so a crash in between leaves no damaged
    checkpoint.
    """
    good = run.step_of(Path(run.newest_pointer_path.read_text(encoding="utf-8").strip()))
    for checkpoint in run.complete_checkpoints():
        if run.step_of(checkpoint) > good:
            damaged = run.damaged_checkpoint(checkpoint)
            shutil.rmtree(damaged, ignore_errors=True)
            os.replace(checkpoint, damaged)
    for old in run.complete_checkpoints()[:-last]:
        step = run.step_of(old)
        kept = (every and step % every == 0) or (first and step == 0)
        if not kept and not is_in_use(run.manifest_path(old)):
            _remove_from_list(old)
    for removed in run.removed_checkpoints():
        shutil.rmtree(removed)


@contextlib.contextmanager
def held(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint while this process reads it: ``retain`` removes it later.

    ``UserError`` if it is removed nevertheless: by hand, by a run that writes it again, or without locks on its disk.
    """
    path = RunDirectory.manifest_path(checkpoint)
    try:
        with in_use(path):
            yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # CheckpointException of torch.distributed is no Exception
        if path.exists():
            raise
        raise UserError(
            f"checkpoint {checkpoint} was removed while it was read: run the same command again for the newest"
        ) from error


def newest_good(run: RunDirectory) -> Path | None:
    """The newest checkpoint that matches its manifest; None if no checkpoint exists.

    Damaged checkpoints are logged and skipped; ``UserError`` if all are damaged.
    """
    checkpoints = run.complete_checkpoints()
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
        except UserError as error:
            log.warning("skipped: %s", error)
        else:
            return checkpoint
    if checkpoints:
        raise UserError(
            f"all {len(checkpoints)} checkpoints in {run.checkpoints} are damaged: restore a checkpoint, or remove "
            "them to train from the beginning"
        )
    return None


def read(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    path = RunDirectory.manifest_path(checkpoint)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(manifest["files"], dict)
        assert all(facts.keys() >= {"size", "sha256"} for facts in manifest["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(
            f"checkpoint {checkpoint} has no readable {path.name} ({error}): use the previous checkpoint"
        ) from error
    return manifest


def readable(run: RunDirectory) -> Path | None:
    """The newest checkpoint with a readable manifest, without verifying its files; None if none exists."""
    for checkpoint in reversed(run.complete_checkpoints()):
        try:
            read(checkpoint)
        except UserError:
            continue
        return checkpoint
    return None


def check_identity(checkpoint: Path, config: RunConfig) -> None:
    """``UserError`` if a checkpoint belongs to a run with another model, data, seed or batch than ``config``."""
    before, now = read(checkpoint).get("state", {}).get("identity", {}), identity(config)
    defaults = identity(RunConfig())
    # Fields newer than the checkpoint have their defaults, or the values that kept its model as it was.
    defaults["model"]["prefix"] |= FORMER_PREFIX
    before = _filled({name: defaults[name] for name in ("objective", "train.fp8", "model", "data")}, before)
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise UserError(
            f"{config.directory} holds a run with another '{differing[0]}' (checkpoint {checkpoint.name}): "
            "choose another run_dir or remove the directory"
        )


def _filled(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``defaults`` updated by ``values``, and the mappings in them likewise."""
    inner = {name: _filled(defaults[name], value) for name, value in values.items() if isinstance(value, dict)}
    return {**defaults, **values, **inner}


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file against the manifest, and return the manifest; ``UserError`` names the damaged file."""
    manifest = read(checkpoint)
    with held(checkpoint):
        _verify_files(checkpoint, manifest)
    return manifest


def _verify_files(checkpoint: Path, manifest: dict[str, Any]) -> None:
    cure = "use the previous checkpoint"
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
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} has another SHA-256; {cure}")


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}
