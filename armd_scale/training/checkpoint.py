"""Checkpoints: float32 master weights, moments and moving average of every parameter, free of the layout.

- ``save``: all ranks write their parts with torch.distributed.checkpoint into a temporary folder, which gets its
  manifest and then its name;
- ``load``: reads one under any layout;
- ``read_weights``: whole float32 weights without any process group, one tensor at a time, for export.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from armd_scale.errors import UserError
from armd_scale.parallel.engine import MASTER, Engine
from armd_scale.parallel.optimizer import EMA
from armd_scale.parallel.sharding import local_shape, partition_dim
from armd_scale.training import manifest


def save(engine: Engine, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint after ``step`` updates; ``state``: facts to keep beside it. Collective."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    mesh = _mesh(engine)
    engine.link_states()
    tensors = {
        _key(name, parameter): _distributed(engine.read_state(param, name), param, mesh)
        for parameter, param in engine.named_parameters()
        if not getattr(param, "ds_pipe_replicated", False)  # the head's copy of the embedding
        for name in engine.state_names
    }
    dcp.save(tensors, checkpoint_id=partial)
    if dist.get_rank() == 0:
        manifest.write(partial, {"step": step, "states": engine.state_names, "state": state})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in manifest.complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Set the engine to a checkpoint; returns its manifest. Collective: rank 0 verifies for all."""
    verdict: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            verdict = [manifest.verify(checkpoint)]
        except UserError as error:
            verdict = [error]
    dist.broadcast_object_list(verdict)
    if isinstance(verdict[0], UserError):
        raise verdict[0]
    facts = verdict[0]
    missing = set(engine.state_names) - set(facts["states"])
    if missing:
        raise UserError(
            f"checkpoint {checkpoint} does not hold {', '.join(sorted(missing))}: it was made with optimizer.ema = 0; "
            "set it to 0 or start anew"
        )
    mesh = _mesh(engine)

    def read(param: nn.Parameter, parameter: str, name: str) -> Tensor:
        # One tensor at a time: the whole state of a large model fits no rank.
        empty = torch.empty(local_shape(param), dtype=torch.float32, device=engine.device)
        target = {_key(name, parameter): _distributed(empty, param, mesh)}
        dcp.load(target, checkpoint_id=checkpoint)
        return target[_key(name, parameter)].to_local()

    engine.write_state(read, facts["step"])
    return facts


def read_weights(checkpoint: Path, averaged: bool) -> Iterator[tuple[str, Tensor]]:
    """(parameter, whole float32 tensor) of a checkpoint; ``averaged``: the moving average where it is kept."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    source = EMA if averaged and any(key.startswith(f"{EMA}/") for key in entries) else MASTER
    for key, entry in sorted(entries.items()):
        state, _, parameter = key.partition("/")
        if state == source and isinstance(entry, TensorStorageMetadata):
            target = {key: torch.empty(entry.size, dtype=torch.float32)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that there is no process group; that is the intent
                dcp.load(target, checkpoint_id=checkpoint, no_dist=True)
            yield parameter, target[key]


def _key(state: str, parameter: str) -> str:
    return f"{state}/{parameter}"


def _mesh(engine: Engine) -> DeviceMesh:
    return DeviceMesh.from_group(parallel_state.get_tensor_model_parallel_group(), engine.device.type)


def _distributed(local: Tensor, param: nn.Parameter, mesh: DeviceMesh) -> DTensor:
    """A tensor-parallel part as a view of the whole; the checkpoint then knows global shapes only."""
    dim = partition_dim(param)
    placement = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(local.contiguous(), mesh, [placement], run_check=False)
