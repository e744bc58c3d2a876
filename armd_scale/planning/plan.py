"""A layout before it is paid for: memory of the fullest rank, time of a step, communication, and better layouts.

Shapes, the bytes that a micro-batch keeps, FLOPs and tensor-parallel messages come from the real network
(``measure``), the order of passes from the schedule. Times are estimates: see ``hardware`` for what they assume.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from armd_scale.config import RunConfig
from armd_scale.model.flops import run_edges, training_flops_per_token
from armd_scale.planning.hardware import COMMUNICATION, GPU, MEMORY, RESERVED
from armd_scale.planning.measure import Chunk, Meter, Pass
from armd_scale.planning.memory import Memory, rank_memory
from armd_scale.planning.schedule import bubble, simulate


@dataclass(frozen=True)
class Plan:
    """What one layout of a run costs."""

    config: RunConfig
    gpu: GPU
    parameters: float
    """Of the whole model."""
    flops_per_token: float
    """Of matrix products and attention, forward and backward, without recomputation."""
    edges: list[int]
    """First layer of each run of layers, and the number of layers."""
    costs: list[float]
    """Share of each run in the time of a micro-batch."""
    memory: list[Memory]
    """Of each pipeline rank."""
    bubble: float
    """Share of the passes in which a rank waits for others."""
    traffic: dict[str, float]
    """Bytes that a rank sends in a step, by group."""
    seconds: dict[str, float]
    """Parts of a step."""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.config.train.global_batch * self.config.model.length / self.step

    @property
    def mfu(self) -> float:
        return self.tokens_per_second * self.flops_per_token / (self.gpu.flops * self.config.cluster.processes)

    @property
    def peak(self) -> Memory:
        """Of the fullest rank."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        return self.peak.total + (RESERVED if self.gpu.cuda else 0) <= self.gpu.memory


class Planner:
    """Plans layouts of one model; remembers what runs of layers cost."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self._meter = Meter(gpu)

    def plan(self, config: RunConfig) -> Plan:
        """The plan of a configuration with a known vocabulary."""
        parallel, model = config.parallel, config.model
        edges = run_edges(config)
        chunks = self._meter.chunks(config, edges)
        times = [(self._pass(config, chunk.forward), self._pass(config, chunk.backward)) for chunk in chunks]
        ranks = [chunks[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]
        states = max(sum(chunk.parameters for chunk in rank) for rank in ranks)
        transfer = self._link(config, _activation(config), config.cluster.processes)
        spans = simulate(parallel.pipeline, parallel.chunks, config.micro_batches, times, transfer)
        passes = max(span.stop for rank in spans for span in rank)
        traffic = _traffic(config, ranks)
        reduction = self._link(config, traffic["data parallel"], parallel.tensor * config.data_parallel)
        # ZeRO-2 and 3 send while the backward pass computes; what does not fit behind it is left.
        backward = config.micro_batches * sum(chunk.backward.seconds for chunk in ranks[0])
        if parallel.zero > 1:
            reduction = max(0.0, reduction - backward)
        share = states / (config.data_parallel if parallel.zero else 1)
        return Plan(
            config=config,
            gpu=self.gpu,
            parameters=sum(chunk.whole for chunk in chunks),
            flops_per_token=training_flops_per_token(model),
            edges=edges,
            costs=[sum(pair) / sum(map(sum, times)) for pair in times],
            memory=[rank_memory(config, self.gpu, rank, chunks) for rank, chunks in enumerate(ranks)],
            bubble=bubble(spans),
            traffic=traffic,
            seconds={
                "passes": passes,
                "gradients and weights over data parallel": reduction,
                # gradient, master, two moments and average read, four of them written, the weight written
                "optimiser": share * (4 * 9 + 2) / (self.gpu.bandwidth * MEMORY),
            },
        )

    def _pass(self, config: RunConfig, one: Pass) -> float:
        return one.seconds + self._link(config, one.sent, config.parallel.tensor)

    def _link(self, config: RunConfig, sent: float, ranks: int) -> float:
        """Seconds to send so many bytes inside a group that lies within so many neighbouring ranks."""
        rate = self.gpu.link if ranks <= config.cluster.tasks_per_node else self.gpu.network
        return sent / (rate * COMMUNICATION)


def with_recompute(config: RunConfig, recompute: str) -> RunConfig:
    """The same run with other activations computed again."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": recompute})})


def _activation(config: RunConfig) -> float:
    """Bytes that a rank sends to the next stage for a micro-batch, while both streams live."""
    parallel, model = config.parallel, config.model
    rows = model.length / (parallel.tensor if parallel.sequence else 1)
    return rows * 2 * config.train.micro_batch * model.hidden * _width(config)


def _width(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 4 if config.train.dtype == "float32" else 2


def _traffic(config: RunConfig, ranks: list[list[Chunk]]) -> dict[str, float]:
    """Bytes that the busiest rank sends in a step, by group."""
    parallel, size = config.parallel, config.data_parallel
    weights = max(sum(chunk.parameters for chunk in rank) for rank in ranks)
    # Over a ring each of the n ranks sends (n - 1) / n of the data once to reduce and once to gather it.
    reduced = 4 * weights * (2 if parallel.zero < 2 else 1)
    gathered = _width(config) * weights * (0, 1, 1, 2 * config.micro_batches)[parallel.zero]
    boundaries = min(parallel.chunks, parallel.pipeline * parallel.chunks - 1)
    return {
        "tensor parallel": config.micro_batches
        * max(sum(chunk.forward.sent + chunk.backward.sent for chunk in rank) for rank in ranks),
        "pipeline": 2 * config.micro_batches * _activation(config) * boundaries,
        "data parallel": (reduced + gathered) * (size - 1) / size,
    }


def alternatives(planner: Planner, config: RunConfig) -> Iterator[Plan]:
    """Plans of other layouts of the same run on the same GPUs that fit in memory.

    Left out, since they can hardly be faster: recomputation where it is not needed, and more than four times as many
    model-parallel ranks as the smallest layout that fits without it.
    """
    zeros = (1,) if config.parallel.zero < 2 else (1, config.parallel.zero)
    sizes = sorted(itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)), key=lambda size: (size[0] * size[1], size))
    smallest = None
    for tensor, pipeline in sizes:
        if tensor > config.cluster.tasks_per_node or (smallest and tensor * pipeline > 4 * smallest):
            continue
        for chunks, zero, micro_batch in itertools.product((1, 2) if pipeline > 1 else (1,), zeros, (1, 2, 4, 8)):
            for recompute in ("none", "full"):
                layout = {
                    "tensor": tensor, "sequence": tensor > 1, "pipeline": pipeline, "chunks": chunks, "cut": None,
                    "recompute": recompute, "zero": zero,
                }  # fmt: skip
                candidate = _changed(config, layout, micro_batch)
                if candidate is None or _least_memory(candidate) > planner.gpu.memory:
                    break
                plan = planner.plan(candidate)
                if plan.fits:
                    smallest = smallest or (tensor * pipeline if recompute == "none" else None)
                    yield plan
                    break


def _changed(config: RunConfig, layout: dict[str, Any], micro_batch: int) -> RunConfig | None:
    fields = config.model_dump()
    fields["parallel"] |= layout
    fields["train"]["micro_batch"] = micro_batch
    try:
        return RunConfig.model_validate(fields)
    except ValidationError:
        return None


def _least_memory(config: RunConfig) -> float:
    """A lower bound without looking: weights and states of the average rank."""
    model = config.model
    per_layer = 2 * model.hidden**2 + 2 * model.hidden * model.key_heads * model.head_dim
    per_layer += (3 if model.mlp == "swiglu" else 2) * model.hidden * model.ffn_width
    ranks = config.parallel.tensor * config.parallel.pipeline
    whole = model.layers * per_layer / ranks
    return (
        6 * whole + 16 * whole / config.data_parallel if config.parallel.zero < 2 else 22 * whole / config.data_parallel
    )
