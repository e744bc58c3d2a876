"""Opens the model to be scored, a model directory or a training checkpoint, in this process or in several."""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeAlias

import torch

from armd_scale import inference
from armd_scale.config import load_run
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import fill_vocabulary
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.inference import ARMD
from armd_scale.inference.model import check_device
from armd_scale.run_directory import RunDirectory


def resolve(path: Path) -> Path:
    """The newest checkpoint of a run directory; any other path unchanged. Raises ``UserError``."""
    if (path / "config.json").is_file() or not RunDirectory(path).exists():
        return path
    from armd_scale.training import export

    return export.newest_checkpoint(fill_vocabulary(load_run(RunDirectory(path))))


def open_model(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[ARMD, Tokenizer]:
    """Model and tokenizer of a model directory, a checkpoint, or a run directory (its newest checkpoint).

    Uses the moving average of the weights if the checkpoint holds it. The tokenizer encodes by its library alone.
    Raises ``UserError``.
    """
    if (path / "config.json").is_file() or not path.is_dir():
        model = inference.load(path, device, dtype)
        return model, tokenizers.load(path, model.config.vocab_size, segments=False)
    from armd_scale.training import export, manifest

    target = check_device(device)
    source = resolve(path)
    run = RunDirectory.around(source)
    if run is None:
        raise UserError(f"{path} holds no model: name a model directory, a run directory or one of its checkpoints")
    manifest.verify(source)
    model, tokenizer = export.in_memory(fill_vocabulary(load_run(run)), source)
    return model.to(target, dtype), tokenizers.load(tokenizer.path, segments=False)


Mapper: TypeAlias = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
"""Calls ``function(model, *job)`` for each job, and returns the results in the order of the jobs."""


def alone(model: ARMD) -> Mapper:
    """A mapper that runs the jobs in this process."""
    return lambda function, jobs: [function(model, *job) for job in jobs]


@contextlib.contextmanager
def workers(path: Path, device: str, processes: int) -> Iterator[Mapper]:
    """Start ``processes`` processes that each load the model of ``path`` and share the jobs.

    A CPU process has one thread, so results do not depend on the number of processes. With ``cuda``, the processes use
    the GPUs in turn.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(processes, context, _start, (path, device, numbers)) as pool:
        try:
            yield lambda function, jobs: list(pool.map(_work, itertools.repeat(function), jobs))
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {processes} processes died, most likely out of memory: lower --processes"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_MODEL: list[ARMD] = []
"""The model of a worker process."""


def _start(path: Path, device: str, numbers: Any) -> None:
    torch.set_num_threads(1)
    if device == "cuda" and torch.cuda.device_count():
        with numbers.get_lock():
            device = f"cuda:{numbers.value % torch.cuda.device_count()}"
            numbers.value += 1
    _MODEL[:] = [open_model(path, device)[0]]


def _work(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(_MODEL[0], *job)
