"""Predicts memory, step time and communication of a layout, and searches for faster layouts.

Shapes, bytes per micro-batch, FLOPs and tensor-parallel messages come from the real network (``measure``), the order of
passes from the pipeline schedule. Times are estimates with the assumptions of ``hardware``.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from armd_scale.config import RunConfig, with_vocabulary
from armd_scale.model.flops import stage_edges, training_flops_per_token
from armd_scale.model.network import left_to_right
from armd_scale.planning.hardware import COMMUNICATION, GPU, MEMORY, RESERVED
from armd_scale.planning.measure import Meter, Pass, StageCost, add_up, has_drafts
from armd_scale.planning.memory import Memory, rank_memory
from armd_scale.planning.schedule import bubble, simulate

ROWS = 4096
"""Fewest tokens of a text on a context-parallel rank in the search."""


@dataclass(frozen=True)
class Plan:
    """Predicted costs of a layout of a run."""

    config: RunConfig
    gpu: GPU
    parameters: float
    """Number of parameters of the model."""
    flops_per_token: float
    """FLOPs of matrix products and attention, forward and backward, without recomputation."""
    edges: list[int]
    """First layer of each (virtual) stage, and the number of layers."""
    costs: list[float]
    """Share of each stage in the time of a micro-batch."""
    memory: list[Memory]
    """Memory by pipeline rank."""
    bubble: float
    """Share of the time of the passes in which ranks wait."""
    traffic: dict[str, float]
    """Bytes that a rank sends in a step, by group."""
    seconds: dict[str, float]
    """Seconds of a step by part."""
    work: Pass
    """Forward and backward pass of a micro-batch on the slowest rank."""

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
        """Memory of the rank with the highest peak."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        return self.peak.total + (RESERVED if self.gpu.cuda else 0) <= self.gpu.memory


class Planner:
    """Plans layouts of a model; caches the costs of stages."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self._meter = Meter(gpu)

    def plan(self, config: RunConfig) -> Plan:
        """The plan of a configuration with a known vocabulary."""
        parallel, model = config.parallel, config.model
        edges = stage_edges(config)
        stages = self._meter.stages(config, edges)
        frozen = 0.0  # weights of the imported model
        if config.train.distill:
            stages[-1], frozen = self._taught(config, stages[-1])
        times = [(self._pass(config, stage.forward), self._pass(config, stage.backward)) for stage in stages]
        ranks = [stages[rank :: parallel.pipeline] for rank in range(parallel.pipeline)]
        states = max(sum(stage.parameters for stage in rank) for rank in ranks)
        stage = parallel.tensor * config.replicas
        transfers = [self._link(config, sent, parallel.pipeline, stage) for sent in _boundaries(config, edges)]
        spans = simulate(parallel.pipeline, parallel.chunks, config.micro_batches, times, transfers)
        passes = max(span.stop for rank in spans for span in rank)
        traffic = _traffic(config, ranks, edges)
        reduction = self._link(config, traffic["data parallel"], config.replicas, parallel.tensor)
        reduction += self._link(config, traffic["tied embedding"], 2, stage)
        share = states / (config.replicas if parallel.zero else 1)
        sums = [add_up([one for stage in rank for one in (stage.forward, stage.backward)]) for rank in ranks]
        return Plan(
            config=config,
            gpu=self.gpu,
            parameters=sum(stage.whole for stage in stages),
            flops_per_token=training_flops_per_token(model),
            edges=edges,
            costs=[sum(pair) / sum(map(sum, times)) for pair in times],
            memory=[
                rank_memory(config, rank, stages, frozen if rank == parallel.pipeline - 1 else 0.0)
                for rank, stages in enumerate(ranks)
            ],
            bubble=bubble(spans),
            traffic=traffic,
            work=max(sums, key=lambda work: work.seconds),
            seconds={
                "passes": passes,
                "gradients and weights": reduction,
                "optimiser": _updated(config, states, share) / (self.gpu.bandwidth * MEMORY),
            },
        )

    def _taught(self, config: RunConfig, last: StageCost) -> tuple[StageCost, float]:
        """The last stage with a pass of the imported model, which was measured with one layer, and its weights."""
        alone = {
            "parallel": config.parallel.model_copy(update={"pipeline": 1, "chunks": 1}),
            "train": config.train.model_copy(update={"distill": 0.0}),
        }
        costs = []
        for layers in (config.model.layers, 1):
            model = left_to_right(config.model).model_copy(update={"layers": layers})
            costs += self._meter.stages(config.model_copy(update={"model": model, **alone}), [0, layers])
        whole, single = costs
        more = {name: value - getattr(single.forward, name) for name, value in vars(whole.forward).items()}
        forward = add_up([last.forward, Pass(**{**more, "peak": 0.0})])
        return replace(last, forward=forward), whole.parameters

    def _pass(self, config: RunConfig, work: Pass) -> float:
        parallel = config.parallel
        seconds = self._link(config, work.sent, parallel.tensor, 1)
        return work.seconds + seconds + self._link(config, work.exchanged, parallel.context, parallel.tensor)

    def _link(self, config: RunConfig, sent: float, size: int, stride: int) -> float:
        """Seconds to send ``sent`` bytes in a group of ``size`` ranks with distance ``stride``.

        Across nodes, a group uses the network cards of all its ranks in a node.
        """
        node = config.cluster.tasks_per_node
        if node % (size * stride) == 0:
            return sent / (self.gpu.link * COMMUNICATION)
        cards = max(1, min(size, node // stride))
        return sent / (min(self.gpu.link, self.gpu.network * cards) * COMMUNICATION)


def _updated(config: RunConfig, weights: float, share: float) -> float:
    """Bytes that the update moves on a rank with ``weights`` weights and the optimiser states of ``share`` weights."""
    moved = 8 * 4.0  # AdamW reads and writes master weight, gradient and two moments
    if config.optimizer.ema:
        moved += 3 * 4  # average and master weight read, average written
    if _width(config) == 2 or config.parallel.zero:
        moved += 4 + _width(config)  # master weight read, working weight written
    averaged = 8 if config.replicas > 1 else 0  # divided by the number of ranks
    return share * moved + weights * (4 + averaged)  # the gradient is read for its norm


def assume_vocabulary(config: RunConfig, size: int = 50257) -> RunConfig:
    """The configuration with a vocabulary size: configured, of the tokenizer to train, or ``size``."""
    if config.model.vocab_size is not None:
        return config
    assumed = config.data.vocab_size if config.tokenizer is None else size
    return with_vocabulary(config, assumed, config.model.bos_id or 0)


def with_recompute(config: RunConfig, recompute: str) -> RunConfig:
    """The configuration with another ``parallel.recompute``."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": recompute})})


def _boundaries(config: RunConfig, edges: list[int]) -> list[float]:
    """Bytes of a micro-batch between consecutive stages, in either direction."""
    parallel, model = config.parallel, config.model
    rows = model.length / parallel.context / (parallel.tensor if parallel.sequence else 1)
    stream = rows * config.train.micro_batch * model.hidden * _width(config)
    # All tensors have one size, see Stage.
    return [stream * (model.streams + has_drafts(config)) for _ in edges[1:-1]]


def _width(config: RunConfig) -> int:
    """Bytes of a weight or an activation."""
    return 4 if config.train.dtype == "float32" else 2


def _traffic(config: RunConfig, ranks: list[list[StageCost]], edges: list[int]) -> dict[str, float]:
    """Bytes that the busiest rank sends in a step, by group."""
    parallel, size, model = config.parallel, config.replicas, config.model
    weights = max(sum(stage.parameters for stage in rank) for rank in ranks)
    # Over a ring each of the n ranks sends (n - 1) / n of the data once to reduce and once to gather it. DeepSpeed
    # reduces whole gradients with ZeRO-2 as well; with ZeRO-3 each rank gets its part alone.
    reduced = 4 * weights * (1 if parallel.zero == 3 else 2)
    gathered = _width(config) * weights * (0, 1, 1, 2 * config.micro_batches)[parallel.zero]
    between = [0.0, *_boundaries(config, edges), 0.0]
    hops = [
        sum(between[stage] + between[stage + 1] for stage in range(rank, len(edges) - 1, parallel.pipeline))
        for rank in range(parallel.pipeline)
    ]
    tied = model.tied_head and parallel.pipeline > 1
    return {
        "tensor parallel": config.micro_batches
        * max(sum(stage.forward.sent + stage.backward.sent for stage in rank) for rank in ranks),
        "context parallel": config.micro_batches
        * max(sum(stage.forward.exchanged + stage.backward.exchanged for stage in rank) for rank in ranks),
        "pipeline": config.micro_batches * max(hops),
        "data parallel": (reduced + gathered) * (size - 1) / size,
        "tied embedding": 4 * model.padded_vocab * model.hidden / parallel.tensor if tied else 0.0,
    }


def alternatives(planner: Planner, config: RunConfig) -> Iterator[Plan]:
    """Plans of the configured layout and of other layouts of the same run and GPUs that fit in memory.

    The search skips layouts that are rarely faster: recomputation that is not needed, and more than four times the
    model-parallel ranks of the smallest layout that fits without recomputation. Context-parallel ranks hold at least
    ``ROWS`` tokens of a text.
    """
    zeros = (1,) if config.parallel.zero < 2 else (1, config.parallel.zero)
    contexts = [size for size in (1, 2, 4, 8, 16) if size == 1 or config.model.length >= size * ROWS]
    sizes = sorted(
        itertools.product((1, 2, 4, 8), contexts, (1, 2, 4, 8, 16)), key=lambda size: (math.prod(size), size)
    )
    smallest = None
    configured = planner.plan(config)
    if configured.fits:
        yield configured
    for tensor, context, pipeline in sizes:
        ranks = tensor * context * pipeline
        if tensor > config.cluster.tasks_per_node or (smallest and ranks > 4 * smallest):
            continue
        for chunks, zero, micro_batch in itertools.product((1, 2) if pipeline > 1 else (1,), zeros, (1, 2, 4, 8)):
            for recompute in ("none", "full"):
                layout = {
                    "tensor": tensor, "sequence": tensor > 1, "context": context, "pipeline": pipeline,
                    "chunks": chunks, "cut": None, "recompute": recompute, "zero": zero,
                }  # fmt: skip
                candidate = _changed(config, layout, micro_batch)
                if candidate is None or _least_memory(candidate) > planner.gpu.memory:
                    break
                plan = planner.plan(candidate)
                if plan.fits and candidate == config:
                    break
                if plan.fits:
                    smallest = smallest or (ranks if recompute == "none" else None)
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
    """A lower bound without measurement: weights, gradients and optimiser states of the average rank."""
    model, zero = config.model, config.parallel.zero
    per_layer = 2 * model.hidden * (model.heads + model.key_heads) * model.head_size
    per_layer += (3 if model.mlp == "swiglu" else 2) * model.hidden * model.ffn_width
    weights = model.layers * per_layer / (config.parallel.tensor * config.parallel.pipeline)
    states = 4 * (3 + (config.optimizer.ema > 0)) * weights / config.replicas
    return states + _width(config) * weights / (config.replicas if zero == 3 else 1)
