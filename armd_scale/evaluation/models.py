"""The model to be scored, wherever it is: a standalone folder or a training checkpoint of any layout, in this process
or in several.
"""

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
    """A model folder or a checkpoint as it is; of a run folder the newest checkpoint. Raises ``UserError``."""
    if (path / "config.json").is_file() or not RunDirectory(path).exists():
        return path
    from armd_scale.training import export

    return export.newest_checkpoint(fill_vocabulary(load_run(RunDirectory(path))))


def open_model(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[ARMD, Tokenizer]:
    """The model and tokenizer of a standalone folder, a run folder (its newest checkpoint), or a checkpoint in one.

    Of a checkpoint the moving average of the weights is taken, where it holds one. Raises ``UserError``.
    """
    if (path / "config.json").is_file() or not path.is_dir():
        model = inference.load(path, device, dtype)
        return model, tokenizers.load(path, model.config.vocab_size)
    from armd_scale.training import export, manifest

    place = check_device(device)
    source = resolve(path)
    run = RunDirectory.around(source)
    if run is None:
        raise UserError(f"{path} holds no model: name a model folder, a run folder or one of its checkpoints")
    manifest.verify(source)
    model, tokenizer = export.in_memory(fill_vocabulary(load_run(run)), source)
    return model.to(place, dtype), tokenizer


Mapper: TypeAlias = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
"""Calls ``function(model, *job)`` for every job, and returns the results in the order of the jobs."""


def alone(model: ARMD) -> Mapper:
    """A model in this process."""
    return lambda function, jobs: [function(model, *job) for job in jobs]


@contextlib.contextmanager
def workers(path: Path, device: str, processes: int) -> Iterator[Mapper]:
    """``processes`` processes, each with the model of ``path``, that share the jobs.

    On a CPU each has one thread: what comes out may depend on the threads of a process, and on nothing else. On
    ``cuda`` each takes the next GPU.
    """
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(processes, context, _start, (path, device, numbers)) as pool:
        try:
            yield lambda function, jobs: list(pool.map(_work, itertools.repeat(function), jobs))
        except BrokenProcessPool as error:
            why = "too little memory for so many copies of the model, most likely: lower --processes"
            raise UserError(f"one of {processes} processes ended ({why})") from error
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
