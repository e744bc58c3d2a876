"""Opens the model to be scored, in this process or in several: a model directory, a training checkpoint, or a directory
of transformers.
"""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from armd_scale import inference
from armd_scale.config_files import load_run
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.shards import fill_vocabulary
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.inference import ARMD, FREE
from armd_scale.inference.model import check_device
from armd_scale.objectives.interface import Inference
from armd_scale.processes import die_with_parent
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


class CausalTransformer:
    """A causal language model of transformers, scored as ``ARMD`` models are: left to right, BOS before every text."""

    def __init__(self, path: Path, device: str, tokenizer: Tokenizer) -> None:
        self.model = load_transformer(path, device)
        self.config = _Shape(objective="ar", length=positions(self.model) - 1)
        self._bos_id = tokenizer.bos_id
        tokenizers.check_size(tokenizer, self.model.get_input_embeddings().num_embeddings)
        short = torch.tensor([[0, 1]])
        seen = self.logits(torch.cat([short, short], dim=1))[:, :2] - self.logits(short)
        if float(seen.abs().max()) > 1e-3:
            raise UserError(f"{path} is not a causal language model: a token changes what is predicted before it")

    @property
    def objective(self) -> Inference:
        return Inference.known[self.config.objective]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits that predict every token, [B, N, V], float32; ``tokens`` [B, N]."""
        before = torch.cat([torch.full_like(tokens[:, :1], self._bos_id), tokens[:, :-1]], dim=1)
        return self.model(before.to(self.model.device)).logits.float().cpu()

    def nll(self, tokens: Tensor, order: Tensor | None = None, block_ids: Tensor | None = None) -> Tensor:
        """-log p of every token, [B, N], in nats. Raises ``UserError`` for other orders than left to right."""
        for given in (order, block_ids):
            if given is not None and not bool((given == torch.arange(1, tokens.shape[1] + 1)).all()):
                raise UserError("a model of transformers is scored left to right: leave out --order")
        return torch.stack(
            [F.cross_entropy(*pair, reduction="none") for pair in zip(self.logits(tokens), tokens, strict=True)]
        )

    def bound(self, tokens: Tensor, draws: int = 1, seed: int | Sequence[int] = 0) -> Tensor:
        raise UserError("a model of transformers has an exact likelihood: leave out --order")

    def plan(self, texts: Sequence[Sequence[int]], *_: Any) -> list[Tensor]:
        return [torch.tensor(text) for text in texts]

    def complete(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """The texts with their free places filled in greedily, left to right."""
        for text in texts:
            for place in (text == FREE).nonzero().flatten().tolist():
                text[place] = self.logits(text[None, : place + 1].clamp_min(0))[0, -1].argmax()
        return list(texts)


class _Shape(NamedTuple):
    objective: str
    length: int


Scored: TypeAlias = ARMD | CausalTransformer
"""A model whose likelihoods are measured."""


def load_transformer(path: Path, device: str = "cpu") -> Any:
    """A causal language model of transformers from a local directory. Raises ``UserError``."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"{path} needs transformers: pip install -c constraints.txt -e '.[eval]'") from error
    try:
        model, found = AutoModelForCausalLM.from_pretrained(str(path), output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not a causal language model: {reason}") from error
    absent = sorted(found["missing_keys"]) or sorted(str(key) for key in found["mismatched_keys"])
    if absent:
        raise UserError(f"{path} lacks weights that fit config.json, such as {absent[0]}: download the model again")
    return model.float().eval().to(check_device(device))


def positions(model: Any) -> int:
    """Positions of a model of transformers."""
    return getattr(model.config, "max_position_embeddings", 2048)


def is_foreign(path: Path) -> bool:
    """Whether a path is a directory of transformers that holds no model of this project."""
    return (path / "config.json").is_file() and not (path / "modeling_armd.py").is_file()


def open_scored(path: Path, device: str = "cpu") -> tuple[Scored, Tokenizer]:
    """``open_model``, and models of transformers. Raises ``UserError``."""
    if not is_foreign(path):
        return open_model(path, device)
    tokenizer = tokenizers.load(path, segments=False)
    return CausalTransformer(path, device, tokenizer), tokenizer


Mapper: TypeAlias = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
"""Calls ``function(model, *job)`` for each job, and returns the results in the order of the jobs."""


def alone(model: Scored) -> Mapper:
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


_MODEL: list[Scored] = []
"""The model of a worker process."""


def _start(path: Path, device: str, numbers: Any) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    if device == "cuda" and torch.cuda.device_count():
        with numbers.get_lock():
            device = f"cuda:{numbers.value % torch.cuda.device_count()}"
            numbers.value += 1
    _MODEL[:] = [open_scored(path, device)[0]]


def _work(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(_MODEL[0], *job)
