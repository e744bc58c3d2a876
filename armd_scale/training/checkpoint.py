"""Checkpoints: float32 master weights, moments and moving average of every parameter, independent of the layout.

- ``Checkpointer.save``: all ranks write their parts with torch.distributed.checkpoint into a temporary directory, which
  is then given its manifest and renamed;
- ``begin``: writes checkpoint 0 of a run from the weights of a model;
- ``load``: loads a checkpoint under any layout;
- ``Weights``: reads float32 weights tensor by tensor, without process groups, for export.
"""

import concurrent.futures
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from armd_scale.config import TrainConfig
from armd_scale.errors import UserError
from armd_scale.logs import CHECKPOINT as log
from armd_scale.parallel.engine import Engine
from armd_scale.parallel.groups import replicas, shards
from armd_scale.parallel.optimizer import EMA, MASTER, MOMENTS
from armd_scale.parallel.sharding import is_pipeline_copy, local_part, partition_dim
from armd_scale.parallel.zero import local_shape
from armd_scale.run_directory import RunDirectory
from armd_scale.training import manifest


class Checkpointer:
    """Writes checkpoints in a thread beside the training, at most one checkpoint at a time."""

    def __init__(self, engine: Engine, run: RunDirectory, train: TrainConfig) -> None:
        self.engine, self.run, self._train = engine, run, train
        self._mesh = _mesh(engine)
        # A separate group keeps the messages of the writer apart from those of the training.
        self._group = dist.new_group(backend="gloo")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None

    def save(self, step: int, updates: int, state: dict[str, Any]) -> None:
        """Copy the state after ``step`` steps, ``updates`` of them applied, and write it in a thread. Collective.

        ``state``: facts that the manifest keeps. Blocks until the previous checkpoint is written and the copies exist.
        """
        self.wait()
        tensors = self._copies()
        facts = {"step": step, "updates": updates, "states": self.engine.state_names, "state": state}
        self._pending = step, self._thread.submit(self._write, facts, tensors)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. A failed write is logged; training continues."""
        if self._pending is None:
            return
        step, written = self._pending
        self._pending = None
        try:
            written.result()
        except (OSError, dcp.api.CheckpointException) as error:
            if dist.get_rank() == 0:
                reason = " ".join(str(error).split())[:500]
                log.warning("checkpoint of step %d not written, training continues: %s", step, reason)

    def close(self) -> None:
        """Wait for the last checkpoint, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _copies(self) -> dict[str, DTensor]:
        """Copy the tensors that this rank writes to host memory.

        The replicas gather the tensors in turn, and each tensor is kept by one rank. A rank holds its share
        of the checkpoint and at most one tensor more.
        """
        engine = self.engine
        engine.link_states()
        group, tensors = replicas(), {}
        entries = [
            (parameter, param, name)
            for parameter, param in engine.named_parameters()
            if not is_pipeline_copy(param)
            for name in engine.state_names
        ]
        for number, (parameter, param, name) in enumerate(entries):
            value = engine.read_state(param, name)
            if number % group.size() == group.rank():
                copy = value.detach().to("cpu", copy=True)
                tensors[_key(name, parameter)] = _distributed(copy, param, self._mesh)
        return tensors

    def _write(self, facts: dict[str, Any], tensors: dict[str, DTensor]) -> None:
        partial = self.run.partial_checkpoint(facts["step"])

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def end() -> None:
            manifest.write(partial, facts)
            manifest.publish(self.run, facts["step"])
            keep = self._train.keep_checkpoints, self._train.keep_every
            manifest.retain(self.run, *keep, first=self._train.distill > 0)

        self._on_rank_0(begin)
        dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
        self._on_rank_0(end)

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Call ``work`` on rank 0, and raise its ``OSError`` on all ranks: the others would wait for rank 0."""
        outcome: list[OSError | None] = [None]
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise outcome[0]


def begin(
    run: RunDirectory,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    state: dict[str, Any],
    averaged: bool,
) -> Path:
    """Write checkpoint 0 from whole weights, in this process, with zero moments; holds one tensor at a time.

    ``shapes``: of the weights by their names; ``read``: a weight by its name, whose missing rows are zeros. ``state``:
    facts that the manifest keeps. ``averaged``: also write a moving average, equal to the weights. Nothing stays if
    ``read`` raises an error.
    """
    names = (MASTER, *MOMENTS, *((EMA,) if averaged else ()))
    entries = {
        _key(name, parameter): torch.empty(shape, device="meta")
        for parameter, shape in shapes.items()
        for name in names
    }
    partial = run.partial_checkpoint(0)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that no process group exists, which is intended
            dcp.save(entries, checkpoint_id=partial, planner=_Reader(read), no_dist=True)
        manifest.write(partial, {"step": 0, "updates": 0, "states": names, "state": state})
        return manifest.publish(run, 0)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, dcp.api.CheckpointException):
            raise _reason(next(iter(error.failures.values()))[0]) from error
        raise


def _reason(error: BaseException) -> BaseException:
    """What made a write fail."""
    if "unexpected pos" in str(error):  # PyTorch's words for a file that could not grow
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


class _Reader(dcp.DefaultSavePlanner):
    """Reads a tensor when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._weight = read
        self._last = torch.empty(0)

    def resolve_data(self, write_item: Any) -> Any:
        entry = super().resolve_data(write_item)
        if not isinstance(entry, Tensor):
            return entry
        self._last.untyped_storage().resize_(0)  # the writer refers to all tensors until its end
        self._last = torch.zeros(entry.shape)
        state, _, parameter = write_item.index.fqn.partition("/")
        if state in MOMENTS:
            return self._last
        weight = self._weight(parameter)
        self._last[: len(weight)] = weight
        return self._last


def newest(run: RunDirectory) -> Path | None:
    """The newest undamaged checkpoint, the same on all ranks; damaged checkpoints are logged and skipped. Collective.

    Raises ``UserError`` if checkpoints exist and all are damaged.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [manifest.newest_good(run)]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def load(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint, which ``newest`` has verified, into the engine; returns its manifest. Collective.

    A moving average that the checkpoint does not hold starts from its weights.
    """
    facts = manifest.read(checkpoint)
    facts.setdefault("updates", facts["step"])
    averaged = EMA in facts["states"]
    if EMA in engine.state_names and not averaged:
        log.info("the moving average starts from the weights of step %d: optimizer.ema was 0 before", facts["step"])
    mesh = _mesh(engine)

    def read(param: nn.Parameter, parameter: str, name: str) -> Tensor:
        # Tensor by tensor, as no rank can hold the whole state of a large model, and without collectives, as the ranks
        # of different pipeline stages read different tensors.
        empty = torch.empty(local_shape(param), dtype=torch.float32, device=engine.device)
        key = _key(MASTER if name == EMA and not averaged else name, parameter)
        target = {key: _distributed(empty, param, mesh)}
        _read(target, checkpoint)
        return target[key].to_local()

    engine.write_state(read, facts["updates"])
    return facts


@torch.no_grad()
def load_teacher(engine: Engine, run: RunDirectory) -> None:
    """Set the teacher's weights to those of checkpoint 0, the imported model.

    Raises ``UserError`` on all ranks if the run did not begin with an imported model or no longer has it.
    """
    source = run.checkpoint(0)
    if not run.origin() or not run.manifest_path(source).is_file():
        raise UserError(
            f"train.distill needs the imported model, but {run.path} has no checkpoint 0 of one: begin the run with "
            "armd import, or set train.distill=0"
        )
    if engine.teacher:
        weights = Weights(source, averaged=False)
        for name, param in engine.teacher.named_parameters():
            param.copy_(local_part(weights.read(name), param))


class Weights:
    """Reads the float32 weights of a checkpoint tensor by tensor, without process groups.

    ``averaged``: read the moving average if the checkpoint holds it, else the master weights.
    """

    def __init__(self, checkpoint: Path, averaged: bool) -> None:
        self._checkpoint = checkpoint
        entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        self._state = EMA if averaged and any(key.startswith(f"{EMA}/") for key in entries) else MASTER
        self.shapes: dict[str, tuple[int, ...]] = {
            key.partition("/")[2]: tuple(entry.size)
            for key, entry in sorted(entries.items())
            if key.startswith(f"{self._state}/") and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, parameter: str) -> Tensor:
        """The weight with this global name."""
        key = _key(self._state, parameter)
        target = {key: torch.empty(self.shapes[parameter], dtype=torch.float32)}
        _read(target, self._checkpoint)
        return target[key]


def _read(target: dict[str, Any], checkpoint: Path) -> None:
    """Fill the tensors of ``target``, without other processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns that no process group exists, which is intended
        try:
            dcp.load(target, checkpoint_id=checkpoint, no_dist=True)
        except dcp.api.CheckpointException as error:  # no Exception, so a job would end without a word
            raise OSError(f"{checkpoint} cannot be read: {' '.join(str(error).split())[:500]}") from error


def _key(state: str, parameter: str) -> str:
    return f"{state}/{parameter}"


def _mesh(engine: Engine) -> DeviceMesh:
    return DeviceMesh.from_group(shards(), engine.device.type)


def _distributed(local: Tensor, param: nn.Parameter, mesh: DeviceMesh) -> DTensor:
    """A tensor-parallel part as a DTensor, so that the checkpoint stores global shapes."""
    dim = partition_dim(param)
    placement = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(local.contiguous(), mesh, [placement], run_check=False)
