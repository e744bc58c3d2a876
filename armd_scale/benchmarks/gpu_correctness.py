"""Is what this GPU computes right? Measurements that compare it with float64 and with the CPU.

- losses of every objective in every kind of order against the float64 standalone model;
- gradients and generated texts against those of the CPU;
- two processes on the one GPU, over gloo, against one process on the CPU;
- whether a training step makes the host wait for the device.
"""

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from armd_scale.benchmarks.process import run_in_process
from armd_scale.benchmarks.registry import Context, Figure, measurement

LOSS_LIMIT = {"float32": 2e-3, "bfloat16": 0.15}
"""Largest difference of a token's NLL to float64, in nats, with weights of unit scale."""
GRADIENT_LIMIT = {"float32": 2e-3, "bfloat16": 0.1}
"""Largest relative difference of the gradient of a weight to that of float32 on the CPU."""
LAYOUT_LIMIT = 2e-3
"""Largest difference of a step's loss between layouts, in nats."""


@measurement("correctness-float32", worth=100, seconds=65, quick_seconds=30, checks_results=True)
def correctness_float32(context: Context) -> Iterator[Figure]:
    """Losses against float64, gradients and texts against the CPU, in float32"""
    yield from compare(context.device, "float32", _reference(context)["gradients"])
    yield from texts(context.device)


@measurement("correctness-bfloat16", worth=95, seconds=40, quick_seconds=0, needs_gpu=True, checks_results=True)
def correctness_bfloat16(context: Context) -> Iterator[Figure]:
    """Losses against float64 and gradients against the CPU, in bfloat16"""
    yield from compare(context.device, "bfloat16", _reference(context)["gradients"])


@measurement("two-processes", worth=80, seconds=45, quick_seconds=25, checks_results=True)
def two_processes(context: Context) -> Iterator[Figure]:
    """Data and tensor parallelism of two processes on one device, over gloo, against one process on the CPU"""
    reference = _reference(context)["losses"]
    layouts: dict[str, dict[str, int]] = {"data 2": {}, "tensor 2": {"tensor": 2}}
    for name, parallel in layouts.items():
        losses = losses_of_layout(2, context.device, **parallel)
        difference = float(np.abs(np.subtract(losses, reference)).max())
        yield Figure(f"losses of four steps, {name}, on one device", difference, "nats", LAYOUT_LIMIT)


@measurement("host-waits", worth=90, seconds=25, quick_seconds=0, needs_gpu=True, checks_results=True)
def host_waits(context: Context) -> Iterator[Figure]:
    """Operations of a training step that make the host wait for the device"""
    from armd_scale.objectives.interface import training
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine

    run = toy_run(1, zero=1)
    run = run.model_copy(update={"train": run.train.model_copy(update={"dtype": "bfloat16"})})
    place = _place(context.device)
    with tempfile.TemporaryDirectory() as folder:
        groups.start(run.parallel, rank=0, processes=1, rendezvous=f"{folder}/store", device=place)
        engine = Engine(run, place)
        tokens = np.random.default_rng(0).integers(0, 500, (8, 64))
        for kind, step in (("base", 0), ("strided", run.total_steps - 1)):
            rows = engine.upload([training(run.objective).rows(run, tokens, step, range(8))])
            for _ in range(3):
                engine.train_step(rows, 1e-3).result()
            torch.cuda.set_sync_debug_mode("error")
            pending, reason = None, ""
            try:
                pending = engine.train_step(rows, 1e-3)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            yield Figure(f"a {kind} step waits (0: no, 1: yes)", float(bool(reason)), "", 0, detail={"reason": reason})
            if pending is None:  # that step is left half done
                break
            pending.result()
        groups.stop()


def _reference(context: Context) -> dict[str, Any]:
    """What a GPU is compared with, computed once in a process that sees no GPU: Megatron-Core and DeepSpeed use the
    GPU wherever they see one.
    """
    path = Path(context.shared, "reference.pt")
    if not path.exists():
        run_in_process(f"{__name__}.write_reference", threads=2, sees_gpu=False, path=str(path))
    return torch.load(path)


def write_reference(path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    partial = Path(f"{path}.partial")
    torch.save({"gradients": cpu_gradients(), "losses": losses_of_layout(1, "cpu")}, partial)
    partial.rename(path)


def _place(device: str) -> torch.device:
    return torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")


def _cases() -> Iterator[tuple[str, str, Any, Any]]:
    """Objective, kind of order, layout and rows of everything that is compared."""
    from armd_scale import orders, packing
    from armd_scale.rows import arrange, corrupt

    natural, tokens = orders.left_to_right(256), _tokens()
    layouts = {"left to right": natural, "any order": orders.shuffled(256, 256, 1)}
    layouts |= {f"strided, S = {s}": orders.strided(256, s) for s in (2, 4, 8)}
    for name, layout in layouts.items():
        yield "armd", f" {name}", layout, arrange(tokens, layout, 0)
    starts = np.tile(packing.starts(np.isin(np.arange(256), np.cumsum([0, *_DOCUMENTS]))), (2, 1))
    for name, draw in (("", orders.left_to_right), (", strided", lambda size: orders.strided(size, 4))):
        layout = orders.join([*map(draw, _DOCUMENTS)])
        yield "armd", f" documents{name}", layout, arrange(tokens, layout, 0, starts)
    yield "ar", "", natural, arrange(tokens, natural, 0)
    yield "mdm", "", natural, corrupt(tokens, _masked(), np.ones((2, 1)), 1000)


_DOCUMENTS = (100, 28, 128)
"""Tokens of the separate documents of a text."""


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (2, 256))


def _masked() -> np.ndarray:
    return np.random.default_rng(1).random((2, 256)) < 0.5


class Pass(NamedTuple):
    """One forward and backward pass of the training network."""

    name: str
    losses: torch.Tensor
    """[B, N], float64."""
    gradients: dict[str, torch.Tensor]
    expected: torch.Tensor | None
    """Losses of the float64 standalone model, [B, N]; None where nobody asked."""


def passes(device: str, dtype: str, expected: bool) -> Iterator[Pass | tuple[str, Exception]]:
    """Every case on the device, in a process group of one; the name and the error of a case that fails."""
    from armd_scale.config import ParallelConfig
    from armd_scale.parallel import groups

    networks: dict[str, Network] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups.start(ParallelConfig(), rank=0, processes=1, rendezvous=f"{folder}/store", device=_place(device))
        try:
            for objective, kind, layout, rows in _cases():
                try:
                    if objective not in networks:
                        networks[objective] = Network(objective, dtype, _place(device))
                    result = networks[objective].run(objective + kind, layout, rows, expected)
                except Exception as error:  # the other cases may still be right
                    yield objective + kind, error
                else:
                    yield result
        finally:
            groups.stop()


class Network:
    """The training network of an objective on a device, and the standalone model with its weights in float64."""

    def __init__(self, objective: str, dtype: str, place: torch.device) -> None:
        from armd_scale.config import ParallelConfig
        from armd_scale.model.network import Stage
        from armd_scale.parallel import groups
        from armd_scale.parallel.sharding import initialise

        self.place, self.model = place, _model(objective)
        stage = Stage(self.model, groups.transformer_config(self.model, ParallelConfig(), getattr(torch, dtype)))
        initialise([stage], 0)
        self.stage = stage.to(place)

    @functools.cached_property
    def standalone(self) -> Any:
        """The standalone model in float64; the gradients' reference does without it."""
        from armd_scale import inference
        from armd_scale.training.export import standalone_config

        standalone = inference.ARMD(standalone_config(self.model, eos_id=1)).double()
        weights = {name: weight.detach().double().cpu() for name, weight in self.stage.named_parameters()}
        weights["embedding.weight"] = weights["embedding.weight"][: self.model.symbols]
        standalone.load_state_dict(weights)
        return standalone

    def run(self, name: str, layout: Any, rows: Any, expected: bool) -> Pass:
        self.stage.zero_grad()
        losses = self.stage(rows.to(self.place))
        losses.mean().backward()
        gradients = {key: weight.grad.float().cpu() for key, weight in self.stage.named_parameters()}
        reference = self._expected(layout, rows) if expected else None
        return Pass(name, losses.detach().double().cpu(), gradients, reference)

    @torch.no_grad()
    def _expected(self, layout: Any, rows: Any) -> torch.Tensor:
        tokens = torch.from_numpy(_tokens())
        if not self.model.traits.exact:
            logp = self.standalone.predict(self.standalone.denoise(rows.context_tokens)).log_softmax(-1)
            return -logp.gather(-1, tokens[..., None])[..., 0] * torch.from_numpy(_masked())
        losses, start = [], 0
        for size in _DOCUMENTS if rows.starts is not None else (256,):
            part = slice(start, start + size)
            order, blocks = (torch.from_numpy(np.array(field[part])) for field in layout)
            order, blocks = order - start, blocks - blocks[0] + 1
            losses.append(self.standalone.nll(tokens[:, part], order, blocks)[:, order - 1])
            start += size
        return torch.cat(losses, dim=1)


def _model(objective: Any) -> Any:
    from armd_scale.config import ModelConfig

    return ModelConfig(
        objective=objective, layers=4, hidden=256, heads=4, length=256, vocab_size=1000, bos_id=0, init_std=0.05
    )


def compare(device: str, dtype: str, reference: dict[str, Any]) -> Iterator[Figure]:
    """Losses on the device against the float64 model, gradients against ``reference`` (``cpu_gradients``)."""
    for result in passes(device, dtype, expected=True):
        if not isinstance(result, Pass):
            name, error = result
            detail = {"error": f"{type(error).__name__}: {error}"[:2000]}
            yield Figure(f"loss, {name}, {dtype}", float("nan"), "nats", LOSS_LIMIT[dtype], detail=detail)
            continue
        assert result.expected is not None
        difference = float((result.losses - result.expected).abs().max())
        yield Figure(f"loss, {result.name}, {dtype}", difference, "nats", LOSS_LIMIT[dtype])
        pairs = ((result.gradients[key], value) for key, value in reference[result.name].items())
        difference = max(float((gradient - other).norm() / other.norm()) for gradient, other in pairs)
        yield Figure(f"gradients, {result.name}, {dtype}", difference, "relative", GRADIENT_LIMIT[dtype])


def cpu_gradients() -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of every case in float32 on the CPU."""
    found = {}
    for result in passes("cpu", "float32", expected=False):
        if not isinstance(result, Pass):
            raise result[1]
        found[result.name] = result.gradients
    return found


@torch.no_grad()
def texts(device: str) -> Iterator[Figure]:
    """Greedy texts of float64 models on the device and on the CPU: the share of tokens that differ."""
    from armd_scale import inference
    from armd_scale.training.export import standalone_config

    for objective, streams in (("armd", 4), ("ar", 1)):
        model = inference.ARMD(standalone_config(_model(objective), eos_id=1)).double()
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.05, generator=generator)
        decoding = inference.Decoding(temperature=0, streams=streams)
        cpu = model.generate(batch=3, length=64, decoding=decoding)
        other = copy.deepcopy(model).to(_place(device)).generate(batch=3, length=64, decoding=decoding).cpu()
        yield Figure(f"texts, {objective}, float64", float((cpu != other).double().mean()), "share", 0.01)


def toy_run(processes: int, **parallel: int) -> Any:
    """A small run in float32; a learned table, because gloo gathers nothing of a GPU."""
    from armd_scale.config import RunConfig

    shape = {"layers": 4, "hidden": 128, "heads": 4, "length": 64, "vocab_size": 500, "bos_id": 0, "init_std": 0.05}
    return RunConfig.model_validate(
        {
            "model": {**shape, "prefix": {"kernel": "learned", "width": 2.0}},
            "orders": {"ar_steps": 0, "permutation_steps": 1, "rho": 32, "strided_steps": 2, "streams": [4]},
            "optimizer": {"warmup_steps": 0, "lr": 1e-3},
            "train": {"steps": 2, "global_batch": 8, "micro_batch": 2, "dtype": "float32"},
            "parallel": {"zero": 0, **parallel},
            "cluster": {"tasks_per_node": processes},
        }
    )


def _losses(rank: int, device: str, run: Any, folder: str) -> None:
    """Losses of a few steps of a rank, base training and strided, into a file."""
    from armd_scale.objectives.interface import training
    from armd_scale.parallel import groups
    from armd_scale.parallel.engine import Engine

    place, count = _place(device), run.cluster.processes
    groups.start(run.parallel, rank=rank, processes=count, rendezvous=f"{folder}/store", device=place, backend="gloo")
    engine, losses = Engine(run, place), []
    for step in range(run.total_steps):
        tokens = np.random.default_rng(step).integers(0, 500, (8, 64))
        share = 8 // run.data_parallel
        first = engine.data_rank * share
        slots = [range(start, start + 2) for start in range(first, first + share, 2)]
        rows = [training(run.objective).rows(run, tokens[slot.start : slot.stop], step, slot) for slot in slots]
        losses.append(engine.train_step(engine.upload(rows), 1e-3).result().loss)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    groups.stop()


def losses_of_layout(processes: int, device: str, **parallel: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        run = toy_run(processes, **parallel)
        torch.multiprocessing.spawn(_losses, (device, run, folder), nprocs=processes)
        return json.loads(Path(folder, "losses.json").read_text(encoding="utf-8"))
