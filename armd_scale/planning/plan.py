"""A layout before it is paid for: memory of the fullest rank, time of a step, communication, and better layouts.

Shapes, the bytes that a micro-batch keeps, FLOPs and tensor-parallel messages come from the real network
(``measure``), the order of passes from the schedule. What DeepSpeed allocates beside the weights is written down here
and compared with real runs in ``tests/planning``. Times are estimates: see ``hardware`` for what they assume.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from armd_scale.config import RunConfig
from armd_scale.model.flops import run_edges, training_flops_per_token
from armd_scale.parallel.engine import BUCKET
from armd_scale.planning.hardware import COMMUNICATION, GPU, MEMORY, RESERVED
from armd_scale.planning.measure import Chunk, Meter
from armd_scale.planning.schedule import bubble, operations, simulate

_GATHERED = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by kind at the moment when their sum is largest."""

    weights: float
    gradients: float
    optimizer: float
    """Float32 master weights, moments and moving average."""
    activations: float
    buffers: float
    """Of collectives, and what an operation of the update needs for itself."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


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
        times = [(chunk.forward.seconds, chunk.backward.seconds) for chunk in chunks]
        times = [
            (
                forward + self._link(chunk.forward.sent, parallel.tensor),
                backward + self._link(chunk.backward.sent, parallel.tensor),
            )
            for (forward, backward), chunk in zip(times, chunks, strict=True)
        ]
        ranks = [chunks[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]
        states = max(sum(chunk.parameters for chunk in rank) for rank in ranks)
        spans = simulate(parallel.pipeline, parallel.chunks, config.micro_batches, times, self._transfer(config))
        passes = max(span.stop for rank in spans for span in rank)
        traffic = self._traffic(config, ranks)
        stride = parallel.tensor * (1 if config.data_parallel * parallel.tensor <= self._node(config) else 10**9)
        reduction = self._link(traffic["data parallel"], stride)
        # ZeRO-2 and 3 send while the backward pass computes; what does not fit behind it is left.
        backward = config.micro_batches * sum(chunk.backward.seconds for chunk in ranks[0])
        if parallel.zero > 1:
            reduction = max(0.0, reduction - backward)
        share = states / (config.data_parallel if parallel.zero else 1)
        return Plan(
            config=config,
            gpu=self.gpu,
            parameters=self._whole(config, chunks),
            flops_per_token=training_flops_per_token(model),
            edges=edges,
            costs=[sum(pair) / sum(map(sum, times)) for pair in times],
            memory=[_memory(config, self.gpu, rank, chunks) for rank, chunks in enumerate(ranks)],
            bubble=bubble(spans),
            traffic=traffic,
            seconds={
                "passes": passes,
                "gradients and weights over data parallel": reduction,
                # gradient, master, two moments and average read, four of them written, the weight written
                "optimiser": share * (4 * 9 + 2) / (self.gpu.bandwidth * MEMORY),
            },
        )

    def _node(self, config: RunConfig) -> int:
        return config.cluster.tasks_per_node

    def _link(self, sent: float, span: int) -> float:
        """Seconds to send so many bytes inside a group; ``span``: how many neighbouring ranks it reaches over."""
        rate = self.gpu.link if span <= 8 else self.gpu.network
        return sent / (rate * COMMUNICATION)

    def _activation(self, config: RunConfig, streams: int) -> float:
        """Bytes that a rank sends to the next stage for a micro-batch."""
        parallel, model = config.parallel, config.model
        rows = model.length / (parallel.tensor if parallel.sequence else 1)
        width = 4 if config.train.dtype == "float32" else 2
        return rows * streams * config.train.micro_batch * model.hidden * width

    def _transfer(self, config: RunConfig) -> float:
        stride = config.parallel.tensor * config.data_parallel
        return self._link(self._activation(config, 2), 1 if stride < self._node(config) else 10**9)

    def _traffic(self, config: RunConfig, ranks: list[list[Chunk]]) -> dict[str, float]:
        parallel, size = config.parallel, config.data_parallel
        weights = max(sum(chunk.parameters for chunk in rank) for rank in ranks)
        width = 4 if config.train.dtype == "float32" else 2
        # Over a ring each of the n ranks sends (n - 1) / n of the data once to reduce and once to gather it.
        reduced = 4 * weights * (2 if parallel.zero < 2 else 1)
        gathered = width * weights * (0 if parallel.zero == 0 else 1)
        if parallel.zero == 3:
            gathered *= 2 * config.micro_batches
        boundaries = parallel.pipeline * parallel.chunks - 1
        return {
            "tensor parallel": config.micro_batches
            * max(sum(chunk.forward.sent + chunk.backward.sent for chunk in rank) for rank in ranks),
            "pipeline": 2 * config.micro_batches * self._activation(config, 2) * min(boundaries, parallel.chunks),
            "data parallel": (reduced + gathered) * (size - 1) / size,
        }

    def _whole(self, config: RunConfig, chunks: list[Chunk]) -> float:
        tensor, model = config.parallel.tensor, config.model
        total = sum(chunk.matrices * tensor + chunk.vectors for chunk in chunks)
        if model.prefix.kernel == "learned":
            total -= (tensor - 1) * (model.length + 1) * model.prefix_dim
        if model.prefix.target_position:
            total -= (tensor - 1) * model.hidden * model.prefix_dim
        if model.tied_head and len(chunks) > 1:
            total -= model.padded_vocab * model.hidden
        return total


def _memory(config: RunConfig, gpu: GPU, rank: int, chunks: list[Chunk]) -> Memory:
    """The largest moment of a pipeline rank: in the passes, in the reduction, or in the update."""
    zero, ranks = config.parallel.zero, config.data_parallel
    low = config.train.dtype == "bfloat16"
    states = sum(chunk.parameters for chunk in chunks)
    matrices = sum(chunk.matrices for chunk in chunks)
    largest = max(chunk.largest for chunk in chunks)
    width = 2 if low else 4
    shard = states / (ranks if zero else 1)
    kinds = (2 if zero == 0 else 3) + (config.optimizer.ema > 0)
    optimizer = 4 * kinds * shard
    # Plain AdamW makes a root and a quotient of the whole group; the fused one, on CUDA, nothing.
    temporary = 0 if gpu.cuda else 2 * 4 * (matrices / ranks if zero else largest)
    bucket = min(BUCKET, states)
    shared = max(chunk.shared for chunk in chunks)
    weights, resident, gathered = width * states, 0.0, 0.0
    if zero == 3:
        weights = width * shard
        resident = 4 * shard + 4 * bucket  # gradients of this rank's part, and the bucket, from the start
        gathered = width * min(states, _GATHERED)
    if low and zero == 1:
        resident = 4 * states  # gradients are summed in float32 as they come
    grads = width * states if not (low and zero == 1) else width * largest
    reduction = {
        0: 16 * largest,  # squares in float64
        1: 0 if low else 4 * bucket + 4 * shard,
        2: 6 * bucket + 4 * shard if low else 4 * shard,
        3: 4 * bucket if low else 0,
    }[zero]
    filling = 4 * bucket if zero == 1 and not low else 0  # the bucket is there from the first gradient on
    # What the optimiser reads beside its states: gradients of its part, flattened.
    update = {0: grads, 1: 0 if low else 8 * shard, 2: (4 if low else 8) * shard, 3: 4 * shard}[zero]
    activations = _activations(config, rank, chunks)
    moments = [
        # With ZeRO-3 the gradients of a layer come when its gathered weights go.
        Memory(weights + gathered, resident + (0 if zero == 3 else grads), optimizer, activations, shared + filling),
        Memory(weights, resident + grads, optimizer, 0.0, shared + reduction),
        Memory(weights, resident + update, optimizer, 0.0, shared + temporary),
    ]
    return max(moments, key=lambda memory: memory.total)


def _activations(config: RunConfig, rank: int, chunks: list[Chunk]) -> float:
    """Most bytes that the micro-batches in flight on a rank keep, with the largest working set of a pass."""
    parallel = config.parallel
    alive = most = 0.0
    for operation in operations(rank, parallel.pipeline, parallel.chunks, config.micro_batches):
        chunk = chunks[operation.chunk]
        if operation.backward:
            alive -= chunk.kept
            most = max(most, alive + chunk.backward.peak)
        else:
            most = max(most, alive + chunk.forward.peak)
            alive += chunk.kept
    return most


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
